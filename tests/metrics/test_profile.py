"""`profile:` leaves for each rank and cycle a trace that tools open, with a memory track."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import refuses
from recipes import make_run
from tunesmith.config.schema import Profile
from tunesmith.errors import UsageError
from tunesmith.metrics.profile import Profiler
from tunesmith.start.run import train


def traced(folder: Path, steps: int, rank: int = 0, **settings: Any) -> list[list[dict]]:
    """The events of each trace that so many steps leave."""
    settings = {"enabled": True, "wait": 0, "warmup": 1, "active": 2} | settings
    profiler = Profiler(Profile(**settings), folder, rank=rank, device=torch.device("cpu"))
    with profiler:
        for _ in range(steps):
            torch.ones(64, 64) @ torch.ones(64, 64)
            profiler.step()
    files = sorted(folder.glob(f"rank{rank}.*.pt.trace.json.gz"))
    assert sorted(map(str, files)) == sorted(map(str, profiler.traces))
    return [json.loads(gzip.decompress(file.read_bytes()))["traceEvents"] for file in files]


@pytest.mark.parametrize(
    ("steps", "settings", "active"),
    [
        (12, {"rank": 1, "wait": 1, "active": 3, "cycles": 2}, [3, 3]),
        (5, {"active": 50}, [4]),  # a run that ends early
        (4, {"rank": 0, "ranks": (1,)}, []),
    ],
)
def test_each_cycle_of_a_named_rank_leaves_its_active_steps(steps, settings, active, tmp_path):
    traces = traced(tmp_path, steps, **settings)
    products = [sum(e.get("name") == "aten::mm" and e.get("ph") == "X" for e in t) for t in traces]
    assert products == active
    assert active or not list(tmp_path.iterdir())


def test_a_rank_that_is_not_there_is_refused(tiny: Path, tmp_path: Path) -> None:
    with refuses(UsageError, where="profile.ranks", names=["rank 3"], fix=["profile.ranks=[0]"]):
        train(make_run(tiny, tmp_path, profile={"enabled": True, "ranks": [3]}), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_is_profiled_on_all_ranks_unless_told_otherwise(tiny: Path, tmp_path: Path) -> None:
    settings = {"enabled": True, "wait": 0, "warmup": 1, "active": 2}
    run = make_run(tiny, tmp_path, held=False, train={"duration": "4 steps"}, profile=settings)
    train(run, quiet=True)
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {"aten::mm", "[memory]"} <= {event.get("name") for event in events}
