"""Sampled answers of a run of reinforcement learning, with their rewards."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from tunesmith.errors import UsageError
from tunesmith.run_dir import ROLLOUTS


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


def rollout_files(folder: Path) -> dict[int, Path]:
    """Return the rollout files of a run by their step, in order."""
    found = {}
    for path in folder.glob(f"{ROLLOUTS}/step-*.safetensors"):
        match = re.fullmatch(r"step-(\d+)", path.stem)
        if match:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def read_groups(path: Path) -> list[RewardedGroup]:
    """Read the groups of a rollout file. Raise ValueError if the file is damaged."""
    try:
        with safe_open(path, "numpy") as file:
            texts = file.metadata()
            rewards = file.get_tensor("rewards").tolist()
        prompts = json.loads(texts["prompts"])
        answers = list(zip(rewards, json.loads(texts["answers"]), strict=True))
    except (SafetensorError, OSError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    size = len(answers) // len(prompts)
    groups = []
    for n, (prompt, row) in enumerate(prompts):
        group = sorted(answers[n * size : (n + 1) * size], key=lambda answer: -answer[0])
        groups.append(RewardedGroup(row, prompt, group))
    return groups


def rollout_lines(folder: Path, step: str) -> Iterator[str]:
    """Yield lines with the prompts of a step and their answers, each after its reward.

    Raise UsageError if the run has no such file.
    """
    files = {str(number): path for number, path in rollout_files(folder).items()}
    if step not in files:
        kept = ", ".join(files) or "none"
        raise UsageError(
            f"there are no sampled answers of step {step}",
            where=folder / ROLLOUTS,
            why=f"a run keeps those after its oldest checkpoint: {kept}",
            fix="use one of these steps, or a run with method: grpo",
        )
    for group in read_groups(files[step]):
        yield f"── {group.row}"
        yield group.prompt
        for reward, text in group.answers:
            yield f"[{reward:.2f}] {text}"
        yield ""
