"""Sampled answers of a run of reinforcement learning, with their rewards."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.numpy import load_file

from tunesmith.errors import DataError, UsageError
from tunesmith.run_dir import ROLLOUTS, rollout_files


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


def read_groups(path: Path) -> list[RewardedGroup]:
    """Read the groups of a rollout file. Raise ValueError if the file is damaged."""
    try:
        tensors = load_file(path)
        texts = json.loads(tensors["texts"].tobytes())
        answers = list(zip(tensors["rewards"].tolist(), texts["answers"], strict=True))
        size = len(answers) // len(texts["prompts"])
        groups = []
        for n, (prompt, row) in enumerate(texts["prompts"]):
            group = sorted(answers[n * size : (n + 1) * size], key=lambda answer: -answer[0])
            groups.append(RewardedGroup(row, prompt, group))
    except (SafetensorError, OSError, LookupError, ArithmeticError, TypeError) as error:
        raise ValueError(f"the file is damaged: {error}") from error
    if not size:
        raise ValueError("the file is damaged: it has fewer answers than prompts")
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
        groups = read_groups(files[step])
    except ValueError as error:
        raise DataError(str(error), where=files[step], fix="use another step") from error
    for group in groups:
        yield f"── {group.row}"
        yield group.prompt
        for reward, text in group.answers:
            yield f"[{reward:.2f}] {text}"
        yield ""
