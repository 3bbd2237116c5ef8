"""A clock that stands still between two looks, as one of a virtual machine that was paused may: no
figure divides by it.
"""

from __future__ import annotations

import json
import time
import timeit
from pathlib import Path

import pytest
import torch

import playbook
from recipes import make_run
from records import record
from tunesmith.metrics import hardware
from tunesmith.metrics.run_figures import run_figures
from tunesmith.training.run import train
from tunesmith.units import ratio


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """`time.perf_counter`, and what `timeit` measures by, do not move; the clocks that waits go by
    do.
    """
    monkeypatch.setattr(time, "perf_counter", lambda: 1000.0)
    monkeypatch.setattr(timeit, "default_timer", lambda: 1000.0)


@pytest.mark.slow
@pytest.mark.usefixtures("still")
def test_a_run(tiny: Path, tmp_path: Path) -> None:
    train(make_run(tiny, tmp_path, held=False, train={"duration": "3 steps"}), quiet=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["tokens_per_second"] for line in lines] == [0.0] * 3


@pytest.mark.usefixtures("still")
def test_measured_rates_are_zero() -> None:
    assert ratio(5, 0) == 0.0
    assert ratio(6, 4) == 1.5
    assert hardware.matmul_tflops(torch.device("cpu"), torch.float32, size=8) == 0.0


def test_the_closing_figures_of_a_run() -> None:
    records = [record(step, step_seconds=0.0, mfu=0.5, mfu_peak_tflops=10.0) for step in (1, 2, 3)]
    [speed] = [line for line in run_figures(records, 0.0) if line.startswith("speed")]
    assert speed.endswith(" 0 tokens/s"), "no MFU is known of a time of none"
    assert "Steps per second: 0.00" in playbook.closing(records, 0.0)
