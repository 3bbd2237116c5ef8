"""What a sweep found, for a person: a table, the best candidate, what it was chosen from, and the recipe to copy."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.host.files import from_here
from tunesmith.host.shell import shell_path
from tunesmith.report.page import write_report
from tunesmith.report.run_files import RunFiles, holds_run
from tunesmith.run_dir import FINAL, RECIPE

ORDER = ("finished", "stopped", "diverged", "waiting")


def sweep_page(outcome: Mapping[str, Any]) -> Path | None:
    """Write the report of all candidates beside sweep.json, and return its place; None where no candidate has begun."""
    runs = [
        RunFiles(folder) for c in outcome["candidates"] if holds_run(folder := Path(c["run_dir"]))
    ]
    if not runs:
        return None
    page = runs[0].folder.parent / "report.html"
    write_report(runs, page, note="; ".join(best_lines(outcome)))
    return page


def sweep_lines(outcome: Mapping[str, Any]) -> Iterator[str]:
    """The lines of an outcome, as sweep.json holds it: those that came furthest first, then by loss; then the best one."""
    candidates, compared = outcome["candidates"], outcome["compared_by"]
    keys = list(candidates[0]["values"]) if candidates else []
    rows = [["", *(key.rpartition(".")[2] for key in keys), "step", compared, ""]]
    for c in sorted(
        candidates, key=lambda c: (ORDER.index(c["state"]), -c["step"], c["loss"] or 0.0)
    ):
        loss = "-" if c["loss"] is None else f"{c['loss']:.4f}"
        rows.append(
            [c["name"].partition("-")[0], *c["values"].values(), str(c["step"]), loss, c["state"]]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield from best_lines(outcome)


def best_lines(outcome: Mapping[str, Any]) -> Iterator[str]:
    """The best candidate, what it was chosen from, and where its adapter and its recipe lie."""
    candidates, compared = outcome["candidates"], outcome["compared_by"]
    states = Counter(c["state"] for c in candidates)
    chosen = ", ".join(f"{states[state]} {state}" for state in ORDER if states[state])
    best = next((c for c in candidates if c["name"] == outcome["best"]), None)
    if best is None:
        yield f"no candidate trained to the end: {chosen}"
        return
    folder = Path(from_here(best["run_dir"]))
    yield f"best: {best['name']}, {compared} {best['loss']:.4f} after step {best['step']}; of {len(candidates)}: {chosen}"
    yield f"adapter: {folder / FINAL}; try it: tunesmith chat {shell_path(folder)}"
    yield f"recipe to copy: {folder / RECIPE}"
