"""The number that tells which of some runs is better: a loss, or the share of pairs in order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tunesmith.metrics.intervals import share_interval
from tunesmith.reader.run_files import RunFiles
from tunesmith.run_dir import PAIRS, EvalScores, RowLosses


@dataclass(frozen=True)
class Measure:
    """A number that tells which run is better.

    Attributes:
        name: as texts call it.
        values: of a run: step -> value, in the order of the steps.
        rows: of a run: what tells the rows that it was measured on; None where unknown.
        is_share: it is from 0 to 1, and higher is better; else lower is.
        evals: of a run by step, where `eval` measured it, as `run_dir.read_scores` has it.
    """

    name: str
    values: Callable[[RunFiles], Mapping[int, float]]
    rows: Callable[[RunFiles], object]
    is_share: bool = False
    evals: Callable[[RunFiles], Mapping[int, EvalScores]] = lambda _: {}

    @property
    def best_word(self) -> str:
        return f"{'highest' if self.is_share else 'lowest'} {self.name}"

    def worse_by(self, value: float, than: float) -> float:
        """Compute how much worse a value is than another."""
        return than - value if self.is_share else value - than

    def best(self, run: RunFiles) -> tuple[float, int] | None:
        """The best value of a run and its step; of equal ones the first."""
        places = [(self.worse_by(value, 0.0), step) for step, value in self.values(run).items()]
        if not places:
            return None
        _, step = min(places)
        return self.values(run)[step], step

    def best_span(self, run: RunFiles) -> tuple[float, float] | None:
        """The 95 % interval of the best share of a run; None where it is not known."""
        best = self.best(run)
        if best is None or not self.is_share:
            return None
        share, step = best
        if step in self.evals(run):
            _, low, high = self.evals(run)[step]["scores"][PAIRS]["tuned"]
            return low, high
        if not run.held_out:
            return None
        interval = share_interval(round(share * run.held_out), run.held_out)
        return interval.low, interval.high

    def best_row_losses(self, run: RunFiles) -> tuple[str, RowLosses] | None:
        """The rows that `eval` measured the best value of a run on, and the loss of each."""
        best = self.best(run)
        result = self.evals(run).get(best[1]) if best else None
        if self.is_share or result is None or result["row_losses"] is None:
            return None
        return result["data"], result["row_losses"]

    def text(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.is_share else f"{value:.4f}"

    def gap_text(self, gap: float) -> str:
        return f"{100 * gap:.1f} points" if self.is_share else f"{gap:.4f}"

    def best_text(self, run: RunFiles) -> str | None:
        """`91.0 % (83.9 to 95.5) at step 40`; None where it was not measured."""
        best = self.best(run)
        if best is None:
            return None
        value, step = best
        span = self.best_span(run)
        text = self.text(value)
        if span is not None:
            text += f" ({100 * span[0]:.1f} to {100 * span[1]:.1f})"
        return f"{text} at step {step}"


def _validation_rows(run: RunFiles) -> object:
    return (run.validation_hash, run.max_examples) if run.validation_hash else None


VAL_LOSS = Measure("val_loss", lambda run: run.figures.validations, _validation_rows)
HELD_OUT_ACCURACY = Measure(
    "accuracy on held-out pairs",
    lambda run: run.figures.accuracies,
    _validation_rows,
    is_share=True,
)


def _evals_of(run: RunFiles, pairs: bool) -> dict[str, dict[int, EvalScores]]:
    """Collect what `eval` measured of pairs or each row's loss, by the rows' hash and the step.

    Losses are without rows that the run was trained on, which show what it has kept of them; its
    own held-out rows count as for val_loss.
    """
    evals: dict[str, dict[int, EvalScores]] = {}
    for result in sorted(run.evals, key=lambda result: result["step"] or 0):
        row_losses = result["row_losses"]
        row_hash = result["row_hash"]
        is_measured = PAIRS in result["scores"]
        if not pairs and row_losses:
            row_hash = row_losses["row_hash"]
            is_unseen = not result["seen"] or row_hash == run.validation_hash
            is_measured = is_unseen and "tuned" in (result["losses"] or {})
        if is_measured and (pairs or row_losses) and result["step"] is not None:
            # Of several of one step the newest counts.
            evals.setdefault(row_hash, {})[result["step"]] = result
    return evals


def _eval_measure(runs: Sequence[RunFiles], *, pairs: bool) -> Measure | None:
    """Find what `eval` measured on rows that all runs have been evaluated on.

    None where there are no such rows, or fewer than val_loss was measured on in all runs.
    """
    evals = [_evals_of(run, pairs) for run in runs]
    common = set(evals[0]).intersection(*evals[1:])

    def rows_of(row_hash: str) -> int:
        return max(result["rows"] for result in evals[0][row_hash].values())

    if not common:
        return None
    # Of equally many rows always the same ones.
    chosen = max(sorted(common), key=rows_of)

    def at_steps(run: RunFiles) -> dict[int, EvalScores]:
        return _evals_of(run, pairs)[chosen]

    def values(run: RunFiles) -> dict[int, float]:
        if pairs:
            return {step: e["scores"][PAIRS]["tuned"][0] for step, e in at_steps(run).items()}
        return {step: e["losses"]["tuned"] for step, e in at_steps(run).items() if e["losses"]}

    if pairs:
        name = "accuracy on pairs, by eval,"
        return Measure(name, values, lambda _: chosen, is_share=True, evals=at_steps)
    validated = {_validation_rows(run) for run in runs}
    has_val_loss = all(run.figures.validations for run in runs)
    if len(validated) == 1 and None not in validated and has_val_loss:
        held_out = runs[0].held_out or 0
        if rows_of(chosen) < min(held_out, runs[0].max_examples or held_out):
            return None
    return Measure("loss by eval", values, lambda _: chosen, evals=at_steps)


def measure_of(runs: Sequence[RunFiles]) -> Measure:
    """Choose what tells which of the runs is better.

    Of sft: `eval` of the same rows, if all runs have it and it has no fewer rows than val_loss, for
    it compares row by row; else val_loss.

    Where a method learns from preferences: `eval` of the same pairs, if all runs have it, for it
    measures all methods alike. Else the accuracy on held-out pairs, where all compare answers in
    one way: dpo by the log-ratio to its reference, orpo and simpo by log-probabilities.
    """
    methods = {run.method for run in runs}
    is_sft = methods == {"sft"}
    by_eval = None
    if not is_sft or len(runs) > 1:
        by_eval = _eval_measure(runs, pairs=not is_sft)
    if by_eval is not None:
        return by_eval
    if methods == {"dpo"} or methods <= {"orpo", "simpo"}:
        return HELD_OUT_ACCURACY
    return VAL_LOSS
