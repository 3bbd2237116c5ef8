"""Gauges by the names of their fields; a chip that is slow is named once, with what holds it back."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from errors import holds
from ranks import run_ranks
from recipes import make_run
from tunesmith.host.chips import Peak
from tunesmith.metrics.health import (
    ChipCheck,
    Gauges,
    network_bytes,
)
from tunesmith.metrics.record import read_records
from tunesmith.training.run import train

CPU = torch.device("cpu")


def test_without_a_gpu_the_hosts_memory_is_the_only_gauge() -> None:
    found = Gauges(CPU).read()
    assert [*found] == ["host_memory_percent"]
    assert 0 < found["host_memory_percent"] < 100


def gpu_gauges(monkeypatch: pytest.MonkeyPatch, **gauges: object) -> None:
    for name in ("utilization", "power_draw", "clock_rate", "temperature"):
        monkeypatch.setattr(torch.cuda, name, gauges[name])


def test_a_gauge_that_fails_is_not_asked_again_and_the_others_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def missing(device: torch.device) -> int:
        asked.append(device)
        raise RuntimeError("not supported")

    known = {"utilization": lambda d: 97, "clock_rate": lambda d: 1980, "temperature": lambda d: 66}
    gpu_gauges(monkeypatch, power_draw=missing, **known)
    gauges = Gauges(torch.device("cuda"), every=0.0)
    for _ in range(2):
        found = dict(gauges.read())
        assert 0 < found.pop("host_memory_percent") < 100
        assert found == {
            "gpu_utilization": 97.0,
            "gpu_clock_mhz": 1980.0,
            "gpu_temperature_celsius": 66.0,
        }
    assert len(asked) == 1


def test_gauges_are_read_once_in_their_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    known = {
        "utilization": lambda d: asked.append(d) or 97,
        "clock_rate": lambda d: 1,
        "temperature": lambda d: 2,
    }
    gpu_gauges(monkeypatch, power_draw=lambda d: 612_345, **known)
    gauges = Gauges(torch.device("cuda"), every=60.0)
    assert [gauges.read()["gpu_power_watts"] for _ in range(3)] == [612.345] * 3
    assert len(asked) == 1


def test_rdma_ports_count_words_of_four_bytes_and_come_before_an_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=cable0,cable1")
    statistics = tmp_path / "sys/class/net/cable0/statistics"
    statistics.mkdir(parents=True)
    (statistics / "rx_bytes").write_text("1000\n")
    (statistics / "tx_bytes").write_text("24\n")
    assert network_bytes(tmp_path) == 1024
    gauges = Gauges(CPU, links=True, every=0.0, root=tmp_path)
    gauges.read()
    (statistics / "tx_bytes").write_text("1000024\n")
    time.sleep(0.01)
    assert 0 < gauges.read()["network_bytes_per_second"] < 1e8  # a million bytes in 10 ms or more
    statistics.rename(tmp_path / "away")  # an interface that is made anew is asked again
    assert "network_bytes_per_second" not in gauges.read()
    (tmp_path / "away").rename(statistics)
    gauges.read()
    (statistics / "tx_bytes").write_text("2000024\n")
    assert gauges.read()["network_bytes_per_second"] > 0
    for port in (1, 2):
        counters = tmp_path / f"sys/class/infiniband/roce0/ports/{port}/counters"
        counters.mkdir(parents=True)
        (counters / "port_xmit_data").write_text("10\n")
        (counters / "port_rcv_data").write_text("100\n")
        (counters / "port_xmit_wait").write_text("7\n")
    assert network_bytes(tmp_path) == 880


def test_a_chip_that_slows_down_is_named_once_and_again_after_it_was_well() -> None:
    check = ChipCheck(CPU, torch.float32, Peak())
    check.best = 2.0
    readings = [2.0, 1.3, 1.3, 1.3, 1.3, 1.9, 1.0, 1.0, 1.0]
    faults = [check.fault(tflops) for tflops in readings]
    assert [bool(fault) for fault in faults] == [
        False,
        False,
        False,
        True,
        False,
        False,
        False,
        False,
        True,
    ]
    assert "65%" in faults[3]
    assert "fix: " in faults[3]


def test_a_chip_far_below_its_published_peak_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """GB10's low-power state: slow from the start, and NVML shows no reason."""
    check = ChipCheck(CPU, torch.float32, Peak(92.0, "a sheet"))
    check.device, check.best = torch.device("cuda"), 14.0
    fault = check.fault(14.0)
    assert holds(fault, "14 TFLOP/s", 92, "nvidia-smi", "30 s")
    check.best = 60.0
    assert check.fault(60.0) == ""


def test_a_check_is_due_once_in_its_interval_and_its_speed_is_the_products() -> None:
    check = ChipCheck(CPU, torch.bfloat16, Peak(), every=60.0)
    assert 1e-4 < check.first() < 100
    assert check.read() is None
    check.every = 0.0
    tflops = check.read()
    assert tflops is not None
    assert check.best >= tflops > 1e-4


def test_on_a_gpu_a_check_is_read_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[bool] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None: ...

        def record(self) -> None: ...

        def query(self) -> bool:
            return bool(done)

        def elapsed_time(self, other: object) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(True))
    check = ChipCheck(CPU, torch.float32, Peak(), every=0.0)
    check.device = torch.device("cuda")
    assert check.first() == pytest.approx(check.work / 0.002 / 1e12)
    done.clear()
    assert [check.read(), check.read()] == [None, None]
    done.append(True)
    assert check.read() is not None


def train_for(steps: int, model: Path, folder: Path) -> None:
    train(
        make_run(
            model,
            folder,
            held=False,
            output_dir=str(folder / "run"),
            train={"duration": f"{steps} steps"},
        )
    )


@pytest.mark.slow
def test_other_ranks_write_records_of_their_own(tiny: Path, tmp_path: Path) -> None:
    for steps in (2, 3):
        run_ranks(2, train_for, steps, tiny, tmp_path)
    first, other = (
        read_records(tmp_path / "run" / f"metrics{rank}.jsonl") for rank in ("", "-rank1")
    )
    assert [(r.step, r.loss) for r in first] == [(r.step, r.loss) for r in other]
    assert len(first) == 3
    assert {r.data_seconds for r in first} != {r.data_seconds for r in other}
    assert all(r.network_bytes_per_second is not None and r.host_memory_percent for r in first[1:])
