"""The result of a sweep as text: a table, the best candidate, its difference to the second, and the
paths of its files.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from tunesmith.host.files import from_here
from tunesmith.host.shell import shell_path
from tunesmith.run_dir import FINAL, RECIPE, weights_step
from tunesmith.tools.sweep.sweep_file import CandidateResult, SweepResult


def sweep_lines(result: SweepResult) -> Iterator[str]:
    """Return a table of the candidates, the lowest loss first, and then the best candidate."""
    candidates = _ranked(result)
    # All candidates set the same keys.
    names = [key.rpartition(".")[2] for key in candidates[0]["values"]]
    rows = [["", *names, "step", result["compared_by"], ""]]
    for candidate in candidates:
        number = candidate["name"].partition("-")[0]
        loss = "-" if candidate["loss"] is None else f"{candidate['loss']:.4f}"
        values = candidate["values"].values()
        rows.append([number, *values, str(candidate["step"]), loss, candidate["state"]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # One line for each candidate, of any width, so that grep finds the entire row.
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join(cells).rstrip()
    yield from best_lines(result)


def _ranked(result: SweepResult) -> list[CandidateResult]:
    """Return the candidates, the lowest loss first and those that diverged last."""
    return sorted(result["candidates"], key=lambda c: math.inf if c["loss"] is None else c["loss"])


def best_lines(result: SweepResult) -> Iterator[str]:
    """Return lines on the best candidate: its loss, the second one, and the paths of its files."""
    candidates = _ranked(result)
    best = candidates[0]
    if best["loss"] is None:
        yield f"none of {len(candidates)} candidates trained to the end"
        return
    folder = Path(from_here(best["run_dir"]))
    step = weights_step(folder / FINAL) or best["step"]
    name = result["compared_by"]
    loss = f"{name} {best['loss']:.4f} after step {step}"
    yield f"best of {len(candidates)}: {best['name']}, {loss}"
    second = candidates[1]
    if second["loss"] is not None:
        gap = second["loss"] - best["loss"]
        yield f"second: {second['name']}, {name} {second['loss']:.4f}: {gap:.4f} higher"
        if name == "val_loss":
            folders = [Path(candidate["run_dir"]) for candidate in candidates[:2]]
            words = " ".join(shell_path(from_here(folder)) for folder in folders)
            yield f"compare them row by row: tunesmith eval {words}"
    yield f"adapter: {folder / FINAL}; try it: tunesmith chat {shell_path(folder)}"
    yield f"recipe to copy: {folder / RECIPE}"
    yield f"curves of all: tunesmith report {shell_path(folder.parent)}"
