"""The comparison of runs side by side: numbers with their spread, differing keys, and which is
better where that can be said.

val_loss decides, and only on the same held-out rows; a training loss never does. Of methods that
compare answers it is the share of held-out pairs in order: as `eval` measured it, or as training
did. A difference counts above the noise: what seeds alone would exceed once in 20, where several
runs share a recipe; else the interval of what `eval` measured row by row, what so many pairs tell
apart, or how far val_loss moves around its own trend.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from tunesmith.config.dump import is_free, leaves
from tunesmith.config.schema import FEW_STEPS
from tunesmith.host.shell import shell_path
from tunesmith.metrics.intervals import loss_sentence, paired_losses, students_t
from tunesmith.metrics.run_figures import Spread
from tunesmith.metrics.summary import has_risen
from tunesmith.reader.figures import environment_rows
from tunesmith.reader.measure import VAL_LOSS, Measure, measure_of
from tunesmith.reader.run_files import RunFiles
from tunesmith.run_dir import RECIPE, RunState, shown
from tunesmith.units import count_of

# Standard errors above which a difference counts: about 95 % of a normal distribution.
STANDARD_ERRORS = 2.0
TOKEN_GAP = 0.02  # relative difference of the tokens learned from that is worth a sentence
FEWEST_VALIDATIONS = 5  # whose moves tell the noise
HASHES_OF_INPUTS = {"data_hash": "the training rows", "model_hash": "the base's weights"}
# Of the keys that may change when a run resumes: they end it sooner, or choose its weights.
_CHOOSES_WEIGHTS = re.compile(r"validate\..+|checkpoint\.final")
_TRAINING_FILE = re.compile(r"data\.train(\.\d+)?\.source")


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


def changes_learning(key: str, runs: Sequence[RunFiles]) -> bool:
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
    data_hashes = {run.env.get("data_hash") for run in runs}
    has_same_rows = len(data_hashes) == 1 and None not in data_hashes
    return not (has_same_rows and _TRAINING_FILE.fullmatch(key))


def _learned_from(run: RunFiles) -> str:
    """Return what changes what is learned: recipe keys except the seed, rows and weights."""
    values = {}
    for key, value in leaves(run.recipe).items():
        if key != "train.seed" and changes_learning(key, [run]):
            values[key] = value
    # A file may have been edited between two runs of one recipe.
    hashes = {name: run.env.get(name) for name in HASHES_OF_INPUTS}
    return json.dumps(values | hashes, sort_keys=True)


class KeyDifference(NamedTuple):
    """A key that is not the same in all runs; `learns`: whether it changes what is learned."""

    key: str
    values: list[object]
    learns: bool


def differing_keys(runs: Sequence[RunFiles]) -> list[KeyDifference]:
    """The keys of the recipes that differ, those that change what is learned first; the output
    folder is left out."""
    recipes = [leaves(run.recipe | {"method": run.method_keys}) for run in runs]
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
    """The distance of the second of two runs behind the first, in the unit of `measure` (of
    accuracies a share); it counts above `threshold`, None where the noise is not known.
    """

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
    """

    threshold: float | None
    text: str


class RunGroup(NamedTuple):
    """Runs of one recipe, which differ in the seed at most, and their best values."""

    runs: list[RunFiles]
    measure: Measure
    best: Spread

    @property
    def name(self) -> str:
        return " and ".join(run.label for run in self.runs)

    def __str__(self) -> str:
        text = self.measure.text(self.best.mean)
        if len(self.runs) == 1:
            return text
        return f"{text} ± {self.measure.gap_text(self.best.deviation)}"


def judge(runs: Sequence[RunFiles]) -> Verdict:
    """Which run is better, and why, or why that cannot be said; and of those that took few steps,
    that they did.
    """
    verdict = _judge(runs)
    few = [
        f"{run.label} ({run.steps})"
        for run in runs
        if run.state is RunState.FINISHED and 0 < run.steps < FEW_STEPS
    ]
    if few:
        verdict.reasons.append(
            f"Few steps: {', '.join(few)}; a model hardly changes in fewer than {FEW_STEPS}: "
            "a longer train.duration continues a run."
        )
    return verdict


def _judge(runs: Sequence[RunFiles]) -> Verdict:
    """Which run is better, and why, or why that cannot be said.

    It cannot where fewer than two runs were measured on held-out rows, where these are other rows
    or not known, while one still trains, and where the noise of the measure is not known.
    """
    measure = measure_of(runs)
    if len(runs) == 1:
        return _alone(runs[0], measure)
    measured = [run for run in runs if measure.best(run)]
    absent = [
        f"{run.label} has no {measure.name} ({run.state})." for run in runs if run not in measured
    ]
    # A comparison needs two runs that were validated.
    if len(measured) < 2:
        why = (
            "A training loss is measured on the training rows: "
            "it does not show which model is better."
        )
        fix = "Use the same held-out rows in the recipes: data.validation, or data.hold_out: 5 %."
        return Verdict("none", "It is unclear which is better", [*absent, why, fix])
    obstacle = _obstacle(measured, measure)
    if obstacle is not None:
        return obstacle

    ranking = _rank(measured, measure)
    cautions = [*absent, *_cautions(measured, measure)]
    # One group: all runs learned from the same recipe.
    if len(ranking) == 1:
        return _one_recipe(ranking[0], measured, cautions)
    verdict = _compare_groups(ranking, cautions)
    if verdict.kind != "better":
        return verdict
    # The winner's runs, by their place in the report.
    best = tuple(i for i, run in enumerate(runs) if run in ranking[0].runs)
    return verdict._replace(best=best)


def _one_recipe(group: RunGroup, measured: Sequence[RunFiles], cautions: Sequence[str]) -> Verdict:
    """The verdict on runs of one recipe, of which `group` has those that are comparable."""
    name = group.measure.name
    if len(group.runs) > 1:
        seeds = count_of(len({run.seed for run in group.runs}), "seed")
        headline = "One recipe: the difference is the seed's or the machine's"
        why = f"These are {len(group.runs)} runs of one recipe with {seeds}: {name} {group}."
        return Verdict("equal", headline, [why, *cautions])
    (first,) = group.runs
    headline = f"One recipe: only {first.label} is trained as far as step {first.steps}"
    if first.state is RunState.FINISHED:
        headline = f"One recipe: only {first.label} has finished"
    why = f"Its {group.measure.best_word} is {group}."
    for run in measured:
        if run is not first:
            why += _at_common_step(first, run, group.measure)
    return Verdict("none", headline, [why, *cautions])


def _compare_groups(ranking: Sequence[RunGroup], cautions: Sequence[str]) -> Verdict:
    """The verdict on the first of several recipes and the second, or one further off that cannot be
    told from the first: its rows may vary more."""
    first = ranking[0]
    measure = first.measure
    rivals = []
    for group in ranking[1:]:
        gap = measure.worse_by(group.best.mean, than=first.best.mean)
        rivals.append((group, gap, _noise(ranking, group)))
    equal = (
        (group, gap, noise)
        for group, gap, noise in rivals
        if noise.threshold is not None and gap <= noise.threshold
    )
    second, gap, noise = next(equal, rivals[0])
    reasons = [
        _difference(first.runs[0], second.runs[0], measure),
        f"{measure.gap_text(gap)} apart. {noise.text}",
        *cautions,
    ]
    kind, headline = _headline(first, second, gap, noise)
    name = measure.name.strip(",")
    difference = RunDifference(name, first.name, second.name, gap, noise.threshold)
    return Verdict(kind, headline, reasons, difference=difference)


def _headline(first: RunGroup, second: RunGroup, gap: float, noise: Noise) -> tuple[str, str]:
    """Kind and headline of a verdict on the better and the worse one of two recipes."""
    measure = first.measure
    of_second = f"against {second} of {second.name}"
    against = f"{measure.best_word} {first} {of_second}"
    # A run that goes on, or is resumed, may still change places.
    if any(run.state is not RunState.FINISHED for run in (*first.runs, *second.runs)):
        return "none", f"So far {first.name} leads: {against}"
    if noise.threshold is None:
        chance = "how much runs vary by chance is unknown"
        return "none", f"{first.name} has the {measure.best_word}, but {chance}: {against}"
    if gap <= noise.threshold:
        best = f"{measure.best_word} {first} of {first.name}"
        return "equal", f"No significant difference: {best} {of_second}"
    verb = "is" if len(first.runs) == 1 else "are"
    return "better", f"{first.name} {verb} better on these rows: {against}"


def _alone(run: RunFiles, measure: Measure) -> Verdict:
    headline = f"{run.label}: {run.described_state}"
    best = measure.best_text(run)
    if best is None:
        fix = "Without held-out rows the quality of the model is unknown: data.hold_out: 5 %."
        if run.validation_hash:
            fix = "It has not been validated yet."
        return Verdict("alone", f"{headline}, without {measure.name}", [fix])
    return Verdict("alone", f"{headline}, {measure.best_word} {best}", _cautions([run], measure))


def _obstacle(measured: Sequence[RunFiles], measure: Measure) -> Verdict | None:
    """The verdict on runs that were measured by other losses or on other rows; None if not."""

    def of_each(value: Callable[[RunFiles], object]) -> str:
        return ", ".join(f"{run.label}: {value(run)}" for run in measured)

    command = _eval_command(measured)
    hashes = {run.validation_hash for run in measured}
    if len(hashes) > 1 or None in hashes:
        command += " --data held-out.jsonl"
    if not measure.is_share and len({run.method for run in measured}) > 1:
        why = f"The methods differ: {of_each(lambda run: run.method)}."
        fix = (
            f"Evaluate all on the same pairs, which none was trained on: `{command}`, and create "
            "the report again; or compare their answers, with --score."
        )
        return Verdict("none", "Not comparable: val_loss is a different loss in each", [why, fix])
    rows = {measure.rows(run) for run in measured}
    if len(rows) == 1 and None not in rows:
        return None
    headline = f"Not comparable: it is unknown what {measure.name} was measured on"
    if None not in hashes:
        headline = f"Not comparable: {measure.name} was measured on different rows"
    why = (
        f"Hash of the held-out rows: {of_each(lambda run: str(run.validation_hash)[:12])}; "
        f"taken of them: {of_each(lambda run: run.max_examples or 'all')}."
    )
    reasons = [why, f"Compare them on the same rows: `{command}`."]
    drawn_by = {run.hold_out_seed for run in measured}
    if None not in drawn_by and len(drawn_by) > 1:
        seeds = of_each(lambda run: run.hold_out_seed)
        reasons.append(
            f"data.hold_out was drawn by several seeds ({seeds}): set data.hold_out_seed."
        )
    return Verdict("none", headline, reasons)


def _rank(measured: Sequence[RunFiles], measure: Measure) -> list[RunGroup]:
    """The runs by recipe, the best first; of a recipe those that finished, or came furthest."""
    by_recipe: dict[str, list[RunFiles]] = {}
    for run in measured:
        # Runs with the same keys that change what is learned differ by seed alone.
        by_recipe.setdefault(_learned_from(run), []).append(run)
    groups = []
    for of_recipe in by_recipe.values():
        # A shorter run of a recipe says nothing of its seeds.
        runs = [run for run in of_recipe if run.state is RunState.FINISHED]
        if not runs:
            furthest = max(run.steps for run in of_recipe)
            runs = [run for run in of_recipe if run.steps == furthest]
        bests = [best for best in map(measure.best, runs) if best is not None]
        spread = Spread.from_values([value for value, _ in bests])
        if spread:
            groups.append(RunGroup(runs, measure, spread))
    return sorted(groups, key=lambda group: measure.worse_by(group.best.mean, than=0.0))


def _seed_advice(run: RunFiles, measure: Measure) -> str:
    """Say how to see what another seed changes, and what that is for."""
    seed = (run.seed if run.seed is not None else 42) + 1
    recipe = shell_path(shown(run.folder / RECIPE))
    output = shell_path(shown(f"{run.folder}-seed-{seed}"))
    keys = f"train.seed={seed}"
    if run.hold_out_seed is not None:
        # Its validation would be of other rows, so not comparable.
        keys += f" data.hold_out_seed={run.hold_out_seed}"
    command = f"tunesmith train {recipe} {keys} output_dir={output}"
    return (
        f"Each has a single seed, and another seed would change {measure.name} too. To see by how "
        f"much, train one again and report it beside these: `{command}`"
    )


def _eval_command(runs: Sequence[RunFiles]) -> str:
    """The command that compares runs row by row."""
    folders = [shell_path(shown(run.folder)) for run in runs]
    return f"tunesmith eval {' '.join(folders)}"


def _noise(ranking: Sequence[RunGroup], second: RunGroup) -> Noise:
    """The noise of the difference between the first and the `second`, one of the others."""
    first = ranking[0]
    measure = first.measure
    # Several seeds of a recipe tell its noise better than one run can.
    repeated = [group.best for group in ranking if group.best.count > 1]
    if repeated:
        return _noise_of_seeds(repeated, first.best, second.best, measure)
    advice = _seed_advice(first.runs[0], measure)
    noise = _noise_of_rows(first, second)
    if noise is None:
        noise = _noise_of_shares(first, second) or _noise_of_course(first, second)
        if measure is VAL_LOSS and first.runs[0].method == "sft":
            command = _eval_command([first.runs[0], second.runs[0]])
            advice = f"Whether other rows would say the same: `{command}`. {advice}"
    return noise._replace(text=f"{noise.text}. {advice}")


def _noise_of_rows(first: RunGroup, second: RunGroup) -> Noise | None:
    """The same from the losses of each row; None where a run lacks them, or they show the
    second run ahead."""
    runs = [first.runs[0], second.runs[0]]
    # Of many runs, as those of a sweep, the first two alone may have been evaluated.
    measure = measure_of(runs)
    better, worse = map(measure.best_row_losses, runs)
    if better is None or worse is None:
        return None
    data, rows = better
    difference = paired_losses(worse[1]["tuned"], rows["tuned"], rows["tokens"])
    if difference.mean > 0:
        return None
    sentence = loss_sentence(difference, first=runs[1].label, second=runs[0].label)
    interval = difference.interval
    threshold = None if interval is None else interval.high - difference.mean
    return Noise(threshold, f"Row by row ({data}): {sentence}")


def _noise_of_shares(first: RunGroup, second: RunGroup) -> Noise | None:
    """The same from the intervals of two shares; None where unknown."""
    higher, lower = (first.measure.best_span(group.runs[0]) for group in (first, second))
    if higher is None or lower is None:
        return None
    # Newcombe's interval of a difference (1998, method 10). Of two models on the same rows it is
    # too wide rather than too narrow.
    threshold = math.hypot(first.best.mean - higher[0], lower[1] - second.best.mean)
    ends = [f"{100 * low:.1f} to {100 * high:.1f} %" for low, high in (higher, lower)]
    text = f"Noise: the 95 % intervals for these numbers of pairs are {' and '.join(ends)}"
    return Noise(threshold, f"{text}{_counts_above(threshold, first.measure)}")


def _noise_of_course(first: RunGroup, second: RunGroup) -> Noise:
    """The same from the course of the measure in two runs."""
    measure = first.measure
    noises = []
    for group in (first, second):
        noise = validation_noise(list(measure.values(group.runs[0]).values()))
        if noise is not None:
            noises.append(noise)
    if not noises:
        needed = f"It takes {FEWEST_VALIDATIONS} validations to estimate the noise"
        return Noise(None, f"{needed} of {measure.name} (validate.every)")
    # The difference of two values of the same noise.
    threshold = STANDARD_ERRORS * math.sqrt(2) * max(noises)
    moves = f"moves by {measure.gap_text(max(noises))} around its trend"
    text = f"Noise: from one validation to the next {measure.name} {moves}"
    return Noise(threshold, f"{text}{_counts_above(threshold, measure)}")


def _counts_above(threshold: float, measure: Measure) -> str:
    return f"; a difference counts above {measure.gap_text(threshold)}"


def _noise_of_seeds(
    repeated: Sequence[Spread], first: Spread, second: Spread, measure: Measure
) -> Noise:
    """The same from the recipes that ran with several seeds."""
    # The pooled variance: each recipe around its own mean.
    freedom = sum(best.count - 1 for best in repeated)
    squares = sum(best.deviation**2 * (best.count - 1) for best in repeated)
    deviation = math.sqrt(squares / freedom)
    threshold = students_t(freedom + 1) * deviation * math.sqrt(1 / first.count + 1 / second.count)
    text = (
        f"Noise: from seed to seed {measure.name} differs by {measure.gap_text(deviation)} "
        "(standard deviation over a recipe's seeds); "
        f"once in 20 times seeds alone make a difference above {measure.gap_text(threshold)}."
    )
    return Noise(threshold, text)


def _difference(first: RunFiles, second: RunFiles, measure: Measure) -> str:
    """Describe what two runs differ in, and what follows; and their values after the same steps, if
    they took unequal ones.
    """
    differences = []
    for difference in differing_keys([first, second]):
        if difference.learns:
            values = " against ".join(map(json.dumps, difference.values))
            differences.append(f"`{difference.key}` ({values})")
    for key, name in HASHES_OF_INPUTS.items():
        if first.env.get(key) != second.env.get(key):
            differences.append(name)
    text = "Their recipes do not differ in anything that affects training."
    if differences:
        text = f"They differ in {', '.join(differences)}."
    return text + _at_common_step(first, second, measure)


def _at_common_step(first: RunFiles, second: RunFiles, measure: Measure) -> str:
    """A sentence on the values of runs of unequal length after the same steps; empty without."""
    first_values = measure.values(first)
    second_values = measure.values(second)
    # Unequal runs are compared at a step that both have reached.
    common_steps = first_values.keys() & second_values.keys()
    if first.steps == second.steps or not common_steps:
        return ""
    step = max(common_steps)
    return (
        f" After step {step}, the last that both were measured at: "
        f"{measure.text(first_values[step])} against {measure.text(second_values[step])}."
    )


def _cautions(runs: Sequence[RunFiles], measure: Measure) -> list[str]:
    """List what a reader should know before believing the verdict."""
    cautions = []
    for run in runs:
        best = measure.best(run)
        if best is None:
            continue
        best_value, step = best
        values = list(measure.values(run).values())
        noise = validation_noise(values) or 0.0
        worse_by = measure.worse_by(values[-1], than=best_value)
        # Worse than its best by more than noise, or by as much as the end of a run mentions.
        is_rise = not measure.is_share and has_risen(values[-1], best_value)
        if worse_by > 0 and (is_rise or worse_by > STANDARD_ERRORS * noise):
            side = "below" if measure.is_share else "above"
            text = f"{run.label} ends at {measure.name} {measure.text(values[-1])}, "
            cautions.append(f"{text}{side} that of step {step}.")
    unfinished = [
        f"{run.label} ({run.state} at step {run.steps})"
        for run in runs
        if run.state is not RunState.FINISHED
    ]
    if unfinished:
        cautions.append(
            f"Not finished: {', '.join(unfinished)}. Their {measure.name} may still improve."
        )
    tokens = [run.figures.tokens for run in runs]
    # More tokens are more training, whatever the recipe.
    if max(tokens) > (1 + TOKEN_GAP) * min(tokens):
        amounts = ", ".join(f"{run.label} {run.figures.tokens:,.0f}" for run in runs)
        cautions.append(f"They were trained on different numbers of tokens: {amounts}.")
    names = [f"`{name}`" for name, _, differs in environment_rows(runs) if differs]
    if names:
        cautions.append(
            f"Ranks, machines or software differ: {', '.join(names)}. "
            "Speed and memory are not comparable."
        )
    return cautions
