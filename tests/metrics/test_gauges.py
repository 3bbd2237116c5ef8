"""Gauges have the names of their record fields."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from ranks import run_ranks
from recipes import make_run
from tunesmith.metrics.gauges import Gauges, network_bytes
from tunesmith.metrics.record import read_records
from tunesmith.training.run import train

CPU = torch.device("cpu")


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


def test_rdma_ports_count_words_of_four_bytes_and_come_before_an_interface(tmp_path, monkeypatch):
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
    for port in (1, 2):
        counters = tmp_path / f"sys/class/infiniband/roce0/ports/{port}/counters"
        counters.mkdir(parents=True)
        for name, value in (("xmit_data", 10), ("rcv_data", 100), ("xmit_wait", 7)):
            (counters / f"port_{name}").write_text(f"{value}\n")
    assert network_bytes(tmp_path) == 880


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
