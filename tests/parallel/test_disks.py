"""Nodes that do not share a disk: what all ranks must write there is refused, and a checkpoint is copied by hand."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ranks import run_ranks
from recipes import make_run
from tunesmith.errors import TunesmithError
from tunesmith.training.run import train


def start(model: Path, folder: Path, steps: int, changes: dict[str, Any]) -> Any:
    """One start on this rank, whose run directory is of its own; its first step and number of steps, or the error."""
    node = folder / f"node-{os.environ['RANK']}"
    node.mkdir(exist_ok=True)
    os.chdir(node)
    train_for = {"duration": f"{steps} steps", "schedule": "constant"}
    run = make_run(model, folder, held=False, output_dir="run", train=train_for, parallel={"replicate": 2}, **changes)
    try:
        result = train(run, say=None)
    except TunesmithError as error:
        return f"{type(error).__name__}: {error}"
    return result.first_step, result.steps


def test_a_model_trained_in_full_needs_a_shared_disk(tiny, tmp_path):
    first, second = run_ranks(2, start, tiny, tmp_path, 2, {"adapter": {"kind": "none"}})
    assert "MachineError" in first
    assert "rank 1 on" in first
    assert "does not see the run directory" in first
    assert second.startswith("OtherRankError")
    assert not (tmp_path / "node-0" / "run").exists()  # a refused start leaves no trace


def test_an_adapter_is_kept_by_rank_0_and_resumed_from_a_copy(tiny, tmp_path):
    assert run_ranks(2, start, tiny, tmp_path, 2, {}) == [(0, 2), (0, 2)]
    assert "which alone keeps checkpoints" in (tmp_path / "node-0" / "run" / "log.txt").read_text()
    assert not (tmp_path / "node-1" / "run").exists()
    first, second = run_ranks(2, start, tiny, tmp_path, 4, {})
    assert "OtherRankError: error: rank 1 on" in first
    assert "this node has no checkpoint-2" in second
    shutil.copytree(tmp_path / "node-0" / "run", tmp_path / "node-1" / "run")
    assert run_ranks(2, start, tiny, tmp_path, 4, {}) == [(2, 4), (2, 4)]
