"""What the closing table says of the best candidate, from run directories written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from errors import holds
from report.written import falling, write_run
from tunesmith.tools.sweep.table import best_lines, sweep_lines


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


def lines_of(*candidates: dict[str, Any], compared_by: str = "val_loss") -> list[str]:
    best = min((c for c in candidates if c["state"] == "finished"), key=lambda c: c["loss"])
    outcome = {"candidates": candidates, "best": best["name"], "compared_by": compared_by}
    return list(best_lines(outcome))


def test_how_far_the_best_is_ahead_and_what_comes_next(tmp_path: Path) -> None:
    best = candidate(tmp_path / "01-a", 1.0)
    second = candidate(tmp_path / "02-b", 1.25)
    third = candidate(tmp_path / "03-c", 2.0)
    lines = lines_of(third, second, best)
    assert holds(lines[0], "best of 3: 01-a", "1.0000")
    assert holds(lines[1], "02-b", "1.2500", "0.2500 higher")
    assert holds(lines[2], f"tunesmith eval {tmp_path / '01-a'} {tmp_path / '02-b'}")
    assert holds(lines[-1], f"tunesmith report {tmp_path}")


def test_training_losses_decide_nothing(tmp_path: Path) -> None:
    lines = lines_of(
        candidate(tmp_path / "01-a", 1.0), candidate(tmp_path / "02-b", 2.0), compared_by="loss"
    )
    assert holds(lines[1], "02-b", "loss 2.0000", "1.0000 higher")
    assert not any("tunesmith eval" in line for line in lines)


def test_a_candidate_is_one_line_however_many_keys_vary(tmp_path: Path) -> None:
    candidates = [candidate(tmp_path / f"0{i}-a", float(i)) for i in (1, 2)]
    for one, value in zip(candidates, ("1e-05", "0.25"), strict=True):
        one["values"] = {f"train.key_number_{i}": value for i in range(12)}
    outcome = {"candidates": candidates, "best": "01-a", "compared_by": "val_loss"}
    heading, *rows = list(sweep_lines(outcome))[:3]
    assert [row.split() for row in rows] == [
        ["01", *["1e-05"] * 12, "40", "1.0000", "finished"],
        ["02", *["0.25"] * 12, "40", "2.0000", "finished"],
    ]
    # Numbers end where their heading does.
    assert {row.index(" 40") + 3 for row in rows} == {heading.index("step") + 4}
