"""Trackers through accelerate's classes: what they are told, once each, and what happens where they
fail.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from errors import check_error, warnings_with
from recipes import recipe
from records import RUN, record
from tunesmith.config.dump import to_yaml
from tunesmith.config.schema import Log, TrackerName
from tunesmith.errors import MachineError
from tunesmith.metrics.record import read_records
from tunesmith.metrics.sink import JsonlSink, SampleAnswer
from tunesmith.metrics.trackers import TRACKERS, Tracker, TrackerSink, trackers_of
from tunesmith.training.run import train


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """accelerate's TensorBoard tracker stands for all of them: its package is always there, and its
    files read back.
    """
    options = {"logging_dir": str(tmp_path / "events")}
    row = Tracker(lambda folder, known: options, lambda writer: "id", "set it up")
    monkeypatch.setitem(TRACKERS, "tensorboard", row)
    return "tensorboard"


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "events" / "tunesmith"), size_guidance={"scalars": 0})
    events.Reload()
    return sorted((e.step, e.value) for e in events.Scalars(tag))


def report(
    name: str, folder: Path, steps: range, *, resumed_at: int = 0, loss: float | None = None
) -> list[str]:
    """The warnings of one start, which ends after `steps`."""
    warnings: list[str] = []
    sink, jsonl = TrackerSink(name, folder, warnings.append), JsonlSink(folder / "metrics.jsonl")
    sink.open(RUN, resumed_at)
    jsonl.open(RUN, resumed_at)
    for step in steps:
        made = record(step, val_loss=1.0 / step, **({} if loss is None else {"loss": loss}))
        for each in (jsonl, sink):
            each.step(made)
    sink.close()
    sink.close()
    jsonl.close()
    return warnings


def test_each_tracker_of_the_recipe_is_one_of_accelerate() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(get_args(TrackerName)) == set(TRACKERS)
    assert set(TRACKERS) <= set(LOGGER_TYPE_TO_CLASS)
    assert trackers_of(replace(RUN, log=Log(wandb=True, trackers=("mlflow", "wandb")))) == [
        "wandb",
        "mlflow",
    ]


def test_each_step_is_reported_under_the_names_of_tensorboard(
    tmp_path: Path, tensorboard: str
) -> None:
    assert report(tensorboard, tmp_path, range(1, 4)) == []
    assert scalars(tmp_path, "train/loss") == [(1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3))]
    assert scalars(tmp_path, "validation/loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert (tmp_path / "tensorboard-id.txt").read_text() == "id\n"


@pytest.mark.parametrize(
    ("in_recipe", "in_environment", "project"),
    [("chats", "other", "chats"), (None, "other", "other"), (None, None, "tunesmith")],
)
def test_the_project_is_that_of_the_recipe_else_of_the_environment(
    in_recipe: str | None,
    in_environment: str | None,
    project: str,
    tmp_path: Path,
    tensorboard: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TRACKERS, tensorboard, TRACKERS[tensorboard]._replace(project="A_PROJECT"))
    if in_environment:
        monkeypatch.setenv("A_PROJECT", in_environment)
    sink = TrackerSink(tensorboard, tmp_path, print)
    sink.open(replace(RUN, log=replace(RUN.log, project=in_recipe)), 0)
    sink.close()
    # accelerate's TensorBoard tracker writes to a folder of this name.
    assert [folder.name for folder in (tmp_path / "events").iterdir()] == [project]


def test_a_step_that_is_repeated_is_reported_once(tmp_path: Path, tensorboard: str) -> None:
    """Killed after step 5, resumed from checkpoint-3: steps 4 and 5 come out the same, and are
    known.
    """
    report(tensorboard, tmp_path, range(1, 6))
    report(tensorboard, tmp_path, range(4, 8), resumed_at=3)
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, _ in scalars(tmp_path, "validation/loss")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_step_that_comes_out_otherwise_is_reported_again(
    tmp_path: Path, tensorboard: str
) -> None:
    """As with checkpoint.resume: force and another learning rate."""
    report(tensorboard, tmp_path, range(1, 6))
    report(tensorboard, tmp_path, range(4, 6), resumed_at=3, loss=9.0)
    assert [value for step, value in scalars(tmp_path, "train/loss") if step > 3] == [
        0.5,
        9.0,
        pytest.approx(0.4),
        9.0,
    ]


def test_a_tracker_that_fails_is_told_once_and_left_alone(
    tmp_path: Path, tensorboard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.tracking import TensorBoardTracker

    calls: list[int] = []

    def gone(self: object, values: dict, step: int) -> None:
        calls.append(step)
        raise ConnectionError("http://ada:secret@host: the server is gone")

    monkeypatch.setattr(TensorBoardTracker, "log", gone)
    warnings = report(tensorboard, tmp_path, range(1, 6))
    assert len(warnings) == 1
    assert warnings_with(warnings[0], "tensorboard", "http://***@host")
    assert calls == [1]


def test_samples_that_wandb_cannot_take_do_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # its table cannot be made
    warnings: list[str] = []
    sink = TrackerSink("wandb", tmp_path, warnings.append)
    sink._tracker = "begun"
    sink.samples(1, [SampleAnswer("ask", "answer", "expected")])
    sink.close()
    assert [bool(warnings_with(line, "wandb")) for line in warnings] == [True]


def test_a_tracker_that_does_not_start_is_refused(tmp_path: Path, tensorboard: str) -> None:
    (tmp_path / "events").write_text("a file")
    with pytest.raises(MachineError) as raised:
        report(tensorboard, tmp_path, range(1, 2))
    check_error(raised.value, names=["tensorboard"])
    assert raised.value.why
    assert raised.value.fix


@pytest.mark.parametrize(
    ("name", "log", "where", "way_out"),
    [
        ("mlflow", {"trackers": ["mlflow"]}, "log.trackers", "remove mlflow from log.trackers"),
        ("wandb", {"trackers": ["wandb"]}, "log.trackers", "remove wandb from log.trackers"),
        ("wandb", {"wandb": True}, "log.wandb", "set log.wandb=false"),
    ],
)
def test_a_missing_package_is_told_before_the_model_is_looked_for(
    name: str, log: dict, where: str, way_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe(tmp_path / "no-such-model", tmp_path, log=log)))
    with pytest.raises(MachineError) as raised:
        train(path, quiet=True)
    check_error(raised.value, where=where, names=[name], fix=["pip install"])
    assert raised.value.fix.startswith("run `pip install ")
    assert raised.value.fix.endswith(f", or {way_out}")


START = """
import os, signal, sys, time
import torch
import tunesmith

def kill(record):
    if record.step == 5 and sys.argv[2] == "kill":
        time.sleep(3)  # the tracker has got what it was told
        os.kill(os.getpid(), signal.SIGKILL)

tunesmith.train(sys.argv[1], on_record=kill)
assert not torch.distributed.is_initialized(), "a tracker started a process group"
"""


def mlflow_run(folder: Path) -> tuple[dict[str, str], list[list[tuple[int, float]]]]:
    """Parameters, and the two curves, of the one run that MLflow's own client finds."""
    from mlflow import MlflowClient

    client = MlflowClient(f"file://{folder}/mlruns")
    experiment = client.get_experiment_by_name("tunesmith")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    histories = [
        client.get_metric_history(run.info.run_id, tag) for tag in ("train/loss", "validation/loss")
    ]
    return run.data.params, [sorted((m.step, m.value) for m in history) for history in histories]


def trackio_run(folder: Path) -> tuple[dict[str, str], list[list[tuple[int, float]]]]:
    """The same by Trackio's own command, which prints JSON."""

    def asked(*words: str) -> dict:
        command = [sys.executable, "-m", "trackio.cli", *words, "--project", "tunesmith", "--json"]
        environment = {**os.environ, "TRACKIO_DIR": str(folder / "trackio")}
        return json.loads(
            subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            ).stdout
        )

    (name,) = (
        run if isinstance(run, str) else run["name"] for run in asked("list", "runs")["runs"]
    )
    curves = []
    for tag in ("train/loss", "validation/loss"):
        values = asked("get", "metric", "--run", name, "--metric", tag)["values"]
        curves.append(sorted((value["step"], value["value"]) for value in values))
    return asked("get", "run", "--run", name)["config"], curves


@pytest.mark.slow
@pytest.mark.parametrize(("name", "read"), [("mlflow", mlflow_run), ("trackio", trackio_run)])
def test_a_run_that_was_killed_reads_back_whole(
    name: str, read, tiny: Path, tmp_path: Path
) -> None:
    """Written by a real run, started as torchrun starts one, and read by the tracker's own client."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(
            f"{name} is not installed: pip install {'mlflow-skinny' if name == 'mlflow' else name}"
        )
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe(tiny, tmp_path, log={"trackers": [name]})))
    store = {"MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"}
    ranks = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29517",
    }
    environment = {**os.environ, **store, **ranks, "TRACKIO_DIR": str(tmp_path / "trackio")}
    for how, code in (("kill", -signal.SIGKILL), ("go on", 0)):
        command = [sys.executable, "-c", START, str(path), how]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == code, done.stderr
        assert done.stdout == "", "stdout is for answers"
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    config, (losses, validation) = read(tmp_path)
    written = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [r.step for r in written] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert losses == [(r.step, r.loss) for r in written]
    assert validation == [(r.step, r.val_loss) for r in written if r.val_loss is not None]
    assert float(config["train.learning_rate"]) == 1e-3
