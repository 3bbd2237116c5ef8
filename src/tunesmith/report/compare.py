"""What runs show side by side: figures with their spread, differing keys, and which is better where that can be said.

val_loss decides, and only on the same held-out rows; a training loss never does. A difference counts above the noise: what
seeds alone would exceed once in 20, where several runs share a recipe; else how far val_loss moves around its own trend.
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
from tunesmith.report.run_files import RunFiles, known
from tunesmith.run_dir import RECIPE, shown

NOISES = 2.0  # standard errors above which a difference counts: about 95 % of a normal distribution
# The same of Student's t, from 1 degree of freedom.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
APART = 0.02  # relative difference of the tokens learned from that is worth a sentence


@dataclass(frozen=True)
class Spread:
    """A mean, the standard deviation of what it is a mean of, and their number."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float], mean: float | None = None) -> "Spread | None":
        """None without values; `mean`: a weighted one in place of the plain one."""
        if not values:
            return None
        deviation = stdev(values) if len(values) > 1 else 0.0
        return cls(fmean(values) if mean is None else mean, deviation, len(values))


@dataclass
class RunSummary:
    """The figures of one run; what was not measured is None."""

    files: RunFiles
    label: str
    steps: int = 0
    tokens: float = 0.0
    seconds: float = 0.0  # of the recorded steps
    validations: list[tuple[int, float]] = field(default_factory=list)  # (step, val_loss)
    best: tuple[float, int] | None = None  # the lowest val_loss and its step
    loss: Spread | None = None  # training loss of the last steps
    speed: Spread | None = None  # tokens per second without the first step, which compiles
    mfu: float | None = None
    waiting: float | None = None  # share of the time spent waiting for data
    memory_gib: float | None = None

    @property
    def validated_on(self) -> tuple[Any, Any]:
        """What a val_loss was measured on: the hash of the held-out rows as tokens, and how many of them."""
        few = (self.files.recipe.get("validate") or {}).get("max_examples")
        return self.files.env.get("validation_hash"), few

    @property
    def seed(self) -> int | None:
        seed: int | None = (self.files.recipe.get("train") or {}).get("seed")
        return seed

    @property
    def learned(self) -> dict[str, Any]:
        """The keys of the recipe that change what is learned, without the seed."""
        return {
            k: v
            for k, v in leaves(self.files.recipe).items()
            if k != "train.seed" and not is_free(k)
        }

    @property
    def machine(self) -> str:
        """What the speed depends on beside the recipe: processor, GPUs, threads, torch."""
        env = self.files.env
        return json.dumps(
            [env.get(name) for name in ("cpu", "cpu_threads", "gpus", "torch", "hosts")]
        )


def summaries_of(runs: Sequence[RunFiles]) -> list[RunSummary]:
    """The figures of each run; runs of one name are labelled by their folder."""
    names = [run.name for run in runs]
    return [
        _summarize(run, run.name if names.count(run.name) == 1 else shown(run.folder))
        for run in runs
    ]


def _summarize(run: RunFiles, label: str) -> RunSummary:
    def column(name: str) -> list[float | None]:
        return run.columns.get(name) or [None] * len(run.columns.get("step", ()))

    def total(name: str, start: int = 0) -> float:
        return sum(known(column(name)[start:]))

    steps, losses, val = column("step"), known(column("loss")), column("val_loss")
    found = RunSummary(
        run, label, int((steps or [0])[-1] or 0), total("tokens"), total("step_seconds")
    )
    found.validations = [
        (int(s or 0), v) for s, v in zip(steps, val, strict=True) if known([v]) and v is not None
    ]
    found.best = min(((v, s) for s, v in found.validations), default=None)
    found.loss = Spread.of(
        losses[-max(min(10, len(losses)), len(losses) // 10) :] if losses else []
    )
    start = 1 if len(steps) > 1 else 0
    if seconds := total("step_seconds", start):
        found.speed = Spread.of(
            known(column("tokens_per_second")[start:]), total("tokens", start) / seconds
        )
        found.waiting = total("data_seconds", start) / seconds
        shares = [
            (m, s)
            for m, s in zip(column("mfu")[start:], column("step_seconds")[start:], strict=True)
            if m and s
        ]
        found.mfu = sum(m * s for m, s in shares) / sum(s for _, s in shares) if shares else None
    found.memory_gib = max(known(column("memory_gib")), default=None)
    return found


def wobble(values: Sequence[float]) -> float | None:
    """The standard deviation of a curve's second half around its trend; None from fewer than 5 points.

    Of independent noise a third difference has 20 times the variance; a parabola has none, so that the bend of a curve that
    still falls does not count as noise.
    """
    rest = list(values[-max(5, len(values) // 2) :])
    if len(rest) < 5:
        return None
    for _ in range(3):
        rest = [b - a for a, b in pairwise(rest)]
    return math.sqrt(fmean(value * value for value in rest) / 20)


class KeyDifference(NamedTuple):
    """A key that is not the same in all runs; `learns`: whether it changes what is learned."""

    key: str
    values: list[Any]
    learns: bool


def differing_keys(runs: Sequence[RunSummary]) -> list[KeyDifference]:
    """The keys of the recipes that differ, those that change what is learned first; the output folder is left out."""
    every = [leaves(run.files.recipe) for run in runs]
    names = dict.fromkeys(key for one in every for key in one if key != "output_dir")
    found = [KeyDifference(key, [one.get(key) for one in every], not is_free(key)) for key in names]
    found = [one for one in found if any(value != one.values[0] for value in one.values)]
    return sorted(found, key=lambda one: not one.learns)


class Verdict(NamedTuple):
    """Which run is better, in words. `kind`: better | equal | none | alone; `best`: its runs, by index."""

    kind: str
    headline: str
    reasons: list[str]
    best: tuple[int, ...] = ()


class Contender(NamedTuple):
    """Runs of one recipe, which differ in the seed at most, and their lowest val_loss."""

    runs: list[RunSummary]
    score: Spread

    @property
    def name(self) -> str:
        return " and ".join(run.label for run in self.runs)

    def __str__(self) -> str:
        return f"{self.score.mean:.4f}" + f" ± {self.score.deviation:.4f}" * (len(self.runs) > 1)


def judge(runs: Sequence[RunSummary]) -> Verdict:
    """Which run is better, and why, or why that cannot be said."""
    if len(runs) == 1:
        return _alone(runs[0])
    measured = [run for run in runs if run.best]
    absent = [f"{run.label} has no val_loss ({run.files.state})" for run in runs if not run.best]
    if len(measured) < 2:
        why = "A training loss is measured on the rows that are being learned: it does not tell which model is better."
        fix = "Give the recipes the same held-out rows: data.validation, or data.hold_out: 5 %."
        return Verdict(
            "none", "Which is better cannot be said", [*(f"{text}." for text in absent), why, fix]
        )
    if len({run.validated_on for run in measured}) > 1 or not measured[0].files.env.get(
        "validation_hash"
    ):
        on = [
            f"{run.label}: {str(run.files.env.get('validation_hash') or 'unknown')[:12]}"
            for run in measured
        ]
        few = [f"{run.label}: {run.validated_on[1] or 'all'}" for run in measured]
        why = f"Hash of the held-out rows: {', '.join(on)}; taken of them: {', '.join(few)}."
        fix = "Measure each on the same rows: tunesmith eval RUN --data held-out.jsonl."
        told = all(run.validated_on[0] for run in measured)
        rows = (
            "val_loss was measured on different rows"
            if told
            else "it is not known what val_loss was measured on"
        )
        return Verdict("none", f"Not comparable: {rows}", [why, fix])
    groups: dict[str, list[RunSummary]] = {}
    for run in measured:
        groups.setdefault(json.dumps(run.learned, sort_keys=True), []).append(run)
    scored = (
        (group, Spread.of([run.best[0] for run in group if run.best])) for group in groups.values()
    )
    ranking = sorted(
        (Contender(group, score) for group, score in scored if score), key=lambda c: c.score.mean
    )
    first = ranking[0]
    best = tuple(i for i, run in enumerate(runs) if run in first.runs)
    more = [*(f"{text}." for text in absent), *_cautions(measured, first)]
    if len(ranking) == 1:
        seeds = len({run.seed for run in measured})
        why = f"These are {len(measured)} runs of one recipe with {seeds} seed{'s' * (seeds > 1)}: val_loss {first}."
        return Verdict(
            "equal", "One recipe: the difference is the seed's or the machine's", [why, *more]
        )
    second = ranking[1]
    gap, (least, noise) = second.score.mean - first.score.mean, _noise(ranking)
    against = f"lowest val_loss {first} against {second} of {second.name}"
    if any(run.files.state == "running" for run in (*first.runs, *second.runs)):
        kind, headline = "none", f"So far {first.name} is ahead: {against}"
    elif least is None:
        kind, headline = (
            "none",
            f"{first.name} has the lower val_loss, and the noise is not known: {against}",
        )
    elif gap <= least:
        kind, headline = "equal", f"No difference that can be told from noise: {against}"
    else:
        kind, headline = (
            "better",
            f"{first.name} {'is' if len(first.runs) == 1 else 'are'} better: {against}",
        )
    reasons = [_difference(first.runs[0], second.runs[0]), f"{gap:.4f} apart. {noise}", *more]
    return Verdict(kind, headline, reasons, best if kind == "better" else ())


def _alone(run: RunSummary) -> Verdict:
    if not run.best:
        fix = "Without held-out rows nothing tells how good the model is: data.hold_out: 5 %."
        return Verdict(
            "alone",
            f"{run.label}: {run.files.state} at step {run.steps}, without a val_loss",
            [fix],
        )
    (start, at), (value, step) = run.validations[0], run.best
    headline = f"{run.label}: {run.files.state} at step {run.steps}, lowest val_loss {value:.4f} at step {step}"
    return Verdict(
        "alone", headline, [f"The first one was {at:.4f} at step {start}.", *_cautions([run], None)]
    )


def _noise(ranking: Sequence[Contender]) -> tuple[float | None, str]:
    """The difference between the first two above which it counts, and where it is from; None where that is not known."""
    first, second = ranking[:2]
    if repeated := [one.score for one in ranking if one.score.count > 1]:
        freedom = sum(score.count - 1 for score in repeated)
        deviation = math.sqrt(
            sum(score.deviation**2 * (score.count - 1) for score in repeated) / freedom
        )
        times = STUDENT[freedom - 1] if freedom <= len(STUDENT) else NOISES
        least = times * deviation * math.sqrt(1 / first.score.count + 1 / second.score.count)
        seeds = f"from seed to seed val_loss differs by {deviation:.4f} (standard deviation over a recipe's seeds)"
        return (
            least,
            f"Noise: {seeds}; once in 20 times seeds alone make a difference above {least:.4f}.",
        )
    run = first.runs[0]
    folder = run.files.folder
    seed = (run.seed if run.seed is not None else 42) + 1
    recipe, output = shell_path(shown(folder / RECIPE)), shell_path(shown(f"{folder}-seed-{seed}"))
    again = f"tunesmith train {recipe} train.seed={seed} output_dir={output}"
    once = f"Each has one seed, and another one moves val_loss too; to see how far: `{again}`"
    found = [
        w
        for one in (first, second)
        if (w := wobble([v for _, v in one.runs[0].validations])) is not None
    ]
    if not found:
        return (
            None,
            f"There are too few validations to see how val_loss moves from one to the next. {once}",
        )
    least = NOISES * math.sqrt(2) * max(found)
    text = f"Noise: from one validation to the next val_loss moves by {max(found):.4f} around its trend"
    return least, f"{text}; a difference counts above {least:.4f}. {once}"


def _difference(one: RunSummary, other: RunSummary) -> str:
    """What two runs differ in, and what follows; and their val_loss after the same steps, if they took unequal ones."""
    learned = [found for found in differing_keys([one, other]) if found.learns]
    keys = {
        f"`{key}`": " ({} against {})".format(*map(json.dumps, values))
        for key, values, _ in learned
    }
    others = {"data_hash": "the training rows", "model_hash": "the base's weights"}
    keys |= {
        name: ""
        for key, name in others.items()
        if one.files.env.get(key) != other.files.env.get(key)
    }
    text = "Their recipes differ in nothing that changes what is learned."
    if len(keys) == 1:
        text = "They differ in {}{} alone.".format(*next(iter(keys.items())))
    elif keys:
        listed = ", ".join([*keys][:4]) + ", ..." * (len(keys) > 4)
        text = f"They differ in {len(keys)} things ({listed}): which of them did it, this comparison cannot say."
    mine, its = dict(one.validations), dict(other.validations)
    if one.steps != other.steps and (both := mine.keys() & its.keys()):
        step = max(both)
        text += f" After step {step}, the last that both were measured at: {mine[step]:.4f} against {its[step]:.4f}."
    return text


def _clearly_lower(one: Spread, other: Spread) -> bool:
    error = math.sqrt(one.deviation**2 / one.count + other.deviation**2 / other.count)
    return one.mean + NOISES * error < other.mean


def _cautions(runs: Sequence[RunSummary], first: Contender | None) -> list[str]:
    """What a reader should know before believing the verdict."""
    said = []
    for run in runs:
        value, step = run.best or (0.0, 0)
        last = run.validations[-1][1] if run.validations else value
        if (
            last > value + NOISES * (wobble([v for _, v in run.validations]) or 0.0)
            and last > value
        ):
            text = f"{run.label} ends at val_loss {last:.4f}"
            said.append(f"{text}, above that of step {step}, whose checkpoint is kept.")
    early = [run for run in runs if run.files.state != "finished"]
    if told := ", ".join(f"{run.label} ({run.files.state} at step {run.steps})" for run in early):
        said.append(f"Not at their end: {told}. Their val_loss might go on falling.")
    if first is None:
        return said
    winner, others = first.runs[0].loss, [run for run in runs if run not in first.runs]
    if lower := [run for run in others if run.loss and winner and _clearly_lower(run.loss, winner)]:
        said.append(
            f"{lower[0].label} has the lower training loss: it fits its own rows better, not those held out."
        )
    if max(run.tokens for run in runs) > (1 + APART) * min(run.tokens for run in runs):
        amounts = ", ".join(f"{run.label} {run.tokens:,.0f}" for run in runs)
        said.append(f"They learned from unequal numbers of tokens: {amounts}.")
    if len({run.machine for run in runs}) > 1:
        said.append(
            "Machines, threads or versions of torch differ: speed and memory are not comparable."
        )
    return said
