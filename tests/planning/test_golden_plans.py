"""The plans of all shipped recipes on all machines are those of golden/plans.json."""

from __future__ import annotations

import json
import os

import golden
import pytest
from same_bits import values_apart

from warm import run_warm

pytestmark = pytest.mark.slow


def test_plans_of_shipped_recipes_change_only_in_a_diff():
    # A minute on a quiet core; the models that are in no table are measured.
    done = run_warm(
        ["plans"],
        timeout=600,
        program=golden.__file__,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
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
