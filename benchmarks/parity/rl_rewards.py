"""Rewards of the tasks in rl_tasks.py. `method.reward` names this file and one of its functions."""

from __future__ import annotations

import json
from string import punctuation
from typing import Any


def total(answer: str, row: dict[str, Any]) -> float:
    """Return 1 for the right sum.

    Otherwise return 0.1 to 0.3 for a JSON object with a whole number `sum`. It grows as the number
    comes near to the right one.
    """
    try:
        value = json.loads(answer)
    except ValueError:
        return 0.0
    if not isinstance(value, dict) or [*value] != ["sum"] or not isinstance(value["sum"], int):
        return 0.0
    error = abs(value["sum"] - json.loads(row["reference"])["sum"])
    return 0.1 + 0.4 / (1 + error) if error else 1.0


def letters(answer: str, row: dict[str, Any]) -> float:
    """Return the share of the letters a to m. For models with random weights."""
    return sum(letter in "abcdefghijklm" for letter in answer.lower()) / max(1, len(answer))


def words(answer: str, row: dict[str, Any]) -> float:
    """Return the share of words in their place. With capitals or punctuation a word counts half."""
    found, expected = answer.split(), row["reference"].split()
    right = 0.0
    for a, b in zip(found, expected, strict=False):
        if a == b:
            right += 1
        elif a.strip(punctuation).lower() == b:
            right += 0.5
    return right / max(len(found), len(expected))


def choice(answer: str, row: dict[str, Any]) -> float:
    """Return 1 for the right word alone.

    Otherwise return up to 0.5 for a short answer with the right word, and 0.1 for another word.
    """
    if answer == row["reference"]:
        return 1.0
    found = [word.strip(punctuation).lower() for word in answer.split()]
    if found.count(row["reference"]) == 1 and len(found) <= 4:
        return 0.5 / len(found)
    return 0.1 if len(found) == 1 else 0.0
