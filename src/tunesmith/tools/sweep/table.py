"""Text output of a sweep.

It is a table of the candidates, and lines about the best candidate: its loss, its difference to the
second candidate, and the paths of its files.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from tunesmith.host.files import relative_to_cwd
from tunesmith.host.shell import shell_path
from tunesmith.run_dir import FINAL, RECIPE, weights_step
from tunesmith.tools.sweep.sweep_file import CandidateResult, SweepResult


def sweep_lines(result: SweepResult) -> Iterator[str]:
    """Yield the lines of a table of the candidates, sorted by loss, and then `best_lines`."""
    candidates = _ranked(result)
    # Use the keys of the first candidate as column names, because all candidates have the same
    # keys.
    names = [key.rpartition(".")[2] for key in candidates[0]["values"]]
    rows = [["", *names, "step", result["compared_by"], ""]]
    for candidate in candidates:
        number = candidate["name"].partition("-")[0]
        loss = "-" if candidate["loss"] is None else f"{candidate['loss']:.4f}"
        values = candidate["values"].values()
        rows.append([number, *values, str(candidate["step"]), loss, candidate["state"]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # Do not wrap long lines, so that grep prints the entire row of a candidate.
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join(cells).rstrip()
    yield from best_lines(result)


def _ranked(result: SweepResult) -> list[CandidateResult]:
    """Return the candidates sorted by loss. Diverged candidates are last."""
    return sorted(result["candidates"], key=lambda c: math.inf if c["loss"] is None else c["loss"])


def best_lines(result: SweepResult) -> Iterator[str]:
    """Yield lines about the best candidate: loss, lead over the second candidate, file paths."""
    candidates = _ranked(result)
    best = candidates[0]
    if best["loss"] is None:
        yield f"none of {len(candidates)} candidates trained to the end"
        return
    folder = Path(relative_to_cwd(best["run_dir"]))
    step = weights_step(folder / FINAL) or best["step"]
    name = result["compared_by"]
    loss = f"{name} {best['loss']:.4f} after step {step}"
    yield f"best of {len(candidates)}: {best['name']}, {loss}"
    second = candidates[1]
    if second["loss"] is not None:
        gap = second["loss"] - best["loss"]
        yield f"second: {second['name']}, {name} {second['loss']:.4f}, which is {gap:.4f} higher"
        if name == "val_loss":
            folders = [Path(candidate["run_dir"]) for candidate in candidates[:2]]
            words = " ".join(shell_path(relative_to_cwd(folder)) for folder in folders)
            yield f"compare them row by row: tunesmith eval {words}"
    yield f"adapter: {folder / FINAL}; try it: tunesmith chat {shell_path(folder)}"
    yield f"recipe to copy: {folder / RECIPE}"
    yield f"curves of all: tunesmith report {shell_path(folder.parent)}"
