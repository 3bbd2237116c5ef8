"""The numbers of a run, from its files."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from tunesmith.config.dump import is_free, leaves
from tunesmith.reader.run_files import RunFiles, finite
from tunesmith.run_dir import shown

HASHES_OF_INPUTS = {"data_hash": "the training rows", "model_hash": "the base's weights"}
# Columns of metrics.jsonl.
VAL_LOSS_NAME = "val_loss"
VAL_ACCURACY_NAME = "val_reward_accuracy"
# Of the keys that may change when a run resumes: they end it sooner, or choose its weights.
_CHOOSES_WEIGHTS = re.compile(r"validate\..+|checkpoint\.final")
_TRAINING_FILE = re.compile(r"data\.train(\.\d+)?\.source")


@dataclass(frozen=True)
class Spread:
    """A mean, the standard deviation of what it is a mean of, and their number."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def from_values(cls, values: Sequence[float], mean: float | None = None) -> "Spread | None":
        """None without values; `mean`: a weighted one in place of the plain one."""
        if not values:
            return None
        deviation = stdev(values) if len(values) > 1 else 0.0
        return cls(fmean(values) if mean is None else mean, deviation, len(values))


@dataclass
class RunSummary:
    """The numbers of one run; what was not measured is None.

    Attributes:
        seconds: of the recorded steps.
        validations: step -> val_loss.
        accuracies: step -> the share of held-out pairs in order.
        loss: training loss of the last steps.
        speed: tokens per second without the first step, which compiles.
        waiting: share of the time spent waiting for data.
    """

    files: RunFiles
    label: str
    steps: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    validations: dict[int, float] = field(default_factory=dict)
    accuracies: dict[int, float] = field(default_factory=dict)
    loss: Spread | None = None
    speed: Spread | None = None
    mfu: float | None = None
    waiting: float | None = None
    memory_gib: float | None = None

    @property
    def validation_hash(self) -> str | None:
        """Return the hash of the held-out rows as tokens."""
        return self.files.env.get("validation_hash")

    @property
    def held_out(self) -> int | None:
        """Count the examples that were held out, as env.json has it."""
        return self.files.env.get("validation_examples") or None

    def key(self, section: str, name: str) -> Any:
        """The value of a key of the recipe; None where it is not there."""
        return (self.files.recipe.get(section) or {}).get(name)

    @property
    def max_examples(self) -> Any:
        """Return how many of the held-out rows were measured; None: all."""
        return self.key("validate", "max_examples")

    @property
    def method(self) -> str:
        """The name of the method, which says what val_loss is the loss of."""
        return str(self.method_keys.get("name"))

    @property
    def method_keys(self) -> dict[str, Any]:
        """The section of the recipe; a method without keys is written as its name."""
        method = self.files.recipe.get("method", "sft")
        return method if isinstance(method, dict) else {"name": method}

    @property
    def seed(self) -> Any:
        return self.key("train", "seed")

    @property
    def hold_out_seed(self) -> Any:
        """Return the seed that drew the rows of `data.hold_out`; None without or if unknown."""
        if not self.key("data", "hold_out"):
            return None
        seed = self.key("data", "hold_out_seed")
        return self.seed if seed is None else seed

    @property
    def learned(self) -> dict[str, Any]:
        """Collect what changes what is learned: recipe keys except the seed, rows and weights."""
        learned = {}
        for key, value in leaves(self.files.recipe).items():
            if key != "train.seed" and changes_learning(key, [self]):
                learned[key] = value
        # A file may have been edited between two runs of one recipe.
        for name in HASHES_OF_INPUTS:
            learned[name] = self.files.env.get(name)
        return learned


def changes_learning(key: str, runs: Sequence[RunSummary]) -> bool:
    """Tell whether runs that differ in a key of their recipes learn something else.

    The same training rows may be in files of two names, as those of a Python program, which are
    kept in each run directory.
    """
    if _CHOOSES_WEIGHTS.fullmatch(key):
        return True
    # The best of a model trained in full is one of the steps that have a checkpoint.
    if key == "checkpoint.every":
        return any(run.key("adapter", "kind") == "none" for run in runs)
    if is_free(key):
        return False
    data_hashes = {run.files.env.get("data_hash") for run in runs}
    has_same_rows = len(data_hashes) == 1 and None not in data_hashes
    return not (has_same_rows and _TRAINING_FILE.fullmatch(key))


def summaries_of(runs: Sequence[RunFiles]) -> list[RunSummary]:
    """The numbers of each run; runs of one name are labeled by their folder."""
    names = [run.name for run in runs]
    summaries = []
    for run in runs:
        is_unique = names.count(run.name) == 1
        summaries.append(_summarize(run, run.name if is_unique else shown(run.folder)))
    return summaries


def _summarize(run: RunFiles, label: str) -> RunSummary:
    steps = run.columns.get("step", [])

    def column(name: str) -> list[float | None]:
        return run.columns.get(name) or [None] * len(steps)

    def total(name: str, start: int = 0) -> float:
        return sum(finite(column(name)[start:]))

    summary = RunSummary(run, label, run.steps, total("tokens"), total("step_seconds"))
    for name, values in (
        (VAL_LOSS_NAME, summary.validations),
        (VAL_ACCURACY_NAME, summary.accuracies),
    ):
        for step, value in zip(steps, column(name), strict=True):
            if value is not None and math.isfinite(value):
                values[int(step or 0)] = value
    losses = finite(column("loss"))
    # A tenth of the steps, and at least 10.
    summary.loss = Spread.from_values(losses[-max(10, len(losses) // 10) :])
    summary.memory_gib = max(finite(column("memory_gib")), default=None)

    # The first step compiles and warms up; it would hide the speed of the others.
    start = 1 if len(steps) > 1 else 0
    seconds = total("step_seconds", start)
    if not seconds:
        return summary
    speeds = finite(column("tokens_per_second")[start:])
    summary.speed = Spread.from_values(speeds, total("tokens", start) / seconds)
    summary.waiting = total("data_seconds", start) / seconds
    # The mean over time, of the steps whose MFU was measured: a step that took twice as long counts
    # twice.
    times = zip(column("mfu")[start:], column("step_seconds")[start:], strict=True)
    measured = [(mfu, time) for mfu, time in times if mfu and time]
    if measured:
        summary.mfu = sum(mfu * time for mfu, time in measured) / sum(t for _, t in measured)
    return summary
