"""Gauges and peaks of the machine, and env.json, which is an allow-list."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ranks import run_ranks
from recipes import make_run
from tunesmith.host.chips import Peak, peak_of
from tunesmith.metrics.gauges import Gauges
from tunesmith.metrics.hardware import describe_machine, find_peak
from tunesmith.metrics.record import read_records
from tunesmith.start.run import train


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        # One name is the beginning of another.
        ("NVIDIA H200", 989.5), ("NVIDIA H200 NVL", 835.5), ("NVIDIA H100 PCIe", 756.5), ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0), ("NVIDIA L40", 181.0), ("NVIDIA L4", 121.0), ("NVIDIA GB10", 92.0), ("NVIDIA GB200", 2500.0),
        ("NVIDIA A10G", 70.0), ("NVIDIA A10", 125.0), ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 468.0),
        # Chips of other speeds that are named like a chip of the table.
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3090 Ti", None),
        ("Quadro RTX 6000", None), ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
    ],
)  # fmt: skip
def test_a_name_finds_its_own_peak_and_no_other(name: str, tflops: float | None) -> None:
    found = peak_of(name)
    assert found.tflops == tflops
    assert bool(found.source) == (tflops is not None)
    assert found.published == (tflops is not None and "GB10" not in name)


@pytest.mark.parametrize(
    ("name", "integrated", "tflops"),
    [("NVIDIA GB10", True, 92.0), ("NVIDIA Thor", True, 7.0), ("NVIDIA Tesla X9", False, None)],
)
def test_an_integrated_chip_without_a_published_peak_is_measured_and_says_so(
    monkeypatch, name, integrated, tflops
):
    chip = SimpleNamespace(name=name, is_integrated=integrated)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    monkeypatch.setattr("tunesmith.metrics.hardware.matmul_tflops", lambda device, dtype: 7.0)
    found = find_peak(torch.device("cuda"), torch.bfloat16)
    assert (found.tflops, found.published) == (tflops, False)
    assert ("measured" in found.source) == (tflops is not None)
    assert find_peak(torch.device("cpu"), torch.bfloat16) == Peak(None, "")


def test_the_description_is_an_allow_list(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    monkeypatch.setenv("A_VARIABLE", "its-value")
    found = describe_machine(["tunesmith", "train", "r.yaml"])
    assert {"python", "torch", "transformers", "peft", "gpus", "commit", "command"} <= set(found)
    text = json.dumps(found)
    assert "hf_abc" not in text
    assert "its-value" not in text
    # `torch.__version__` may add +cu130 to it
    assert found["torch"] == importlib.metadata.version("torch")


def test_gauges_are_read_once_in_their_interval_and_one_that_fails_never_again(monkeypatch):
    asked = []

    def missing(device: torch.device) -> int:
        asked.append("temperature")
        raise RuntimeError("not supported")

    monkeypatch.setattr(torch.cuda, "utilization", lambda d: asked.append("utilization") or 97)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda d: 612_345)
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda d: 1980)
    monkeypatch.setattr(torch.cuda, "temperature", missing)
    for every, utilizations in ((60.0, 1), (0.0, 3)):
        asked.clear()
        gauges = Gauges(torch.device("cuda"), every=every)
        for _ in range(3):
            found = dict(gauges.read())
            assert 0 < found.pop("host_memory_percent") < 100
            assert found == {
                "gpu_utilization": 97.0,
                "gpu_power_watts": 612.345,
                "gpu_clock_mhz": 1980.0,
            }
        assert sorted(asked) == ["temperature", *["utilization"] * utilizations]


def train_briefly(model: Path, folder: Path) -> None:
    train(make_run(model, folder, held=False, train={"duration": "2 steps"}), quiet=True)


@pytest.mark.slow
def test_other_ranks_write_records_of_their_own(tiny: Path, tmp_path: Path) -> None:
    run_ranks(2, train_briefly, tiny, tmp_path)
    first, other = (
        read_records(tmp_path / "run" / f"metrics{rank}.jsonl") for rank in ("", "-rank1")
    )
    assert [(r.step, r.loss) for r in first] == [(r.step, r.loss) for r in other]
    assert len(first) == 2
    assert {r.data_seconds for r in first} != {r.data_seconds for r in other}
    assert all(r.network_bytes_per_second is not None and r.host_memory_percent for r in first[1:])
