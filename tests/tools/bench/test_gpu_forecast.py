"""The forecast of the goals: rates by device, planned layouts, measured figures in their place."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_goals import GOALS, MIXTURES, device_key
from gpu_rates import H200_OF_TORCH as RATES_OF_TORCH
from gpu_rates import (
    MACHINES,
    RATES,
    SKINNY_OF_MICRO,
    read_results,
    with_measured,
)

from errors import lines_with, refuses
from tunesmith.host.chips import CHIPS
from tunesmith.model.shapes import SHAPES
from warm import run_warm

ROOT = Path(__file__).parents[3]
torch_2_13 = pytest.mark.skipif(
    not torch.__version__.startswith("2.13"),
    reason="Inductor's internals differ between releases",
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
    steps = {}
    for name, report in reports.items():
        steps[name] = {"exit": 0, "seconds": 9.0, "report": report}
    device = {"name": "NVIDIA H200", "copy_tb_per_s": 4.2, "product_tflops": 780.0}
    return {"stage": "B", "device": device, "steps": steps}


def run_forecast(*words: object) -> subprocess.CompletedProcess[str]:
    return run_warm(list(words), program=ROOT / "benchmarks/speed/forecast.py")


def test_every_goal_is_of_a_shape_and_of_devices_that_are_known() -> None:
    assert {MACHINES[device] for device in RATES} <= set(CHIPS)
    for goal in MIXTURES:
        assert goal.shape in SHAPES
        assert set(goal.tokens_per_second) == {"gb10"}
    for goal in GOALS:
        assert goal.shape in SHAPES
        assert set(goal.tokens_per_second) == {"h100", "h200"} < set(RATES)
        assert goal.tokens_per_second["h100"] < goal.tokens_per_second["h200"]


@pytest.mark.parametrize(
    ("gpu", "device"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GB10", None),
        ("NVIDIA GH200 480GB", None),
        ("cpu", None),
    ],
)
def test_the_device_of_a_gpu_name(gpu: str, device: str | None) -> None:
    assert device_key(gpu) == device


def test_the_devices_are_those_of_the_planner() -> None:
    for goal in GOALS:
        for device in goal.tokens_per_second:
            assert device_key(CHIPS[MACHINES[device]].name) == device


def test_the_rate_of_8_bits_is_that_of_the_products_of_a_layer() -> None:
    """Of an 8B's layer, forward, in 16,384 rows; k and v were measured in 4,096."""
    kernels = json.loads((ROOT / "docs/measurements/gpu/h200/pairs.json").read_text())[
        "kernels, ms"
    ]
    measured = kernels["e4m3 product, full and fast sums, bf16; 26 November 2026"]
    milliseconds = (
        2 * measured["16384 rows, 4096 to 4096"][0]
        + 2 * 4 * measured["4096 rows, 4096 to 1024"][0]
        + 2 * measured["16384 rows, 4096 to 14336"][0]
        + measured["16384 rows, 14336 to 4096"][0]
    )
    weights = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    speed = 2 * 16384 * weights / (milliseconds / 1e3) / RATES["h200"].product
    assert RATES["h200"].eight_bit_speed == pytest.approx(speed, abs=0.01)


def test_goals_rates_and_terms_need_no_torch() -> None:
    code = "import sys, gpu_goals, gpu_rates, kernel_terms; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "benchmarks" / "speed",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


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


def test_the_names_are_those_of_micro() -> None:
    source = (ROOT / "benchmarks/speed/micro.py").read_text(encoding="utf-8")
    source = re.sub(r"timed\(\s+", "timed(", source)
    for product in SKINNY_OF_MICRO:
        assert f'timed(f"{product}, {{shape}}"' in source
    for name in ("fp8 product of {rows} rows", "{backend}, bound {bound}, both ways"):
        assert f'timed(f"{name}"' in source


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


@pytest.mark.slow
def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(session()))
    for words, message in [
        (["--device", "h100", "--measured", file], "do not fit"),
        (["--assume", "speed=3"], "is none of"),
        (["--measured", tmp_path / "missing.json"], "missing.json"),
    ]:
        done = run_forecast(*words)
        assert done.returncode == 2
        assert message in done.stderr


PROFILED_TERMS = {
    "products": 614.0,
    "skinny products": 300.0,
    "other kernels": 60.0,
    "attention": 141.0,
    "other": 5.0,
}


@pytest.fixture(scope="module")
def of_h200(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The report and the output of a forecast of four goals with a profile of the first beside it."""
    folder = tmp_path_factory.mktemp("forecast")
    figures = {
        "tokens_per_second": 16384 / 1.13,
        "micro_batch": "8192 tokens",
        "recomputed_layers": 0,
    }
    file = folder / "results.json"
    profiled = {"8b-bf16-profile": {"figures": figures, "terms_ms_a_step": PROFILED_TERMS}}
    file.write_text(json.dumps(session(**profiled)))
    words = ["--only", 0, 1, 2, 3, "--beside", file]
    done = run_forecast(*words, "--json", folder / "forecast.json")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "forecast.json").read_text()), done.stdout


@pytest.mark.slow
@torch_2_13
def test_the_forecast_and_a_profile_beside_it(of_h200: tuple[dict[str, Any], str]) -> None:
    report, output = of_h200
    assert report["device"] == "h200", "that of the profile"
    bf16, fp8 = (report["goals"][goal.title] for goal in GOALS[:2])
    assert bf16["layout"] == {"tokens": 16384, "micro_batches": 1, "recomputed_layers": 0}
    step = sum(term["ms"] for term in bf16["terms"].values())
    assert bf16["tokens_per_second"] == pytest.approx(16384e3 / step)
    operations = 4 * 16384 * 6.98e9 / 1e12  # 6.98 billion weights in the layers' matrices
    assert bf16["terms"]["products"]["tera_operations"] == pytest.approx(operations, rel=0.01)
    # Arithmetic alone: the base's products take the product's rate, in 8 bits 1.97 times that.
    ratio = bf16["terms"]["products"]["ms"] / fp8["terms"]["products"]["ms"]
    assert ratio == pytest.approx(1.97, rel=0.01)
    rows = {row["term"]: row for row in report["beside"][GOALS[0].title]}
    head = bf16["head_products"]["ms"]
    products = rows["products, the head's too"]
    assert products["forecast"] == pytest.approx(bf16["terms"]["products"]["ms"] + head)
    assert rows["other kernels, loss and optimizer too"]["measured"] == 65.0
    assert rows["no kernel"]["measured"] == pytest.approx(1130 - sum(PROFILED_TERMS.values()))
    assert lines_with(output, 2, "8,192 tokens"), "as the measured run was cut"
    assert lines_with(output, "skinny")
    assert lines_with(output, GOALS[1].title)


# Of the step of an 8B in bf16 in ms, by a profile of it on an H200 (26 November 2026).
PROFILED_8B = {"skinny products": 64, "attention": 69}
# Measured with torch's attention.
OF_TORCH = ("3b-full", "70b-nf4")


@pytest.mark.slow
@torch_2_13
def test_steps_of_an_h200_are_as_forecast(of_h200: tuple[dict[str, Any], str]) -> None:
    report, _ = of_h200
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
