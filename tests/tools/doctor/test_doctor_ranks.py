"""`tunesmith doctor --ranks`: what it reports of ranks that train like one process, and of others."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from invoke import invoke
from tunesmith.errors import RunError
from tunesmith.tools.doctor import ranks
from warm import fork_ranks, run_warm


@pytest.mark.slow
@pytest.mark.nightly
def test_two_ranks_train_like_one_process():
    done = run_warm(["doctor", "--ranks", "2", "--json"], prepare=fork_ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [found["case"] for found in json.loads(done.stdout)["findings"]]
    assert cases == ["ok", "ok", "ok"]


def records(*losses: float) -> list[SimpleNamespace]:
    return [SimpleNamespace(step=i, loss=loss, grad_norm=1) for i, loss in enumerate(losses, 1)]


def refused() -> RunError:
    return RunError("it failed", why="NCCL lost a rank")


@pytest.mark.parametrize(
    ("count", "found", "cases", "named"),
    [
        (2, records(5.0, 4.004), ["ok", "ok", "ok"], []),
        (3, records(5.0, 4.0), ["ok", "ok"], []),  # 3 ranks cannot share 8 heads
        (2, records(5.0, 4.4), ["other"] * 3, ["2", "loss", "4.4", "4"]),
        (2, refused(), ["fail"] * 3, ["NCCL lost a rank"]),
    ],
)
def test_each_kind_of_mesh_is_compared(monkeypatch, count, found, cases, named):
    def train(folder: Path, world: int, kind: str) -> list[SimpleNamespace]:
        assert (folder / "model.safetensors").is_file()
        if world > 1 and isinstance(found, RunError):
            raise found
        return records(5.0, 4.0) if world == 1 else found

    monkeypatch.setattr(ranks, "train_on_ranks", train)
    shown = invoke("doctor", "--ranks", count, "--json")
    findings = json.loads(shown.out)["findings"]
    assert [row["case"] for row in findings] == cases
    assert shown.code == (cases[0] != "ok")
    for row in findings:
        assert all(text in row["what"] + row["why"] for text in named)
