"""A rank that stands still in any phase of a run is found and named; one that is slow is not."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from ranks import environment_of, forkserver, free_port
from recipes import make_run, merge
from tunesmith.checkpoint import contents
from tunesmith.checkpoint.sharded import RanksWriter
from tunesmith.distributed import heartbeat
from tunesmith.distributed.heartbeat import Heartbeat
from tunesmith.errors import TunesmithError
from tunesmith.start.run import train
from tunesmith.training import answer_sampler
from tunesmith.training import session as session_module
from tunesmith.training.trainer import Trainer

pytestmark = pytest.mark.slow

FULL: dict[str, Any] = {"adapter": {"kind": "none"}, "parallel": {"shard": 2}}
LORA: dict[str, Any] = {"parallel": {"replicate": 2}}
STEPS = {"duration": "4 steps", "micro_batch": "128 tokens"}
LIMIT = 2.0  # seconds without progress, in the phase that is struck alone: a busy machine must not disturb the others
PLACES = {  # phase -> the function that it is struck in
    "first step": (Trainer, "train_step"),
    "training": (Trainer, "train_step"),  # in the second step
    "validation": (session_module, "validation_loss"),
    "sample answers": (answer_sampler, "sample_answers"),
    "saving": (RanksWriter, "_write"),
    "saving final/": (contents, "write_model_files"),
}


def stand_still(*_: object, **__: object) -> None:
    time.sleep(1000)


def after_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which stands still when it is called again."""
    calls = count()

    def stand(*arguments: Any) -> Any:
        return (stand_still if next(calls) else function)(*arguments)

    return stand


def stick(
    phase: str, env: dict[str, str], model: Path, folder: Path, changes: dict[str, Any]
) -> None:
    """A rank of a run, whose limit in `phase` is short if it has one; rank 1 stands still there."""
    os.environ.update(env)
    begin = Heartbeat.phase

    def with_short_limit(self: Heartbeat, name: str, limit: float | None = None) -> None:
        begin(self, name, LIMIT if name == phase and limit else limit)

    Heartbeat.phase = with_short_limit  # type: ignore[method-assign]
    heartbeat.HUNG_RANK_SECONDS = 0.5  # seconds that a rank has to end
    if env["RANK"] == "1":
        place, name = PLACES[phase]
        function = getattr(place, name)
        setattr(place, name, after_first(function) if phase == "training" else stand_still)
    sys.stderr = (folder / f"stderr-{env['RANK']}").open("w")
    base = {"train": STEPS, "validate": {"every": "2 steps"}, "log": {"samples": 1}}
    try:
        train(make_run(model, folder, **merge(base, changes)), quiet=True)
    except TunesmithError as error:
        sys.exit(error.exit_code)


NIGHTLY = pytest.mark.nightly


# While training: test_nccl.py, and test_heartbeat.py without a model.
@pytest.mark.parametrize(
    ("phase", "changes"),
    [
        pytest.param("first step", LORA, marks=NIGHTLY),
        pytest.param("validation", LORA, marks=NIGHTLY),
        pytest.param("sample answers", FULL, marks=NIGHTLY),
        pytest.param("saving", FULL),
        pytest.param("saving final/", FULL, marks=NIGHTLY),
    ],
)
def test_a_rank_that_stands_still_is_named_with_its_phase(phase, changes, tiny, tmp_path):
    assert_a_hang_is_named(phase, changes, tiny, tmp_path, [{}, {}])


def assert_a_hang_is_named(
    phase: str,
    changes: dict[str, Any],
    model: Path,
    folder: Path,
    environments: list[dict[str, str]],
    *,
    spawns: bool = False,
) -> None:
    """Two ranks, each with its further environment, end with a report that names rank 1."""
    context, port = forkserver(spawns=spawns), free_port()
    envs = [environment_of(rank, 2, port) | more for rank, more in enumerate(environments)]
    processes = [
        context.Process(target=stick, args=(phase, env, model, folder, changes)) for env in envs
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [1, 1]
    finally:
        for process in processes:
            process.kill()
    failure = json.loads((folder / "run" / "failure.json").read_text())
    assert (failure["cause"], failure["rank"], failure["phase"]) == ("hang", 1, phase)
    printed = "".join(file.read_text() for file in folder.glob("stderr-*"))
    assert printed.count("error: rank 1 on ") == 1
