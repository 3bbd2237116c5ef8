"""A run under torchrun: it starts killed ranks again, and hands a SIGTERM on to them."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from recipes import recipe
from tunesmith.checkpoint import replicate
from warm import Warm, fork_ranks

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

CHANGES = {
    "adapter": {"kind": "none"}, "parallel": {"shard": 2},
    "train": {"duration": "1000 steps", "schedule": "constant", "compile": "off"},
    "checkpoint": {"every": "5 steps", "keep": 2},
}  # fmt: skip


def records(out: Path) -> list[dict[str, Any]]:
    """The steps in metrics.jsonl, without a line that is being written."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for(torchrun: Warm, out: Path, condition: Any) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 240
    while not condition(found := records(out)):
        assert torchrun.poll() is None, torchrun.communicate()
        assert time.monotonic() < deadline, f"{len(found)} steps"
        time.sleep(0.02)
    return found


def test_torchrun_starts_a_killed_rank_again_and_a_sigterm_to_it_saves(tiny: Path, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(tiny, tmp_path, held=False, **CHANGES)))
    out = tmp_path / "run"
    words = "--standalone --nproc-per-node 2 --max-restarts 1 -m tunesmith train".split()
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [*words, str(tmp_path / "recipe.yaml")]
    torchrun = Warm(command, env=env, prepare=fork_ranks, program="torch.distributed.run")
    try:
        wait_for(torchrun, out, lambda found: len(found) > 5 and any(out.glob("checkpoint-*")))
        psutil.Process(torchrun.pid).children()[1].kill()  # they are started in their order
        wait_for(torchrun, out, lambda found: (out / "failure.json").exists())
        assert "rank 1 on" in json.loads((out / "failure.json").read_text())["what"]
        more = len(records(out)) + 2
        wait_for(
            torchrun, out, lambda found: not (out / "failure.json").exists() and len(found) > more
        )
        torchrun.send_signal(signal.SIGTERM)
        printed = "".join(torchrun.communicate())
    finally:
        torchrun.kill()
    assert printed.count("error: rank 1 on") == 1, printed
    assert len(re.findall(r"SIGTERM.*step \d", printed)) == 1, printed
    stopped = json.loads((out / "stopped.json").read_text())
    found = replicate.newest_checkpoint(out)
    assert found is not None
    assert stopped["signal"] == "SIGTERM"
    assert stopped["step"] == found[0] == records(out)[-1]["step"]
    assert torchrun.returncode == 1  # torchrun's own: it was signalled; the ranks' are 0
