"""Text output of a sweep.

It is a table of the candidates, and lines about the best candidate: its loss, its difference to the
second candidate, and the paths of its files.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from tunesmith.host.files import relative_to_cwd
from tunesmith.host.shell import shell_path
from tunesmith.metrics.result_table import ResultTable
from tunesmith.run_dir import FINAL, RECIPE, weights_step
from tunesmith.tools.sweep.sweep_file import SweepResult


def sweep_lines(result: SweepResult) -> Iterator[str]:
    """Yield the lines of a table of the candidates, and lines about the best candidate.

    The candidates are sorted by loss. Diverged candidates are last.
    """
    candidates = sorted(
        result["candidates"], key=lambda c: math.inf if c["loss"] is None else c["loss"]
    )
    best, second, *_ = candidates
    name = result["compared_by"]
    # All candidates have the same keys.
    rows = [["", *(key.rpartition(".")[2] for key in best["values"]), "step", name, ""]]
    for candidate in candidates:
        number = candidate["name"].partition("-")[0]
        loss = "-" if candidate["loss"] is None else f"{candidate['loss']:.4f}"
        values = candidate["values"].values()
        rows.append([number, *values, str(candidate["step"]), loss, candidate["state"]])
    yield from ResultTable(rows).text().splitlines()
    if best["loss"] is None:
        yield f"none of {len(candidates)} candidates trained to the end"
        return
    folder = Path(relative_to_cwd(best["run_dir"]))
    step = weights_step(folder / FINAL) or best["step"]
    loss = f"{name} {best['loss']:.4f} after step {step}"
    yield f"best of {len(candidates)}: {best['name']}, {loss}"
    if second["loss"] is not None:
        gap = second["loss"] - best["loss"]
        yield f"second: {second['name']}, {name} {second['loss']:.4f}, which is {gap:.4f} higher"
        if name == "val_loss":
            other = shell_path(relative_to_cwd(second["run_dir"]))
            yield f"compare them row by row: tunesmith eval {shell_path(folder)} {other}"
    yield f"adapter: {folder / FINAL}; try it: tunesmith chat {shell_path(folder)}"
    yield f"recipe to copy: {folder / RECIPE}"
    yield f"curves of all: tunesmith report {shell_path(folder.parent)}"
