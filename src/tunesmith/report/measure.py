"""The number that tells which of some runs is better: a loss, or the share of pairs in order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.report.run_summary import RunSummary
from tunesmith.run_dir import PAIRS
from tunesmith.scoring.intervals import share_interval


@dataclass(frozen=True)
class Measure:
    """A number that tells which run is better.

    Attributes:
        name: as texts call it.
        values: of a run: (step, value), in their order.
        is_share: it is from 0 to 1, and higher is better; else lower is.
        span: of a run whose best value is shown: the ends of its 95 % interval; None where they are
            not known.
        rows: of a run: what tells the rows that it was measured on; None where unknown.
        row_losses: of a run at a step: what `eval` said of these rows, as `run_dir.read_scores` has
            it with their losses; None where unknown.
    """

    name: str
    values: Callable[[RunSummary], Sequence[tuple[int, float]]]
    rows: Callable[[RunSummary], Any]
    is_share: bool = False
    span: Callable[[RunSummary, float], tuple[float, float] | None] = lambda _, __: None
    row_losses: Callable[[RunSummary, int], dict[str, Any] | None] = lambda _, __: None

    @property
    def best_word(self) -> str:
        return f"{'highest' if self.is_share else 'lowest'} {self.name}"

    def worse_by(self, value: float, than: float) -> float:
        """How much worse a value is than another."""
        return than - value if self.is_share else value - than

    def best(self, run: RunSummary) -> tuple[float, int] | None:
        """The best value of a run and its step; of equal ones the first."""
        best = None
        for step, value in self.values(run):
            if best is None or self.worse_by(value, best[0]) < 0:
                best = (value, step)
        return best

    def text(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.is_share else f"{value:.4f}"

    def gap_text(self, gap: float) -> str:
        return f"{100 * gap:.1f} points" if self.is_share else f"{gap:.4f}"

    def best_text(self, run: RunSummary) -> str | None:
        """`91.0 % (83.9 to 95.5) at step 40`; None where it was not measured."""
        best = self.best(run)
        if best is None:
            return None
        value, step = best
        span = self.span(run, value)
        text = self.text(value)
        if span is not None:
            text += f" ({100 * span[0]:.1f} to {100 * span[1]:.1f})"
        return f"{text} at step {step}"


def _validation_rows(run: RunSummary) -> tuple[str, Any] | None:
    return (run.validation_hash, run.max_examples) if run.validation_hash else None


def _accuracy_span(run: RunSummary, value: float) -> tuple[float, float] | None:
    pairs = run.held_out
    if not pairs:
        return None
    interval = share_interval(round(value * pairs), pairs)
    return interval.low, interval.high


def _pair_evals(run: RunSummary) -> list[dict[str, Any]]:
    """The results of `eval` on pairs, of steps with a number, in their order."""
    evals = [e for e in run.files.evals if PAIRS in e["scores"] and e["step"] is not None]
    return sorted(evals, key=lambda result: result["step"])


def _eval_span(run: RunSummary, value: float) -> tuple[float, float] | None:
    for result in _pair_evals(run):
        mean, low, high = result["scores"][PAIRS]["tuned"]
        if mean == value:
            return low, high
    return None


def _eval_rows(run: RunSummary) -> str | None:
    """The rows of a run's evals of pairs; None unless all are the same."""
    hashes = {result["row_hash"] for result in _pair_evals(run)}
    return hashes.pop() if len(hashes) == 1 else None


VAL_LOSS = Measure("val_loss", lambda run: run.validations, _validation_rows)
HELD_OUT_ACCURACY = Measure(
    "accuracy on held-out pairs",
    lambda run: run.accuracies,
    _validation_rows,
    is_share=True,
    span=_accuracy_span,
)
EVAL_ACCURACY = Measure(
    "accuracy on pairs, by eval,",
    lambda run: [(e["step"], e["scores"][PAIRS]["tuned"][0]) for e in _pair_evals(run)],
    _eval_rows,
    is_share=True,
    span=_eval_span,
)


def _loss_evals(run: RunSummary) -> dict[str, dict[int, dict[str, Any]]]:
    """What `eval` said of each row, by the rows' hash and the step.

    Without rows that the run was trained on, which show what it has kept of them; its own held-out
    rows count as for val_loss.
    """
    evals: dict[str, dict[int, dict[str, Any]]] = {}
    for result in run.files.evals:
        row_losses = result["row_losses"]
        has_tuned = "tuned" in (result["losses"] or {})
        if not row_losses or not has_tuned or result["step"] is None:
            continue
        if not result["seen"] or row_losses["row_hash"] == run.validation_hash:
            evals.setdefault(row_losses["row_hash"], {})[result["step"]] = result
    return evals


def _eval_loss(runs: Sequence[RunSummary]) -> Measure | None:
    """The loss by `eval` on rows that all runs have been evaluated on, row by row.

    None where there are no such rows, or fewer than val_loss was measured on in all runs.
    """
    evals = [_loss_evals(run) for run in runs]
    common = set(evals[0]).intersection(*evals[1:])

    def rows_of(row_hash: str) -> int:
        (result, *_) = evals[0][row_hash].values()
        return len(result["row_losses"]["tokens"])

    if len(runs) < 2 or not common:
        return None
    # Of equally many rows always the same ones.
    chosen = max(sorted(common), key=rows_of)
    validated = {_validation_rows(run) for run in runs}
    if len(validated) == 1 and None not in validated and all(run.validations for run in runs):
        held_out = runs[0].held_out or 0
        if rows_of(chosen) < min(held_out, runs[0].max_examples or held_out):
            return None

    def at_steps(run: RunSummary) -> list[tuple[int, float]]:
        results = _loss_evals(run)[chosen]
        return [(step, results[step]["losses"]["tuned"]) for step in sorted(results)]

    return Measure(
        "loss by eval",
        at_steps,
        lambda _: chosen,
        row_losses=lambda run, step: _loss_evals(run)[chosen][step],
    )


def measure_of(runs: Sequence[RunSummary]) -> Measure:
    """What tells which of the runs is better.

    Of sft: `eval` of the same rows, if all runs have it and it has no fewer rows than val_loss, for
    it compares row by row; else val_loss.

    Where a method learns from preferences: `eval` of the same pairs, if all runs have it, for it
    measures all methods alike. Else the accuracy on held-out pairs, where all compare answers in
    one way: dpo by the log-ratio to its reference, orpo and simpo by log-probabilities.
    """
    methods = {run.method for run in runs}
    if methods == {"sft"}:
        return _eval_loss(runs) or VAL_LOSS
    eval_rows = {_eval_rows(run) for run in runs}
    if len(eval_rows) == 1 and None not in eval_rows:
        return EVAL_ACCURACY
    if methods == {"dpo"} or methods <= {"orpo", "simpo"}:
        return HELD_OUT_ACCURACY
    return VAL_LOSS
