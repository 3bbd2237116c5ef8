"""What runs show side by side: numbers with their spread, differing keys, and which is better where
that can be said.

val_loss decides, and only on the same held-out rows; a training loss never does. Of methods that
compare answers it is the share of held-out pairs in order: as `eval` measured it, or as training
did. A difference counts above the noise: what seeds alone would exceed once in 20, where several
runs share a recipe; else the interval of what `eval` measured row by row, what so many pairs tell
apart, or how far val_loss moves around its own trend.
"""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

from tunesmith.config.dump import is_free, leaves
from tunesmith.data.schedule import FEW_STEPS
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.metrics.summary import has_risen
from tunesmith.report.measure import VAL_LOSS, Measure, measure_of
from tunesmith.report.run_summary import (
    HASHES_OF_INPUTS,
    RunSummary,
    Spread,
    changes_learning,
)
from tunesmith.run_dir import RECIPE, RunState, shown
from tunesmith.scoring.intervals import loss_sentence, paired_losses
from tunesmith.units import count_of

# Standard errors above which a difference counts: about 95 % of a normal distribution.
STANDARD_ERRORS = 2.0
# The same of Student's t, from 1 degree of freedom.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
TOKEN_GAP = 0.02  # relative difference of the tokens learned from that is worth a sentence
FEWEST_VALIDATIONS = 5  # whose moves tell the noise
SHORT_SHOWN = 3  # runs of few steps, or recipes that are worse, that are named


def eval_figures(runs: Sequence[RunSummary]) -> list[tuple[str, list[str | None]]]:
    """What `eval` measured: a label, and a cell for each run, None where it did not.

    Runs share a line where they answered the same rows: not the file's name decides, but the rows.
    """
    lines: dict[tuple[str, str], list[str | None]] = {}
    labels: dict[tuple[str, str], str] = {}
    for index, run in enumerate(runs):
        for result in run.files.evals:
            about = f"{result['data']}, {result['rows']} rows"
            cells = {}
            if result["losses"] is not None:
                cells["loss"] = _losses_text(result)
            for scorer, intervals in result["scores"].items():
                cells[scorer] = _scores_text(intervals)
            for name, text in cells.items():
                row_hash = result["row_hash"]
                if name == "loss" and result["row_losses"]:
                    row_hash = result["row_losses"]["row_hash"]
                # The same rows, by their hash, share a line; rows of the same name may differ.
                key = (name, row_hash)
                if key not in labels:
                    label = f"eval: {name} ({about})"
                    is_other = label in labels.values()
                    labels[key] = f"{label}, {row_hash[:8]}" if is_other else label
                line = lines.setdefault(key, [None] * len(runs))
                # Of several checkpoints of a run, one after the other in its cell.
                cell = f"{text} at step {result['step']}"
                if result["seen"]:
                    cell += f" ({result['seen']} of the rows were trained on)"
                earlier_cell = line[index]
                # A loss is in the file of the scores too: shown once.
                if earlier_cell is None:
                    line[index] = cell
                elif cell not in earlier_cell.split("; "):
                    line[index] = f"{earlier_cell}; {cell}"
    return [(labels[key], line) for key, line in lines.items()]


def _losses_text(result: dict[str, Any]) -> str:
    """`1.2500 (1.1000 to 1.4000), base 1.5000: -0.2500 (-0.3000 to -0.2000)`, without the intervals
    where the losses of the rows are not there, or too few."""
    losses = result["losses"]
    rows = result["row_losses"] or {}
    if "tuned" not in losses:
        text = "not finite"
    else:
        text = f"{losses['tuned']:.4f}"
        if rows:
            of_rows = paired_losses([0.0] * len(rows["tuned"]), rows["tuned"], rows["tokens"])
            if of_rows.interval is not None:
                _, low, high = of_rows.interval
                low = max(low, 0.0)  # no loss is below
                text += f" ({low:.4f} to {high:.4f})"
    if "base" not in losses:
        return text
    text += f", base {losses['base']:.4f}"
    if rows.get("base"):
        difference = paired_losses(rows["base"], rows["tuned"], rows["tokens"]).interval
        if difference is not None:
            mean, low, high = difference
            text += f": {mean:+.4f} ({low:+.4f} to {high:+.4f})"
    return text


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
    """The standard deviation of a curve's second half around its trend; None from fewer than
    FEWEST_VALIDATIONS.

    Of independent noise a third difference has 20 times the variance; a parabola has none, so that
    the bend of a curve that still falls does not count as noise.
    """
    count = max(FEWEST_VALIDATIONS, len(val_losses) // 2)
    differences = list(val_losses[-count:])
    if len(differences) < FEWEST_VALIDATIONS:
        return None
    for _ in range(3):
        differences = [b - a for a, b in pairwise(differences)]
    return math.sqrt(fmean(value * value for value in differences) / 20)


class KeyDifference(NamedTuple):
    """A key that is not the same in all runs; `learns`: whether it changes what is learned."""

    key: str
    values: list[Any]
    learns: bool

    @property
    def values_text(self) -> str:
        """`1e-4 against 1e-3`, each value once."""
        return " against ".join(dict.fromkeys(map(json.dumps, self.values)))


def differing_keys(runs: Sequence[RunSummary]) -> list[KeyDifference]:
    """The keys of the recipes that differ, those that change what is learned first; the output
    folder is left out."""
    recipes = [leaves(run.files.recipe | {"method": run.method_keys}) for run in runs]
    names = dict.fromkeys(key for recipe in recipes for key in recipe if key != "output_dir")
    differing = []
    for key in names:
        # An empty section is told by the keys that another run has there.
        if any(name.startswith(f"{key}.") for name in names):
            continue
        values = [recipe.get(key) for recipe in recipes]
        if any(value != values[0] for value in values):
            differing.append(KeyDifference(key, values, changes_learning(key, runs)))
    return sorted(differing, key=lambda difference: not difference.learns)


class RunDifference(NamedTuple):
    """How far the second of two runs is behind the first, in the unit of `measure` (of accuracies a
    share); it counts above `threshold`, None where the noise is not known."""

    measure: str
    first: str
    second: str
    gap: float
    threshold: float | None


class Verdict(NamedTuple):
    """Which run is better, in words. `kind`: better | equal | none | alone; `best`: its runs, by
    index; `difference`: of the two recipes in the headline."""

    kind: str
    headline: str
    reasons: list[str]
    best: tuple[int, ...] = ()
    difference: RunDifference | None = None


class Noise(NamedTuple):
    """The difference between two runs above which it counts.

    Attributes:
        threshold: None where it is not known.
        text: where it is from, and how to learn more.
        tells_of_rows: other rows like these are covered; the course of one loss does not tell how
            much rows differ.
    """

    threshold: float | None
    text: str
    tells_of_rows: bool = True


class RunGroup(NamedTuple):
    """Runs of one recipe, which differ in the seed at most, and their best values."""

    runs: list[RunSummary]
    measure: Measure
    best: Spread

    @property
    def name(self) -> str:
        return " and ".join(run.label for run in self.runs)

    @property
    def is_are(self) -> str:
        return "is" if len(self.runs) == 1 else "are"

    def __str__(self) -> str:
        text = self.measure.text(self.best.mean)
        if len(self.runs) == 1:
            return text
        return f"{text} ± {self.measure.gap_text(self.best.deviation)}"


def judge(runs: Sequence[RunSummary]) -> Verdict:
    """Which run is better, and why, or why that cannot be said; and cautions about the
    runs whatever the verdict.
    """
    verdict = _judge(runs)
    return verdict._replace(reasons=[*verdict.reasons, *_few_steps(runs)])


def _judge(runs: Sequence[RunSummary]) -> Verdict:
    """Which run is better, and why, or why that cannot be said.

    It cannot where fewer than two runs were measured on held-out rows, where these are other rows
    or not known, while one still trains, and where the noise of the measure is not known.
    """
    measure = measure_of(runs)
    if len(runs) == 1:
        return _alone(runs[0], measure)
    measured = [run for run in runs if measure.best(run)]
    absent = []
    for run in runs:
        if run not in measured:
            absent.append(f"{run.label} has no {measure.name} ({run.files.state}).")
    # A comparison needs two runs that were validated.
    if len(measured) < 2:
        why = (
            "A training loss is measured on the training rows: "
            "it does not show which model is better."
        )
        fix = "Use the same held-out rows in the recipes: data.validation, or data.hold_out: 5 %."
        return Verdict("none", "It is unclear which is better", [*absent, why, fix])
    obstacle = _different_losses(measured, measure) or _different_rows(measured, measure)
    if obstacle is not None:
        return obstacle

    ranking = _rank(measured, measure)
    first = ranking[0]
    cautions = [*absent, *_cautions(measured, first, measure)]
    # One group: all runs learned from the same recipe.
    if len(ranking) == 1:
        return _one_recipe(first, measured, cautions)
    verdict = _compare_groups(ranking, cautions)
    # The winner's runs, by their place in the report.
    if verdict.kind == "better":
        best = tuple(i for i, run in enumerate(runs) if run in first.runs)
        return verdict._replace(best=best)
    return verdict


def _one_recipe(
    group: RunGroup, measured: Sequence[RunSummary], cautions: Sequence[str]
) -> Verdict:
    """The verdict on runs of one recipe, of which `group` has those that are comparable."""
    name = group.measure.name
    without_effect = _keys_without_effect(measured)
    if len(group.runs) > 1:
        seeds = count_of(len({run.seed for run in group.runs}), "seed")
        headline = "One recipe: the difference is the seed's or the machine's"
        why = f"These are {len(group.runs)} runs of one recipe with {seeds}: {name} {group}."
        return Verdict("equal", headline, [why + without_effect, *cautions])
    (first,) = group.runs
    headline = f"One recipe: only {first.label} is trained as far as step {first.steps}"
    if first.files.state is RunState.FINISHED:
        headline = f"One recipe: only {first.label} has finished"
    why = f"Its {group.measure.best_word} is {group}."
    for run in measured:
        if run is not first:
            why += _at_common_step(first, run, group.measure)
    return Verdict("none", headline, [why + without_effect, *cautions])


def _compare_groups(ranking: Sequence[RunGroup], cautions: Sequence[str]) -> Verdict:
    """The verdict on the first of several recipes and the second, or one further off that cannot be
    told from the first: its rows may vary more."""
    first, second = ranking[:2]
    measure = first.measure
    equal: list[RunGroup] = []
    beaten: list[RunGroup] = []
    for group in ranking[1:]:
        threshold = _noise(ranking, group).threshold
        if threshold is not None:
            gap = measure.worse_by(group.best.mean, than=first.best.mean)
            (equal if gap <= threshold else beaten).append(group)
    if equal:
        second = equal[0]
    gap = measure.worse_by(second.best.mean, than=first.best.mean)
    noise = _noise(ranking, second)
    reasons = [
        _difference(first.runs[0], second.runs[0], measure),
        f"{measure.gap_text(gap)} apart. {noise.text}",
        *cautions,
    ]
    kind, headline = _headline(first, second, gap, noise)
    if kind == "equal" and beaten:
        headline += f"; {first.name} {first.is_are} better than {_names_of(beaten)}"
    name = measure.name.strip(",")
    difference = RunDifference(name, first.name, second.name, gap, noise.threshold)
    return Verdict(kind, headline, reasons, difference=difference)


def _headline(first: RunGroup, second: RunGroup, gap: float, noise: Noise) -> tuple[str, str]:
    """Kind and headline of a verdict on the better and the worse one of two recipes."""
    measure = first.measure
    of_second = f"against {second} of {second.name}"
    against = f"{measure.best_word} {first} {of_second}"
    # A run that goes on, or is resumed, may still change places.
    if any(map(_may_improve, (*first.runs, *second.runs))):
        return "none", f"So far {first.name} leads: {against}"
    if noise.threshold is None:
        chance = "how much runs vary by chance is unknown"
        return "none", f"{first.name} has the {measure.best_word}, but {chance}: {against}"
    if gap <= noise.threshold:
        best = f"{measure.best_word} {first} of {first.name}"
        return "equal", f"No significant difference: {best} {of_second}"
    where = ""
    if not noise.tells_of_rows:
        count = first.runs[0].held_out
        where = f" on {count_of(count, 'held-out row')}" if count else " on these held-out rows"
    return "better", f"{first.name} {first.is_are} better{where}: {against}"


def _names_of(groups: Sequence[RunGroup]) -> str:
    """`a, b`, or of many recipes their number."""
    if len(groups) <= SHORT_SHOWN:
        return ", ".join(group.name for group in groups)
    return f"{len(groups)} others"


def _may_improve(run: RunSummary) -> bool:
    """Whether the run was to train further; a candidate that a sweep has left was not."""
    stopped = run.files.stopped or {}
    is_left = run.files.state is RunState.STOPPED and stopped.get("reason") == "sweep"
    return run.files.state is not RunState.FINISHED and not is_left


def _alone(run: RunSummary, measure: Measure) -> Verdict:
    headline = f"{run.label}: {run.files.described_state}"
    best = measure.best_text(run)
    if best is None:
        fix = "Without held-out rows the quality of the model is unknown: data.hold_out: 5 %."
        if run.validation_hash:
            fix = "It has not been validated yet."
        return Verdict("alone", f"{headline}, without {measure.name}", [fix])
    reasons = _cautions([run], None, measure)
    (start, first_value), *later = measure.values(run)
    if later:
        reasons.insert(0, f"The first one was {measure.text(first_value)} at step {start}.")
    return Verdict("alone", f"{headline}, {measure.best_word} {best}", reasons)


def _different_losses(measured: Sequence[RunSummary], measure: Measure) -> Verdict | None:
    """The verdict on runs whose methods have another loss each; None if they have one, or are not
    compared by it."""
    methods = {run.label: run.method for run in measured}
    if measure.is_share or len(set(methods.values())) == 1:
        return None
    names = [f"{label}: {method}" for label, method in methods.items()]
    why = f"The methods differ: {', '.join(names)}."
    command = _eval_command(measured)
    hashes = {run.validation_hash for run in measured}
    if len(hashes) > 1 or None in hashes:
        command += " --data held-out.jsonl"
    fix = (
        f"Evaluate all on the same pairs, which none was trained on: `{command}`, and create the "
        "report again; or compare their answers, with --score."
    )
    return Verdict("none", "Not comparable: val_loss is a different loss in each", [why, fix])


def _different_rows(measured: Sequence[RunSummary], measure: Measure) -> Verdict | None:
    """The verdict on runs that were not measured on the same rows; None if they were."""
    rows = {measure.rows(run) for run in measured}
    if len(rows) == 1 and None not in rows:
        return None
    headline = f"Not comparable: it is unknown what {measure.name} was measured on"
    if all(run.validation_hash for run in measured):
        headline = f"Not comparable: {measure.name} was measured on different rows"
    hashes = [f"{run.label}: {str(run.validation_hash or 'unknown')[:12]}" for run in measured]
    counts = [f"{run.label}: {run.max_examples or 'all'}" for run in measured]
    why = f"Hash of the held-out rows: {', '.join(hashes)}; taken of them: {', '.join(counts)}."
    sentences = [why, *_draws(measured)]
    command = f"{_eval_command(measured)} --data held-out.jsonl"
    fix = f"Compare them on the same rows: `{command}`."
    return Verdict("none", headline, [*sentences, fix])


def _draws(measured: Sequence[RunSummary]) -> list[str]:
    """A sentence where several seeds have drawn the held-out rows."""
    seeds = [run.hold_out_seed for run in measured]
    if None in seeds or len(set(seeds)) == 1:
        return []
    draws = [f"{run.label}: {run.hold_out_seed}" for run in measured]
    return [
        f"The seeds that drew data.hold_out differ ({', '.join(draws)}); without "
        f"data.hold_out_seed it is train.seed: set data.hold_out_seed={seeds[0]} in all."
    ]


def _rank(measured: Sequence[RunSummary], measure: Measure) -> list[RunGroup]:
    """The runs by recipe, the best first; of a recipe those that finished, or came furthest."""
    by_recipe: dict[str, list[RunSummary]] = {}
    for run in measured:
        # Runs with the same keys that change what is learned differ by seed alone.
        by_recipe.setdefault(json.dumps(run.learned, sort_keys=True), []).append(run)
    groups = []
    for of_recipe in by_recipe.values():
        # A shorter run of a recipe says nothing of its seeds.
        runs = [run for run in of_recipe if not _may_improve(run)]
        if not runs:
            furthest = max(run.steps for run in of_recipe)
            runs = [run for run in of_recipe if run.steps == furthest]
        bests = [best for best in map(measure.best, runs) if best is not None]
        spread = Spread.from_values([value for value, _ in bests])
        if spread:
            groups.append(RunGroup(runs, measure, spread))
    return sorted(groups, key=lambda group: measure.worse_by(group.best.mean, than=0.0))


def _seed_advice(run: RunSummary, measure: Measure) -> str:
    """How to see what another seed changes, and what that is for."""
    seed = (run.seed if run.seed is not None else 42) + 1
    recipe = shell_path(shown(run.files.folder / RECIPE))
    output = shell_path(shown(f"{run.files.folder}-seed-{seed}"))
    keys = f"train.seed={seed}"
    if run.hold_out_seed is not None:
        # Its validation would be of other rows, so not comparable.
        keys += f" data.hold_out_seed={run.hold_out_seed}"
    command = f"tunesmith train {recipe} {keys} output_dir={output}"
    return (
        f"Each has a single seed, and another seed would change {measure.name} too. To see by how "
        f"much, train one again and report it beside these: `{command}`"
    )


def _eval_command(runs: Sequence[RunSummary]) -> str:
    """The command that compares runs row by row."""
    folders = [shell_path(shown(run.files.folder)) for run in runs]
    return f"tunesmith eval {' '.join(folders)}"


def _noise(ranking: Sequence[RunGroup], second: RunGroup) -> Noise:
    """The noise of the difference between the first and the `second`, one of the others."""
    first = ranking[0]
    measure = first.measure
    # Several seeds of a recipe tell its noise better than one run can.
    repeated = [group.best for group in ranking if group.best.count > 1]
    if repeated:
        return _seed_noise(repeated, first.best, second.best, measure)
    advice = _seed_advice(first.runs[0], measure)
    by_row = _noise_of_rows(first, second)
    if by_row is not None:
        threshold, text = by_row
        return Noise(threshold, f"{text}. {advice}")
    if measure is VAL_LOSS and first.runs[0].method == "sft":
        command = _eval_command([first.runs[0], second.runs[0]])
        advice = f"Whether other rows would say the same: `{command}`. {advice}"
    by_span = _noise_of_shares(first, second)
    if by_span is not None:
        threshold, text = by_span
        return Noise(threshold, _threshold_text(text, threshold, measure, advice))
    noises = []
    for group in (first, second):
        noise = validation_noise([value for _, value in measure.values(group.runs[0])])
        if noise is not None:
            noises.append(noise)
    if not noises:
        text = f"It takes {FEWEST_VALIDATIONS} validations to estimate the noise of {measure.name}"
        text += " (validate.every)"
        return Noise(None, f"{text}. {advice}")
    noise = max(noises)
    # The difference of two values of the same noise.
    threshold = STANDARD_ERRORS * math.sqrt(2) * noise
    moves = f"moves by {measure.gap_text(noise)} around its trend"
    text = f"Noise: from one validation to the next {measure.name} {moves}"
    text = _threshold_text(text, threshold, measure, advice)
    return Noise(threshold, text, tells_of_rows=False)


def _noise_of_rows(first: RunGroup, second: RunGroup) -> tuple[float | None, str] | None:
    """The same from the losses of each row; None where a run lacks them, or they show the
    second run ahead."""
    runs = [first.runs[0], second.runs[0]]
    # Of many runs, as those of a sweep, the first two alone may have been evaluated.
    measure = measure_of(runs)
    evals = []
    for run in runs:
        best = measure.best(run)
        evals.append(best and measure.row_losses(run, best[1]))
    better, worse = evals
    if not better or not worse:
        return None
    rows = better["row_losses"]
    difference = paired_losses(worse["row_losses"]["tuned"], rows["tuned"], rows["tokens"])
    if difference.mean > 0:
        return None
    sentence = loss_sentence(difference, first=runs[1].label, second=runs[0].label)
    text = f"Row by row ({better['data']}): {sentence}"
    if difference.interval is None:
        return None, text
    return difference.interval.high - difference.mean, text


def _noise_of_shares(first: RunGroup, second: RunGroup) -> tuple[float, str] | None:
    """The same from the intervals of two shares; None where unknown."""
    higher = first.measure.span(first.runs[0], first.best.mean)
    lower = first.measure.span(second.runs[0], second.best.mean)
    if higher is None or lower is None:
        return None
    # Newcombe's interval of a difference (1998, method 10). Of two models on the same rows it is
    # too wide rather than too narrow.
    threshold = math.hypot(first.best.mean - higher[0], lower[1] - second.best.mean)
    ends = [f"{100 * low:.1f} to {100 * high:.1f} %" for low, high in (higher, lower)]
    return (
        threshold,
        f"Noise: the 95 % intervals for these numbers of pairs are {' and '.join(ends)}",
    )


def _threshold_text(text: str, threshold: float, measure: Measure, advice: str) -> str:
    return f"{text}; a difference counts above {measure.gap_text(threshold)}. {advice}"


def _seed_noise(
    repeated: Sequence[Spread], first: Spread, second: Spread, measure: Measure
) -> Noise:
    """The same from the recipes that ran with several seeds."""
    # The pooled variance: each recipe around its own mean.
    freedom = sum(best.count - 1 for best in repeated)
    squares = sum(best.deviation**2 * (best.count - 1) for best in repeated)
    deviation = math.sqrt(squares / freedom)
    # With few seeds Student's factor is larger than that of the normal distribution.
    errors = STUDENT[freedom - 1] if freedom <= len(STUDENT) else STANDARD_ERRORS
    threshold = errors * deviation * math.sqrt(1 / first.count + 1 / second.count)
    text = (
        f"Noise: from seed to seed {measure.name} differs by {measure.gap_text(deviation)} "
        "(standard deviation over a recipe's seeds); "
        f"once in 20 times seeds alone make a difference above {measure.gap_text(threshold)}."
    )
    return Noise(threshold, text)


def _difference(first: RunSummary, second: RunSummary, measure: Measure) -> str:
    """What two runs differ in, and what follows; and their values after the same steps, if they
    took unequal ones."""
    # What differs -> how.
    differences = {}
    for difference in differing_keys([first, second]):
        if difference.learns:
            differences[f"`{difference.key}`"] = f" ({difference.values_text})"
    for key, name in HASHES_OF_INPUTS.items():
        if first.files.env.get(key) != second.files.env.get(key):
            differences[name] = ""
    names = list(differences)
    text = "Their recipes do not differ in anything that affects training."
    if len(names) == 1:
        text = f"They differ in {names[0]}{differences[names[0]]} alone."
    elif names:
        listed = ", ".join(names)
        text = f"They differ in {len(names)} things ({listed}): any of them may be the reason."
    text += _keys_without_effect([first, second])
    return text + _at_common_step(first, second, measure)


def _at_common_step(first: RunSummary, second: RunSummary, measure: Measure) -> str:
    """A sentence on the values of runs of unequal length after the same steps; empty without."""
    first_values = dict(measure.values(first))
    second_values = dict(measure.values(second))
    # Unequal runs are compared at a step that both have reached.
    common_steps = first_values.keys() & second_values.keys()
    if first.steps == second.steps or not common_steps:
        return ""
    step = max(common_steps)
    return (
        f" After step {step}, the last that both were measured at: "
        f"{measure.text(first_values[step])} against {measure.text(second_values[step])}."
    )


def _keys_without_effect(runs: Sequence[RunSummary]) -> str:
    """A sentence on the keys that differ and change nothing that is learned; empty without any."""
    keys = []
    for difference in differing_keys(runs):
        # A file of the same rows under another name is no difference.
        if is_free(difference.key) and not difference.learns:
            keys.append(f"`{difference.key}` ({difference.values_text})")
    if not keys:
        return ""
    return f" They also differ in {', '.join(keys)}; this does not change what is learned."


def _fits_training_rows_alone(run: RunSummary, winner: RunSummary, measure: Measure) -> bool:
    """Whether the training loss of the run is clearly lower than that of the winner, while all that
    was measured on held-out rows is worse."""
    if run.method != winner.method or not run.loss or not winner.loss:
        return False
    for of_rows in (measure, VAL_LOSS):
        best = of_rows.best(run)
        winning = of_rows.best(winner)
        if best and winning and of_rows.worse_by(best[0], than=winning[0]) <= 0:
            return False
    return _clearly_lower(run.loss, winner.loss)


def _clearly_lower(first: Spread, second: Spread) -> bool:
    error = math.sqrt(first.deviation**2 / first.count + second.deviation**2 / second.count)
    return first.mean + STANDARD_ERRORS * error < second.mean


def _weights_of(run: RunSummary, step: int) -> str:
    """The end of a sentence on a step: where its weights are."""
    checkpoint = run.files.folder / f"checkpoint-{step}"
    if run.files.final_step == step:
        return ", whose weights are in final/."
    if checkpoint.is_dir():
        return f", whose checkpoint is kept: `tunesmith chat {shell_path(shown(checkpoint))}`"
    return "."


def _cautions(runs: Sequence[RunSummary], first: RunGroup | None, measure: Measure) -> list[str]:
    """What a reader should know before believing the verdict."""
    cautions = []
    for run in runs:
        best = measure.best(run)
        if best is None:
            continue
        best_value, step = best
        values = [value for _, value in measure.values(run)]
        noise = validation_noise(values) or 0.0
        worse_by = measure.worse_by(values[-1], than=best_value)
        # Worse than its best by more than noise, or by as much as the end of a run mentions.
        is_rise = not measure.is_share and has_risen(values[-1], best_value)
        if worse_by > 0 and (is_rise or worse_by > STANDARD_ERRORS * noise):
            side = "below" if measure.is_share else "above"
            text = f"{run.label} ends at {measure.name} {measure.text(values[-1])}, "
            text += f"{side} that of step {step}"
            cautions.append(text + _weights_of(run, step))
    unfinished = [
        f"{run.label} ({run.files.state} at step {run.steps})"
        for run in runs
        if run.files.state is not RunState.FINISHED
    ]
    if unfinished:
        cautions.append(
            f"Not finished: {', '.join(unfinished)}. Their {measure.name} may still improve."
        )
    if first is None:
        return cautions
    for run in runs:
        if run not in first.runs and _fits_training_rows_alone(run, first.runs[0], measure):
            cautions.append(
                f"{run.label} has the lower training loss: "
                "it fits its training rows better, but not the held-out rows."
            )
            break
    tokens = [run.tokens for run in runs]
    # More tokens are more training, whatever the recipe.
    if max(tokens) > (1 + TOKEN_GAP) * min(tokens):
        amounts = ", ".join(f"{run.label} {run.tokens:,.0f}" for run in runs)
        cautions.append(f"They were trained on different numbers of tokens: {amounts}.")
    surroundings = differing_surroundings(runs)
    if surroundings:
        listed = ", ".join(f"`{name}` ({values})" for name, values in surroundings.items())
        cautions.append(
            f"Ranks, machines or software differ: {listed}. Speed and memory are not comparable."
        )
    return cautions


def _few_steps(runs: Sequence[RunSummary]) -> list[str]:
    """A sentence on the finished runs that took few steps, if there are any."""
    short = []
    for run in runs:
        if run.files.state is RunState.FINISHED and 0 < run.steps < FEW_STEPS:
            short.append(run)
    # These have learned before.
    continuing = [run.label for run in short if run.continues_adapter]
    short = [run for run in short if not run.continues_adapter]
    if not short:
        return []
    names = ", ".join(f"{run.label} ({run.steps})" for run in short[:SHORT_SHOWN])
    if len(short) > SHORT_SHOWN:
        names += f" and {len(short) - SHORT_SHOWN} more"
    recipe = shell_path(shown(short[0].files.folder / RECIPE))
    if continuing:
        names += f", not counting {', '.join(continuing)}, trained from an adapter"
    # A run that is no longer than its warmup is refused.
    steps = max(FEW_STEPS, 2 * short[0].warmup_steps)
    longer = shell_word(f"train.duration={steps} steps")
    return [
        f"Few steps: {names}; a model hardly changes in fewer than {FEW_STEPS}. "
        f"To continue training: `tunesmith train {recipe} {longer}`"
    ]


def differing_surroundings(runs: Sequence[RunSummary]) -> dict[str, str]:
    """What env.json says differently of runs: ranks, machines, software and what was chosen for
    them, as `{"torch": "2.13.0 against 2.14.0"}`."""
    environments = [run.surroundings for run in runs]
    differing = {}
    for name in dict.fromkeys(name for values in environments for name in values):
        texts = dict.fromkeys(_surrounding_text(values.get(name)) for values in environments)
        if len(texts) > 1:
            differing[name] = " against ".join(texts)
    return differing


def _surrounding_text(value: Any) -> str:
    """A value of env.json, short: `8 x NVIDIA H100` for a list of the same."""
    if value is None or value == []:
        return "none"
    if isinstance(value, list) and value.count(value[0]) == len(value):
        return f"{len(value)} x {_surrounding_text(value[0])}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
