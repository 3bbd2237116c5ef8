"""A run under torchrun itself: it starts killed ranks again, and hands a SIGTERM of its own on to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ranks import run_ranks
from recipes import make_run, recipe
from tunesmith.checkpoint import nodes
from tunesmith.training.run import train

CHANGES = {
    "adapter": {"kind": "none"}, "parallel": {"shard": 2},
    "train": {"duration": "60 steps", "compile": "off"}, "checkpoint": {"every": "5 steps", "keep": 2},
}  # fmt: skip


def records(out: Path) -> list[dict[str, Any]]:
    """The steps in metrics.jsonl, without a line that is being written."""
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True) if (out / "metrics.jsonl").exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for(torchrun: subprocess.Popen[str], out: Path, condition: Any) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 240
    while not condition(found := records(out)):
        assert torchrun.poll() is None, torchrun.communicate()[0]
        assert time.monotonic() < deadline, f"{len(found)} steps"
        time.sleep(0.01)
    return found


def rank_of(torchrun: subprocess.Popen[str], number: int) -> int:
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    said = f"\0RANK={number}\0".encode()
    return next(int(child) for child in children if said in Path(f"/proc/{child}/environ").read_bytes())


def start(model: Path, folder: Path, name: str) -> tuple[int, list[tuple[float, float]]]:
    """A start on this rank: its first step, and loss and gradient norm of each."""
    result = train(make_run(model, folder, held=False, output_dir=str(folder / name), **CHANGES), say=None)
    return result.first_step, [(record.loss, record.grad_norm) for record in result.records]


def test_torchrun_starts_a_killed_rank_again_and_a_sigterm_to_it_saves(tiny: Path, tmp_path: Path):
    _, whole = run_ranks(2, start, tiny, tmp_path, "whole")[0]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(tiny, tmp_path, held=False, **CHANGES)))
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "--max-restarts", "1", "-m", "tunesmith", "train", str(tmp_path / "recipe.yaml")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    torchrun = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    try:
        wait_for(torchrun, out, lambda found: found and found[-1]["step"] >= 12)
        os.kill(rank_of(torchrun, 1), signal.SIGKILL)
        wait_for(torchrun, out, lambda found: (out / "failure.json").exists())
        assert "rank 1 on" in json.loads((out / "failure.json").read_text())["what"]
        wait_for(torchrun, out, lambda found: not (out / "failure.json").exists() and found[-1]["step"] >= 24)
        torchrun.send_signal(signal.SIGTERM)
        printed = torchrun.communicate(timeout=120)[0]
    finally:
        torchrun.kill()
    assert printed.count("error: rank 1 on") == 1, printed
    assert printed.count("stopped by SIGTERM: step") == 1, printed
    stopped = json.loads((out / "stopped.json").read_text())
    found = nodes.newest_checkpoint(out, lambda text: None)
    assert found is not None
    assert stopped["signal"] == "SIGTERM"
    assert stopped["step"] == found.step == records(out)[-1]["step"]
    assert torchrun.returncode == 1  # torchrun's own: it was signalled; the ranks' are 0
    first, resumed = run_ranks(2, start, tiny, tmp_path, "run")[0]
    assert first == found.step
    assert resumed == whole[first:]
    assert [(record["loss"], record["grad_norm"]) for record in records(out)] == whole
