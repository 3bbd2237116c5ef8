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
from recipes import recipe
from records import record
from tunesmith.cli.main import main
from tunesmith.config.dump import to_yaml
from tunesmith.metrics import hardware
from tunesmith.metrics.run_figures import run_figures
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
@pytest.mark.parametrize(
    "words", [["train"], ["bench", "--steps", "2", "--warmup", "1"]], ids=lambda words: words[0]
)
def test_a_run_and_a_bench(
    words: list[str],
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe(tiny, tmp_path, held=False, output_dir=str(tmp_path / "run"))))
    verb, *flags = words
    assert main([verb, str(file), *flags, "train.duration=3 steps"]) == 0, capsys.readouterr().err
    if verb == "train":
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
