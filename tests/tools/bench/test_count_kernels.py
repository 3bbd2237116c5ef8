"""The count of a layer's kernels, on true shapes without their memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tunesmith.model.measured_spec import measure_spec
from tunesmith.model.shapes import find_shape
from tunesmith.planning.step_time import EXPERT_ROWS, GROUPED_ROWS
from warm import run_warm

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        not torch.__version__.startswith("2.13"),
        reason="Inductor's internals differ between releases",
    ),
]

ROOT = Path(__file__).parents[3]


EXPERTS, TOKENS = 16, 256  # 128 rows an expert: products of fewer than 65 count as skinny
# One process for both devices.
PROGRAM = f"""
import sys
import torch
from tunesmith.model.shapes import find_shape
sys.path.insert(0, {str(ROOT / "benchmarks/speed")!r})
import count_kernels
find_shape("qwen3-30b-a3b").config["num_experts"] = {EXPERTS}
for device in ("h100", "gb10"):
    torch.compiler.reset()
    words = "--shape qwen3-30b-a3b --bases bf16 --tokens {TOKENS} --json".split()
    sys.argv[1:] = [*words, f"{{device}}.json", "--device", device]
    count_kernels.main()
"""


def test_a_mixture_moves_what_the_plan_counts(tmp_path: Path) -> None:
    """Beside the copies for experts there are attention, norms and router, the same on each."""
    spec = measure_spec(find_shape("qwen3-30b-a3b").config | {"num_experts": EXPERTS}, where="test")
    layer = spec.layers[0]
    done = run_warm([], program=PROGRAM, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rest, planned_on = {}, {}
    for device in ("h100", "gb10"):
        counts = json.loads((tmp_path / f"{device}.json").read_text())["counts"]
        moved = 0.0
        for direction in ("forward", "backward"):
            row = counts[f"bf16, {direction}"]
            terms = row["terms"]
            active = 2 * TOKENS * layer.active / 1e12
            if device == "h100":
                # Of the tokens with the factors of all experts, of rank 8: two forward, four
                # backward.
                products = 2 if direction == "forward" else 4
                active += products * 2 * TOKENS * EXPERTS * 8 * spec.hidden / 1e12
            assert terms["products"]["tera_operations"] == pytest.approx(active, rel=0.01)
            gib = terms["skinny products"]["gib"] + terms["other kernels"]["gib"]
            moved += gib * 2**30 / TOKENS
        of_hidden, of_width = GROUPED_ROWS if device == "h100" else EXPERT_ROWS
        planned = of_hidden * layer.experts_per_token * spec.hidden + of_width * layer.intermediate
        planned_on[device] = 2 * planned
        rest[device] = moved - planned_on[device]
    # Norms, rotary embedding and small products of attention: some 40 to 90 rows of a token.
    assert 40 * 2 * spec.hidden < rest["gb10"] < 90 * 2 * spec.hidden, rest
    # The plan has more there, as those kernels do not reach the memory's bandwidth.
    counted = rest["h100"] - rest["gb10"] + planned_on["h100"]
    assert 0.3 < counted / planned_on["h100"] < 0.8, counted
