"""Sampled answers of a run of reinforcement learning, with their rewards."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

from annotated_types import Len
from safetensors import SafetensorError
from safetensors.numpy import load
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from tunesmith.errors import DataError, UsageError, first_line
from tunesmith.run_dir import ROLLOUTS, parse_object, read_bytes, rollout_files


class RewardedText(NamedTuple):
    """A sampled answer with its reward and the score of each scorer."""

    reward: float
    text: str
    scores: dict[str, float]


class RewardedGroup(NamedTuple):
    """A prompt and its sampled answers.

    Attributes:
        row: file and line of the prompt's row.
        answers: the answers, the highest reward first.
    """

    row: str
    prompt: str
    answers: list[RewardedText]

    @property
    def spread(self) -> float:
        """Difference between the highest and the lowest reward."""
        return self.answers[0].reward - self.answers[-1].reward


class _Texts(TypedDict):
    """The texts in a rollout file. Each prompt is followed by the file and line of its row."""

    prompts: list[Annotated[list[str], Len(2, 2)]]
    answers: list[str]
    scorers: list[str]


def read_groups(path: Path) -> list[RewardedGroup]:
    """Read the groups of a rollout file. Raise ValueError if the file is damaged."""
    try:
        tensors = load(read_bytes(path))
        texts = parse_object(tensors["texts"].tobytes(), _Texts)
        rewards = tensors["rewards"].astype(float).ravel().tolist()
        names = texts["scorers"]
        scores = tensors["scores"].astype(float).reshape(len(rewards), len(names)).tolist()
        answers = []
        for reward, text, values in zip(rewards, texts["answers"], scores, strict=True):
            answers.append(RewardedText(reward, text, dict(zip(names, values, strict=True))))
        size, rest = divmod(len(answers), len(texts["prompts"]))
    except (SafetensorError, OSError, LookupError, ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"the file is damaged: {first_line(error)}") from error
    if not size or rest:
        raise ValueError("the file is damaged: its answers do not fit its prompts")
    groups = []
    for n, (prompt, row) in enumerate(texts["prompts"]):
        group = answers[n * size : (n + 1) * size]
        groups.append(RewardedGroup(row, prompt, sorted(group, key=lambda each: -each.reward)))
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
    for row, prompt, answers in groups:
        yield f"── {row}"
        yield prompt
        for reward, text, scores in answers:
            parts = ", ".join(f"{name} {score:.2f}" for name, score in scores.items())
            # With one scorer, the reward is its score.
            yield f"[{reward:.2f}{f': {parts}' if len(scores) > 1 else ''}] {text}"
        yield ""
