"""What the closing table says of the best candidate, from run directories written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from errors import holds
from report.written import falling, write_run
from tunesmith.tools.sweep.table import sweep_lines


def candidate(folder: Path, last: float) -> dict[str, Any]:
    """A candidate and its run, whose val_loss comes to `last`; two of them differ in the rate."""
    rate = {"train": {"learning_rate": last / 1000}}
    curve = falling(last + 0.99)
    write_run(folder, curve, recipe=rate, env={"validation_examples": 8})
    return {
        "name": folder.name,
        "run_dir": str(folder),
        "values": {"train.learning_rate": f"{last / 1000}"},
        "state": "finished",
        "step": 40,
        "loss": curve[40],
    }


def test_how_far_the_best_is_ahead_and_what_comes_next(tmp_path: Path) -> None:
    best, second, third = (
        candidate(tmp_path / name, loss)
        for name, loss in (("01-a", 1.0), ("02-b", 1.25), ("03-c", 2.0))
    )
    outcome = {"candidates": [third, second, best], "best": "01-a", "compared_by": "val_loss"}
    lines = list(sweep_lines(outcome))
    assert [line.split()[0] for line in lines[1:4]] == ["01", "02", "03"]
    assert lines[2].split() == ["02", "0.00125", "40", "1.2500", "finished"]
    assert holds(lines[4], "best of 3: 01-a", "1.0000")
    assert holds(lines[5], "02-b", "1.2500", "0.2500 higher")
    assert holds(lines[6], f"tunesmith eval {tmp_path / '01-a'} {tmp_path / '02-b'}")
    lines = list(sweep_lines(outcome | {"compared_by": "loss"}))
    assert not any("tunesmith eval" in line for line in lines), "training losses decide nothing"
