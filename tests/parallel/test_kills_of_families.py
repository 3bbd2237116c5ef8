"""A rank that is not the first is killed in the middle of a step of recurrent layers: the other one
ends by itself, and a second start gives records and weights as if nothing had happened.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import vision_models
from ranks import environment_of, forkserver, free_port
from recipes import make_run
from tunesmith.distributed import heartbeat
from tunesmith.errors import TunesmithError
from tunesmith.training.run import train
from tunesmith.training.trainer import Trainer

pytestmark = pytest.mark.slow

STEPS, EVERY, KILLED_IN = 4, 2, 4  # the second checkpoint is not there yet
COMPARED = ("step", "loss", "grad_norm", "learning_rate", "tokens", "examples")
SECONDS = 120  # for two ranks


def run_rank(env: dict[str, str], model: Path, folder: Path, name: str, killed_in: int) -> None:
    """One rank of a run; rank 1 is killed in the step `killed_in`, between forward and update."""
    os.environ.update(env)
    heartbeat.HUNG_RANK_SECONDS = 0.5  # seconds that a rank has to end
    step = Trainer.train_step

    def killed(self: Trainer, batch: Any) -> Any:
        if batch.step + 1 == killed_in:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch)

    if env["RANK"] == "1":
        Trainer.train_step = killed  # type: ignore[method-assign]
    run = make_run(
        model,
        folder,
        held=False,
        adapter={"kind": "none"},
        parallel={"shard": 2},
        train={"duration": f"{STEPS} steps", "micro_batch": "128 tokens"},
        checkpoint={"every": f"{EVERY} steps"},
        output_dir=str(folder / name),
    )
    try:
        train(run, quiet=True)
    except TunesmithError as error:
        sys.exit(error.exit_code)


def exit_codes(model: Path, folder: Path, name: str, killed_in: int = 0) -> list[int | None]:
    """Of two ranks that share a run, in their order."""
    context, port = forkserver(), free_port()
    processes = []
    for rank in range(2):
        arguments = (environment_of(rank, 2, port), model, folder, name, killed_in)
        processes.append(context.Process(target=run_rank, args=arguments))
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def figures(folder: Path) -> list[list[Any]]:
    """Of each record; the last line may have been cut off by the kill."""
    text = (folder / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [[record[key] for key in COMPARED] for record in records]


def test_a_killed_rank_of_a_recurrent_model_goes_on_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    model = vision_models.build("qwen3_5", tmp_path / "model", tiny)
    assert exit_codes(model, tmp_path, "whole") == [0, 0]
    survivor, killed = exit_codes(model, tmp_path, "killed", KILLED_IN)
    assert killed == -signal.SIGKILL
    assert survivor == 1
    assert not (tmp_path / "killed/final").exists()
    assert len(figures(tmp_path / "killed")) < STEPS
    assert exit_codes(model, tmp_path, "killed") == [0, 0]
    expected = figures(tmp_path / "whole")
    assert len(expected) == STEPS
    assert figures(tmp_path / "killed") == expected
    files = sorted((tmp_path / "whole/final").glob("*.safetensors"))
    assert files
    for file in files:
        assert (tmp_path / "killed/final" / file.name).read_bytes() == file.read_bytes()
