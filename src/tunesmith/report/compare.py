"""What runs show side by side: numbers with their spread, differing keys, and which is better where
that can be said.

val_loss decides, and only on the same held-out rows; a training loss never does. A difference
counts above the noise: what seeds alone would exceed once in 20, where several runs share a recipe;
else how far val_loss moves around its own trend.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any, NamedTuple

from tunesmith.config.dump import is_free, leaves
from tunesmith.host.shell import shell_path
from tunesmith.report.run_files import RunFiles, finite
from tunesmith.run_dir import RECIPE, shown

# Standard errors above which a difference counts: about 95 % of a normal distribution.
STANDARD_ERRORS = 2.0
# The same of Student's t, from 1 degree of freedom.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
HASHES_OF_INPUTS = {"data_hash": "the training rows", "model_hash": "the base's weights"}
TOKEN_GAP = 0.02  # relative difference of the tokens learned from that is worth a sentence


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
        validations: (step, val_loss).
        best: the lowest val_loss and its step.
        loss: training loss of the last steps.
        speed: tokens per second without the first step, which compiles.
        waiting: share of the time spent waiting for data.
    """

    files: RunFiles
    label: str
    steps: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    validations: list[tuple[int, float]] = field(default_factory=list)
    best: tuple[float, int] | None = None
    loss: Spread | None = None
    speed: Spread | None = None
    mfu: float | None = None
    waiting: float | None = None
    memory_gib: float | None = None

    @property
    def val_losses(self) -> list[float]:
        return [val_loss for _, val_loss in self.validations]

    @property
    def validation_hash(self) -> str | None:
        """Of the held-out rows as tokens."""
        return self.files.env.get("validation_hash")

    @property
    def max_examples(self) -> Any:
        """How many of the held-out rows were measured; None: all."""
        return (self.files.recipe.get("validate") or {}).get("max_examples")

    @property
    def method(self) -> str:
        """The name of the method, which says what val_loss is the loss of."""
        method = self.files.recipe.get("method", "sft")
        return str(method.get("name") if isinstance(method, dict) else method)

    @property
    def seed(self) -> int | None:
        seed: int | None = (self.files.recipe.get("train") or {}).get("seed")
        return seed

    @property
    def learned(self) -> dict[str, Any]:
        """What changes what is learned: keys of the recipe without the seed, rows and weights."""
        keys = leaves(self.files.recipe)
        learned = {k: v for k, v in keys.items() if k != "train.seed" and not is_free(k)}
        # A file may have been edited between two runs of one recipe.
        for name in HASHES_OF_INPUTS:
            learned[name] = self.files.env.get(name)
        return learned

    @property
    def machine(self) -> str:
        """What the speed depends on beside the recipe: processor, GPUs, threads, torch."""
        names = ("cpu", "cpu_threads", "gpus", "torch", "hosts")
        return json.dumps([self.files.env.get(name) for name in names])


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

    last_step = int(steps[-1] or 0) if steps else 0
    summary = RunSummary(run, label, last_step, total("tokens"), total("step_seconds"))
    for step, val_loss in zip(steps, column("val_loss"), strict=True):
        if val_loss is not None and math.isfinite(val_loss):
            summary.validations.append((int(step or 0), val_loss))
    summary.best = min(((loss, step) for step, loss in summary.validations), default=None)
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
    # The mean over time: a step that took twice as long counts twice.
    weighted = 0.0
    measured_seconds = 0.0
    # A step without a measured MFU does not count in the mean.
    for mfu, step_seconds in zip(
        column("mfu")[start:], column("step_seconds")[start:], strict=True
    ):
        if mfu and step_seconds:
            weighted += mfu * step_seconds
            measured_seconds += step_seconds
    if measured_seconds:
        summary.mfu = weighted / measured_seconds
    return summary


def eval_figures(runs: Sequence[RunSummary]) -> list[tuple[str, list[str | None]]]:
    """What `eval` measured: a label, and a cell for each run, None where it did not.

    Runs share a line where they answered the same rows: not the file's name decides, but the rows.
    """
    lines: dict[tuple[str, str, str], list[str | None]] = {}
    for index, run in enumerate(runs):
        for result in run.files.evals:
            about = f"{result['data']}, {result['rows']} rows"
            cells = {}
            if result["losses"] is not None:
                cells["loss"] = _losses_text(result)
            for scorer, intervals in result["scores"].items():
                cells[scorer] = _scores_text(intervals)
            for name, text in cells.items():
                # The same rows, told by their hash, share a line; rows of the same name may differ.
                key = (name, about, result["row_hash"])
                line = lines.setdefault(key, [None] * len(runs))
                # Of several checkpoints of a run, one after the other in its cell.
                cell = f"{text} at step {result['step']}"
                if result["seen"]:
                    cell += f" ({result['seen']} of the rows were trained on)"
                line[index] = cell if line[index] is None else f"{line[index]}; {cell}"
    return [(f"eval: {name} ({about})", line) for (name, about, _), line in lines.items()]


def _losses_text(result: dict[str, Any]) -> str:
    losses = result["losses"]
    text = f"{losses['tuned']:.4f}" if "tuned" in losses else "not finite"
    return f"{text}, base {losses['base']:.4f}" if "base" in losses else text


def _scores_text(intervals: dict[str, Any]) -> str:
    """`62.0 % (52.1 to 71.3), base 50.0 % (...): +12.0 points (+4.0 to +20.1)`."""
    text = _share_text(intervals["tuned"])
    if "base" in intervals:
        text += f", base {_share_text(intervals['base'])}"
    if "difference" in intervals:
        mean, low, high = (f"{100 * value:+.1f}" for value in intervals["difference"])
        text += f": {mean} points ({low} to {high})"
    return text


def _share_text(interval: Sequence[float]) -> str:
    mean, low, high = (100 * value for value in interval)
    return f"{mean:.1f} % ({low:.1f} to {high:.1f})"


def validation_noise(val_losses: Sequence[float]) -> float | None:
    """The standard deviation of a curve's second half around its trend; None from fewer than 5
    points.

    Of independent noise a third difference has 20 times the variance; a parabola has none, so that
    the bend of a curve that still falls does not count as noise.
    """
    differences = list(val_losses[-max(5, len(val_losses) // 2) :])
    if len(differences) < 5:
        return None
    for _ in range(3):
        differences = [b - a for a, b in pairwise(differences)]
    return math.sqrt(fmean(value * value for value in differences) / 20)


class KeyDifference(NamedTuple):
    """A key that is not the same in all runs; `learns`: whether it changes what is learned."""

    key: str
    values: list[Any]
    learns: bool


def differing_keys(runs: Sequence[RunSummary]) -> list[KeyDifference]:
    """The keys of the recipes that differ, those that change what is learned first; the output
    folder is left out."""
    recipes = [leaves(run.files.recipe) for run in runs]
    names = dict.fromkeys(key for recipe in recipes for key in recipe if key != "output_dir")
    differing = []
    for key in names:
        values = [recipe.get(key) for recipe in recipes]
        if any(value != values[0] for value in values):
            differing.append(KeyDifference(key, values, not is_free(key)))
    return sorted(differing, key=lambda difference: not difference.learns)


class Verdict(NamedTuple):
    """Which run is better, in words. `kind`: better | equal | none | alone; `best`: its runs, by
    index."""

    kind: str
    headline: str
    reasons: list[str]
    best: tuple[int, ...] = ()


class RunGroup(NamedTuple):
    """Runs of one recipe, which differ in the seed at most, and their lowest val_loss."""

    runs: list[RunSummary]
    val_loss: Spread

    @property
    def name(self) -> str:
        return " and ".join(run.label for run in self.runs)

    def __str__(self) -> str:
        if len(self.runs) == 1:
            return f"{self.val_loss.mean:.4f}"
        return f"{self.val_loss.mean:.4f} ± {self.val_loss.deviation:.4f}"


def judge(runs: Sequence[RunSummary]) -> Verdict:
    """Which run is better, and why, or why that cannot be said.

    It cannot where fewer than two runs have a val_loss, where they measured it on other rows or on
    rows that are not known, while one still trains, and where the noise of the measure is not
    known.
    """
    if len(runs) == 1:
        return _alone(runs[0])
    measured = [run for run in runs if run.best]
    absent = [f"{run.label} has no val_loss ({run.files.state})." for run in runs if not run.best]
    # A comparison needs two runs that were validated.
    if len(measured) < 2:
        why = (
            "A training loss is measured on the rows that are being learned: "
            "it does not tell which model is better."
        )
        fix = "Give the recipes the same held-out rows: data.validation, or data.hold_out: 5 %."
        return Verdict("none", "Which is better cannot be said", [*absent, why, fix])
    obstacle = _different_losses(measured) or _different_rows(measured)
    if obstacle is not None:
        return obstacle

    ranking = _rank(measured)
    first = ranking[0]
    cautions = [*absent, *_cautions(measured, first)]
    # One group: all runs learned from the same recipe.
    if len(ranking) == 1:
        seeds = len({run.seed for run in measured})
        plural = "s" if seeds > 1 else ""
        headline = "One recipe: the difference is the seed's or the machine's"
        why = (
            f"These are {len(measured)} runs of one recipe with {seeds} seed{plural}: "
            f"val_loss {first}."
        )
        return Verdict("equal", headline, [why, *cautions])
    verdict = _compare_groups(ranking, cautions)
    # The winner's runs, by their place in the report.
    if verdict.kind == "better":
        best = tuple(i for i, run in enumerate(runs) if run in first.runs)
        return verdict._replace(best=best)
    return verdict


def _compare_groups(ranking: Sequence[RunGroup], cautions: Sequence[str]) -> Verdict:
    """The verdict on the first two of several recipes."""
    first, second = ranking[:2]
    gap = second.val_loss.mean - first.val_loss.mean
    threshold, noise = _noise(ranking)
    reasons = [_difference(first.runs[0], second.runs[0]), f"{gap:.4f} apart. {noise}", *cautions]
    against = f"lowest val_loss {first} against {second} of {second.name}"
    # A run that goes on may still change places.
    if any(run.files.state == "running" for run in (*first.runs, *second.runs)):
        return Verdict("none", f"So far {first.name} is ahead: {against}", reasons)
    if threshold is None:
        chance = "how far runs differ by chance is not known"
        headline = f"{first.name} has the lower val_loss, but {chance}: {against}"
        return Verdict("none", headline, reasons)
    if gap <= threshold:
        return Verdict("equal", f"No difference that can be told from noise: {against}", reasons)
    is_are = "is" if len(first.runs) == 1 else "are"
    return Verdict("better", f"{first.name} {is_are} better: {against}", reasons)


def _alone(run: RunSummary) -> Verdict:
    headline = f"{run.label}: {run.files.state} at step {run.steps}"
    if not run.best:
        fix = "Without held-out rows nothing tells how good the model is: data.hold_out: 5 %."
        return Verdict("alone", f"{headline}, without a val_loss", [fix])
    start, first_loss = run.validations[0]
    lowest, step = run.best
    return Verdict(
        "alone",
        f"{headline}, lowest val_loss {lowest:.4f} at step {step}",
        [f"The first one was {first_loss:.4f} at step {start}.", *_cautions([run], None)],
    )


def _different_losses(measured: Sequence[RunSummary]) -> Verdict | None:
    """The verdict on runs whose methods have another loss each; None if they have one."""
    methods = {run.label: run.method for run in measured}
    if len(set(methods.values())) == 1:
        return None
    names = [f"{label}: {method}" for label, method in methods.items()]
    why = f"The methods differ: {', '.join(names)}."
    fix = "Compare their answers: tunesmith eval RUN --data held-out.jsonl, on the same rows."
    return Verdict("none", "Not comparable: val_loss is another loss in each", [why, fix])


def _different_rows(measured: Sequence[RunSummary]) -> Verdict | None:
    """The verdict on runs whose val_loss was not measured on the same rows; None if it was."""
    rows = {(run.validation_hash, run.max_examples) for run in measured}
    if len(rows) == 1 and measured[0].validation_hash:
        return None
    headline = "Not comparable: it is not known what val_loss was measured on"
    if all(run.validation_hash for run in measured):
        headline = "Not comparable: val_loss was measured on different rows"
    hashes = [f"{run.label}: {str(run.validation_hash or 'unknown')[:12]}" for run in measured]
    counts = [f"{run.label}: {run.max_examples or 'all'}" for run in measured]
    why = f"Hash of the held-out rows: {', '.join(hashes)}; taken of them: {', '.join(counts)}."
    fix = "Measure each on the same rows: tunesmith eval RUN --data held-out.jsonl."
    return Verdict("none", headline, [why, fix])


def _rank(measured: Sequence[RunSummary]) -> list[RunGroup]:
    """The runs by recipe, those with the lowest val_loss first."""
    by_recipe: dict[str, list[RunSummary]] = {}
    for run in measured:
        # Runs with the same keys that change what is learned differ by seed alone.
        by_recipe.setdefault(json.dumps(run.learned, sort_keys=True), []).append(run)
    groups = []
    for runs in by_recipe.values():
        val_loss = Spread.from_values([run.best[0] for run in runs if run.best])
        if val_loss:
            groups.append(RunGroup(runs, val_loss))
    return sorted(groups, key=lambda group: group.val_loss.mean)


def _noise(ranking: Sequence[RunGroup]) -> tuple[float | None, str]:
    """The difference between the first two above which it counts, and where it is from; None where
    that is not known."""
    # Several seeds of a recipe tell its noise better than one run can.
    repeated = [group.val_loss for group in ranking if group.val_loss.count > 1]
    if repeated:
        return _seed_noise(repeated, ranking[0].val_loss, ranking[1].val_loss)
    run = ranking[0].runs[0]
    seed = (run.seed if run.seed is not None else 42) + 1
    recipe = shell_path(shown(run.files.folder / RECIPE))
    output = shell_path(shown(f"{run.files.folder}-seed-{seed}"))
    command = f"tunesmith train {recipe} train.seed={seed} output_dir={output}"
    advice = f"Each has one seed, and another one moves val_loss too; to see how far: `{command}`"
    noises = []
    for group in ranking[:2]:
        noise = validation_noise(group.runs[0].val_losses)
        if noise is not None:
            noises.append(noise)
    if not noises:
        text = "There are too few validations to see how val_loss moves from one to the next."
        return None, f"{text} {advice}"
    noise = max(noises)
    # The difference of two values of the same noise.
    threshold = STANDARD_ERRORS * math.sqrt(2) * noise
    text = f"Noise: from one validation to the next val_loss moves by {noise:.4f} around its trend"
    return threshold, f"{text}; a difference counts above {threshold:.4f}. {advice}"


def _seed_noise(repeated: Sequence[Spread], first: Spread, second: Spread) -> tuple[float, str]:
    """The same from the recipes that ran with several seeds."""
    # The pooled variance: each recipe around its own mean.
    freedom = sum(val_loss.count - 1 for val_loss in repeated)
    squares = sum(val_loss.deviation**2 * (val_loss.count - 1) for val_loss in repeated)
    deviation = math.sqrt(squares / freedom)
    # With few seeds Student's factor is larger than that of the normal distribution.
    errors = STUDENT[freedom - 1] if freedom <= len(STUDENT) else STANDARD_ERRORS
    threshold = errors * deviation * math.sqrt(1 / first.count + 1 / second.count)
    return threshold, (
        f"Noise: from seed to seed val_loss differs by {deviation:.4f} "
        "(standard deviation over a recipe's seeds); "
        f"once in 20 times seeds alone make a difference above {threshold:.4f}."
    )


def _difference(first: RunSummary, second: RunSummary) -> str:
    """What two runs differ in, and what follows; and their val_loss after the same steps, if they
    took unequal ones."""
    # What differs -> how.
    differences = {}
    for difference in differing_keys([first, second]):
        if difference.learns:
            values = " against ".join(json.dumps(value) for value in difference.values)
            differences[f"`{difference.key}`"] = f" ({values})"
    for key, name in HASHES_OF_INPUTS.items():
        if first.files.env.get(key) != second.files.env.get(key):
            differences[name] = ""
    names = list(differences)
    text = "Their recipes differ in nothing that changes what is learned."
    if len(names) == 1:
        text = f"They differ in {names[0]}{differences[names[0]]} alone."
    elif names:
        listed = ", ".join(names[:4])
        if len(names) > 4:
            listed += ", ..."
        text = (
            f"They differ in {len(names)} things ({listed}): "
            "which of them did it, this comparison cannot say."
        )
    first_losses = dict(first.validations)
    second_losses = dict(second.validations)
    # Unequal runs are compared at a step that both have reached.
    common_steps = first_losses.keys() & second_losses.keys()
    if first.steps != second.steps and common_steps:
        step = max(common_steps)
        text += (
            f" After step {step}, the last that both were measured at: "
            f"{first_losses[step]:.4f} against {second_losses[step]:.4f}."
        )
    return text


def _clearly_lower(first: Spread, second: Spread) -> bool:
    error = math.sqrt(first.deviation**2 / first.count + second.deviation**2 / second.count)
    return first.mean + STANDARD_ERRORS * error < second.mean


def _cautions(runs: Sequence[RunSummary], first: RunGroup | None) -> list[str]:
    """What a reader should know before believing the verdict."""
    cautions = []
    for run in runs:
        if not run.best:
            continue
        lowest, step = run.best
        last = run.val_losses[-1]
        noise = validation_noise(run.val_losses) or 0.0
        # Above its lowest by more than noise.
        if last > lowest + STANDARD_ERRORS * noise and last > lowest:
            cautions.append(
                f"{run.label} ends at val_loss {last:.4f}, "
                f"above that of step {step}, whose checkpoint is kept."
            )
    unfinished = [
        f"{run.label} ({run.files.state} at step {run.steps})"
        for run in runs
        if run.files.state != "finished"
    ]
    if unfinished:
        cautions.append(
            f"Not at their end: {', '.join(unfinished)}. Their val_loss might go on falling."
        )
    if first is None:
        return cautions
    best_loss = first.runs[0].loss
    for run in runs:
        if run in first.runs or not run.loss or not best_loss:
            continue
        if _clearly_lower(run.loss, best_loss):
            cautions.append(
                f"{run.label} has the lower training loss: "
                "it fits its own rows better, not those held out."
            )
            break
    tokens = [run.tokens for run in runs]
    # More tokens are more training, whatever the recipe.
    if max(tokens) > (1 + TOKEN_GAP) * min(tokens):
        amounts = ", ".join(f"{run.label} {run.tokens:,.0f}" for run in runs)
        cautions.append(f"They learned from unequal numbers of tokens: {amounts}.")
    if len({run.machine for run in runs}) > 1:
        cautions.append(
            "Machines, threads or versions of torch differ: speed and memory are not comparable."
        )
    return cautions
