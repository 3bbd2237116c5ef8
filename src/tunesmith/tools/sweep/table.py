"""The result of a sweep as text: a table, the best candidate, how far it is ahead, and where its
files lie."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tunesmith.host.files import from_here
from tunesmith.host.shell import shell_path
from tunesmith.launch.jobs import holds_run
from tunesmith.reader.compare import judge
from tunesmith.reader.page import write_report
from tunesmith.reader.run_files import RunFiles
from tunesmith.run_dir import FINAL, RECIPE, weights_step
from tunesmith.tools.sweep.sweep_file import CandidateResult, SweepResult

ORDER = ("finished", "stopped", "diverged", "waiting")


def sweep_page(result: SweepResult) -> Path | None:
    """Write the report of all candidates beside sweep.json, and return its path.

    None where no candidate has begun.
    """
    folders = [Path(candidate["run_dir"]) for candidate in result["candidates"]]
    runs = [RunFiles(folder) for folder in folders if holds_run(folder)]
    if not runs:
        return None
    page = runs[0].folder.parent / "report.html"
    write_report(runs, page, note="; ".join(best_lines(result)))
    return page


def sweep_lines(result: SweepResult) -> Iterator[str]:
    """A table of a result, as sweep.json holds it, and then the best candidate.

    The candidates that came furthest come first; of these the one with the least loss.
    """
    candidates = result["candidates"]
    # All candidates set the same keys.
    names = []
    if candidates:
        names = [key.rpartition(".")[2] for key in candidates[0]["values"]]
    rows = [["", *names, "step", result["compared_by"], ""]]
    rows += map(_table_row, sorted(candidates, key=_rank))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # One line a candidate, however wide: it is also read through grep.
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join(cells).rstrip()
    yield from best_lines(result)


def _rank(candidate: CandidateResult) -> tuple[int, int, float]:
    """The place of a candidate in the table: the least comes first."""
    return ORDER.index(candidate["state"]), -candidate["step"], candidate["loss"] or 0.0


def _loss_of(candidate: CandidateResult) -> float:
    return math.inf if candidate["loss"] is None else candidate["loss"]


def _table_row(candidate: CandidateResult) -> list[str]:
    # A candidate that waits or has diverged has no loss.
    loss = "-"
    if candidate["loss"] is not None:
        loss = f"{candidate['loss']:.4f}"
    number = candidate["name"].partition("-")[0]
    values = candidate["values"].values()
    return [number, *values, str(candidate["step"]), loss, candidate["state"]]


def best_lines(result: SweepResult) -> Iterator[str]:
    """The best candidate, what it was chosen from, and where its adapter and its recipe lie."""
    candidates = result["candidates"]
    states = Counter(candidate["state"] for candidate in candidates)
    counts = ", ".join(f"{states[state]} {state}" for state in ORDER if states[state])
    best = next((c for c in candidates if c["name"] == result["best"]), None)
    if best is None:
        yield f"no candidate trained to the end: {counts}"
        return
    folder = Path(from_here(best["run_dir"]))
    step = weights_step(folder / FINAL) or best["step"]
    loss = f"{result['compared_by']} {best['loss']:.4f} after step {step}"
    yield f"best: {best['name']}, {loss}; of {len(candidates)}: {counts}"
    yield from _second_lines(result, best)
    yield f"adapter: {folder / FINAL}; try it: tunesmith chat {shell_path(folder)}"
    yield f"recipe to copy: {folder / RECIPE}"


def _second_lines(result: SweepResult, best: CandidateResult) -> Iterator[str]:
    """The candidate behind the best one: of those that trained to the end, else of those that were
    stopped the one that came furthest."""
    others = [candidate for candidate in result["candidates"] if candidate is not best]
    finished = [candidate for candidate in others if candidate["state"] == "finished"]
    stopped = [candidate for candidate in others if candidate["state"] == "stopped"]
    if finished:
        second = min(finished, key=_loss_of)
        yield from _comparison_lines(result["compared_by"], best, second)
    elif stopped:
        second = min(stopped, key=lambda candidate: (-candidate["step"], candidate["loss"]))
        step = second["step"]
        losses = f"{second['loss']:.4f} against {best['losses'][str(step)]:.4f}"
        yield f"second: {second['name']}, stopped early at step {step}: {losses}"


def _comparison_lines(
    compared_by: str, best: CandidateResult, second: CandidateResult
) -> Iterator[str]:
    """Say how far the best candidate is ahead of the second, whether that is more than chance, and
    the command that compares them row by row."""
    gap = _loss_of(second) - _loss_of(best)
    loss = f"{compared_by} {_loss_of(second):.4f}"
    ahead = f"second: {second['name']}, {loss}: {gap:.4f} higher"
    if compared_by != "val_loss":
        yield f"{ahead}; training losses do not show which model is better: hold out rows"
        return
    folders = [Path(candidate["run_dir"]) for candidate in (best, second)]
    difference = judge([RunFiles(folder) for folder in folders]).difference
    threshold = difference and difference.threshold
    if threshold is None:
        yield f"{ahead}; whether that is more than chance is not known yet"
    elif gap > threshold:
        yield f"{ahead}, which is more than the noise ({threshold:.4f})"
    else:
        yield f"{ahead}, which is within the noise ({threshold:.4f}): no significant difference"
    words = " ".join(shell_path(from_here(folder)) for folder in folders)
    yield f"compare them row by row: tunesmith eval {words}"
