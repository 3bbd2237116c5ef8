"""The forecast of the goals: rates by device, planned layouts, measured figures in their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_goals import GOALS, MIXTURES, device_key
from gpu_rates import H200_OF_TORCH as RATES_OF_TORCH
from gpu_rates import MACHINES, RATES, read_results, with_measured

from errors import refuses
from tunesmith.host.chips import CHIPS
from tunesmith.model.shapes import SHAPES
from warm import run_warm

ROOT = Path(__file__).parents[3]
torch_2_13 = pytest.mark.skipif(
    not torch.__version__.startswith("2.13"), reason="Inductor's internals differ between releases"
)

MICRO = {
    "x W^T, 4096 x 4096": 0.8,
    "dy W, 4096 x 4096": 0.7,
    "x W^T, 1024 x 4096": "OutOfMemoryError('no room')",  # left out
    "x A^T, 4096 x 4096": 0.05,
    "low B^T, 14336 x 4096": 0.2,
    "dW = dy^T x in bf16, 4096 x 4096": 9.0,  # no product with a frozen weight
    "[x | low] [W | B]^T, 4096 x 4096": 9.0,
    "fp8 product of 16384 rows": 1.4,
    "fp8 product of 256 rows": 0.1,
    "varlen, bound 768": 1.0,
    "varlen, bound 768, both ways": 3.5,
}


def session(**reports: Any) -> dict[str, Any]:
    """A results.json of a GPU session."""
    done = {"exit": 0, "seconds": 9.0}
    steps = {name: {**done, "report": report} for name, report in reports.items()}
    device = {"name": "NVIDIA H200", "copy_tb_per_s": 4.2, "product_tflops": 780.0}
    return {"stage": "B", "device": device, "steps": steps}


def test_every_goal_is_of_a_shape_and_of_devices_that_are_known() -> None:
    for device, machine in MACHINES.items():
        assert machine in CHIPS
        if device in GOALS[0].tokens_per_second:
            assert device_key(CHIPS[machine].name) == device
    assert {goal.shape for goal in (*MIXTURES, *GOALS)} <= set(SHAPES)
    for name in ("PCIe", "80GB HBM3 MIG 1g.10gb"):
        assert device_key(f"NVIDIA H100 {name}") is None
    for goal in GOALS:
        assert set(goal.tokens_per_second) == {"h100", "h200"} < set(RATES)
        assert goal.tokens_per_second["h100"] < goal.tokens_per_second["h200"]


def test_measured_figures_take_the_place_of_assumed_ones() -> None:
    rates = with_measured(RATES["h200"], session(micro={"milliseconds": MICRO}))
    n = 16384
    assert (rates.copy, rates.product) == (4.2e12, 780e12)
    moved = 2 * (n * 4096 + 8 * (n + 4096)) + 2 * (n * 14336 + 8 * (n + 14336))
    assert rates.skinny_bandwidth == pytest.approx(moved / 0.25e-3)
    assert rates.eight_bit_product == pytest.approx(2 * n * 4096 * 14336 / 1.4e-3)
    assert rates.attention_ms == pytest.approx((32 * 1.0, 32 * 2.5))
    replaced = {name for name, source in rates.sources.items() if source.startswith("measured ")}
    assert "memory_share" not in replaced
    assert rates.sources["skinny_share"] == "measured by micro.py"


def test_without_a_measurement_attention_follows_the_product_and_the_rest_stays() -> None:
    old = RATES["h200"]
    slower = {"name": "NVIDIA H200", "product_tflops": 335.0}
    rates = with_measured(old, {"device": slower, "steps": {}})
    assert rates.attention_ms == pytest.approx([2 * ms for ms in old.attention_ms])
    assert (rates.copy, rates.skinny_share) == (old.copy, old.skinny_share)
    failed = {"micro": {"exit": 124, "seconds": 70.0, "report": None}}
    assert with_measured(old, {"device": {"name": "NVIDIA H200"}, "steps": failed}) == old


def test_several_results_are_read_as_one(tmp_path: Path) -> None:
    first, second = session(micro={"milliseconds": MICRO}), session(other={})
    second["device"]["copy_tb_per_s"] = None
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for file, results in zip(files, (first, second), strict=True):
        file.write_text(json.dumps(results))
    merged = read_results(files)
    assert set(merged["steps"]) == {"micro", "other"}
    assert merged["device"]["copy_tb_per_s"] == 4.2
    second["device"]["name"] = "NVIDIA H100 80GB HBM3"
    files[1].write_text(json.dumps(second))
    with refuses(ValueError, names=["devices"]):
        read_results(files)


# Of the step of an 8B in bf16 in ms, by a profile of it on an H200 (26 November 2026).
PROFILED_8B = {"skinny products": 64, "attention": 69}
# Measured with torch's attention.
OF_TORCH = ("3b-full", "70b-nf4")


@pytest.mark.nightly
@torch_2_13
def test_steps_of_an_h200_are_as_forecast(tmp_path: Path) -> None:
    words = ["--device", "h200", "--only", 0, 1, 2, 3, "--json", tmp_path / "forecast.json"]
    done = run_warm(words, program=ROOT / "benchmarks/speed/forecast.py")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "forecast.json").read_text())
    measured = read_results([ROOT / "docs/measurements/gpu/h200/results-A.json"])["steps"]
    slower = sum(RATES_OF_TORCH.attention_ms) / sum(RATES["h200"].attention_ms)
    for goal in GOALS:
        found = report["goals"][goal.title]
        terms, layout = found["terms"], found["layout"]
        if goal.step in OF_TORCH:
            terms["attention"]["ms"] *= slower
        step_ms = sum(term["ms"] for term in terms.values())
        tokens = layout["tokens"] * layout["micro_batches"]
        speed = measured[goal.step]["report"]["figures"]["tokens_per_second"]
        # What rounds to 8 bits there is more kernels than one traced layer has.
        tolerance = 0.09 if goal.base == "fp8" else 0.04
        assert 1e3 * tokens / step_ms == pytest.approx(speed, rel=tolerance), goal.title
    found = report["goals"][GOALS[0].title]
    terms = found["terms"]
    terms["attention"]["ms"] *= slower  # as it was profiled
    for name, ms in PROFILED_8B.items():
        assert terms[name]["ms"] == pytest.approx(ms, rel=0.15), name
    assert terms["products"]["ms"] + found["head_products"]["ms"] == pytest.approx(785, rel=0.15)
