"""Rewards for recipes. A function gets the model's answer and the row, and returns 0 to 1."""

import re
from typing import Any

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(answer: str, row: dict[str, Any]) -> float:
    """Return 1 if the last number of the answer is the last number of the row's own answer."""
    found = [NUMBER.findall(text)[-1:] for text in (answer, row["reference"])]
    first, second = ([float(number.replace(",", "")) for number in numbers] for numbers in found)
    return float(bool(second) and first == second)
