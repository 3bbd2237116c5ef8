"""Sampled answers of a run of reinforcement learning, with their rewards."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired

import numpy as np
from annotated_types import Len
from safetensors import SafetensorError
from safetensors.numpy import load
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from tunesmith.errors import DataError, UsageError, first_line
from tunesmith.run_dir import ROLLOUTS, form_fault, parse_json, read_bytes, rollout_files


class RewardedGroup(NamedTuple):
    """A prompt and its sampled answers.

    Attributes:
        row: file and line of the prompt's row.
        answers: (reward, text) of each answer, the highest reward first.
    """

    row: str
    prompt: str
    answers: list[tuple[float, str]]

    @property
    def spread(self) -> float:
        """Difference between the highest and the lowest reward."""
        return self.answers[0][0] - self.answers[-1][0]


class _ScoredText(NamedTuple):
    reward: float
    text: str
    scores: dict[str, float]  # the score of each scorer


class _Texts(TypedDict):
    """The texts in a rollout file. Each prompt is followed by the file and line of its row."""

    prompts: list[Annotated[list[str], Len(2, 2)]]
    answers: list[str]
    scorers: NotRequired[list[str]]


def read_groups(path: Path) -> list[RewardedGroup]:
    """Read the groups of a rollout file. Raise ValueError if the file is damaged."""
    return [
        RewardedGroup(row, prompt, [(answer.reward, answer.text) for answer in answers])
        for row, prompt, answers in _read_scored(path)
    ]


def _parse_texts(content: bytes) -> _Texts:
    texts: Any = parse_json(content)
    fault = form_fault(texts, _Texts)
    if fault:
        raise ValueError(fault)
    parsed: _Texts = texts
    return parsed


def _read_scored(path: Path) -> list[tuple[str, str, list[_ScoredText]]]:
    """Return the row, the prompt and the answers of each group, the highest reward first."""
    try:
        tensors = load(read_bytes(path))
        texts = _parse_texts(tensors["texts"].tobytes())
        rewards = tensors["rewards"].astype(float).ravel().tolist()
        names = texts.get("scorers", [])
        scores = np.zeros((len(rewards), 0))
        if names:
            scores = tensors["scores"].astype(float).reshape(len(rewards), len(names))
        answers = []
        for reward, text, values in zip(rewards, texts["answers"], scores.tolist(), strict=True):
            answers.append(_ScoredText(reward, text, dict(zip(names, values, strict=True))))
        size, rest = divmod(len(answers), len(texts["prompts"]))
    except (SafetensorError, OSError, LookupError, ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"the file is damaged: {first_line(error)}") from error
    if not size or rest:
        raise ValueError("the file is damaged: its answers do not fit its prompts")
    groups = []
    for n, (prompt, row) in enumerate(texts["prompts"]):
        group = answers[n * size : (n + 1) * size]
        groups.append((row, prompt, sorted(group, key=lambda answer: -answer.reward)))
    return groups


def rollout_lines(folder: Path, step: str) -> Iterator[str]:
    """Yield lines with the prompts of a step and their answers, each after its reward.

    Raises:
        UsageError: the run has no answers of this step.
        DataError: the file is damaged.
    """
    files = {str(number): path for number, path in rollout_files(folder / ROLLOUTS).items()}
    if step not in files:
        raise UsageError(
            f"there are no sampled answers of step {step}",
            where=folder / ROLLOUTS,
            why="a run with method grpo keeps the answers of its newest steps, here: "
            f"{', '.join(files) or 'none'}",
            fix="use one of these steps, or correct the folder",
        )
    try:
        groups = _read_scored(files[step])
    except ValueError as error:
        raise DataError(str(error), where=files[step], fix="use another step") from error
    for row, prompt, answers in groups:
        yield f"── {row}"
        yield prompt
        for reward, text, scores in answers:
            parts = ", ".join(f"{name} {score:.2f}" for name, score in scores.items())
            # With one scorer, the reward is its score.
            yield f"[{reward:.2f}{f': {parts}' if len(scores) > 1 else ''}] {text}"
        yield ""
