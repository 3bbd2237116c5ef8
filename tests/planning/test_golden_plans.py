"""The plans of all shipped recipes on all machines are those of golden/plans.json."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import NoReturn

import golden
import pytest
from same_bits import values_apart

from warm import read_hub_settings, run_warm

RECIPES = Path(__file__).parents[2] / "recipes"
# `# Forecast at ...: a DGX Spark 91 GiB, 1,400 tokens/s; two 91 GiB, 2,800; an H100 67 GiB, 13,000`
FORECASTS = {
    "dgx-spark": "a DGX Spark", "2x-dgx-spark": "two", "h100": "an H100", "rtx-4090": "an RTX 4090",
}  # fmt: skip


def test_the_forecasts_in_the_comments_of_recipes_are_those_of_their_plans() -> None:
    plans = json.loads(golden.PLANS.read_text(encoding="utf-8"))
    compared = 0
    for file in sorted(RECIPES.glob("*.yaml")):
        comment = " ".join(re.findall("^# Forecast .*", file.read_text(), re.MULTILINE))
        for machine, words in FORECASTS.items():
            stated = re.search(rf"{words}:? (\d+) GiB, ([\d,]+)", comment)
            if stated is None:
                continue
            plan = plans[f"{file.stem} on {machine}"]
            speed = float(f"{plan['tokens_per_second']:.2g}")
            found = int(stated[1]), float(stated[2].replace(",", ""))
            assert found == (round(plan["phases.step"] / 2**30), speed), f"{file.name}, {words}"
            compared += 1
    assert compared >= 12 * 3 + 3 + 7  # with three machines, those of layers that stream, and one


def leave_network() -> None:
    """Before the plans: nothing of the Hub is there, and no name and no address is reached."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError("no network in this test")

    read_hub_settings()
    socket.socket.connect = refuse  # type: ignore[method-assign]
    socket.getaddrinfo = refuse


@pytest.mark.nightly
def test_plans_of_shipped_recipes_change_only_in_a_diff(tmp_path: Path) -> None:
    # A minute on a quiet core; the models that are in no table are measured.
    done = run_warm(
        ["plans"], timeout=600, program=golden.__file__, prepare=leave_network,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "no cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plans = json.loads(done.stdout)
    recipes = {name.partition(" on ")[0] for name in plans}
    assert len(plans) == len(recipes) * len(golden.MACHINES)
    difference = "\n".join(
        values_apart(json.loads(golden.PLANS.read_text(encoding="utf-8")), plans)
    )
    assert not difference, (
        f"golden | now; where it is meant: python benchmarks/parity/same_bits.py plans --write\n{difference}"
    )
