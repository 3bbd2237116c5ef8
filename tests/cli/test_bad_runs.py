"""What goes wrong with a run that has begun, and in a folder that holds somebody's files: nothing is
lost, and the same command goes on once the fault is mended.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.bad_world import World, snapshot, started, steps_of
from errors import error_in, holds, lines_with, refuses
from invoke import invoke
from recipes import write_rows
from tunesmith.checkpoint.manifest import flush_files, write_manifest
from tunesmith.cli.main import dispatch
from tunesmith.config.load import load_recipe
from tunesmith.errors import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_USAGE,
    DataError,
    MachineError,
    ModelError,
    RecipeError,
    UsageError,
)
from tunesmith.metrics.record import read_records
from tunesmith.optim.adamw import checkpoint_bytes_per_parameter
from tunesmith.start import plan as plan_stage
from warm import run_warm

pytestmark = pytest.mark.slow


def edit(name: str, old: str, new: str) -> Callable[[World], object]:
    def spoil(world: World) -> None:
        path = world.folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return spoil


def resealed(name: str, content: bytes) -> Callable[[World], object]:
    """A checkpoint that is whole by its manifest, and that cannot be read."""

    def spoil(world: World) -> None:
        world.write(f"run/checkpoint-4/{name}", content)
        folder = world.out / "checkpoint-4"
        write_manifest(folder, 4, flush_files(folder))

    return spoil


def foreign(world: World) -> None:
    """Checkpoints of another program in output_dir."""
    shutil.rmtree(world.out)
    for step in (500, 1000, 1500):
        world.write(f"run/checkpoint-{step}/trainer_state.json", "{}")


# What is done after four steps, words of the next start, and the error
REFUSED: dict[str, tuple[Callable[[World], object] | None, str, type[Exception], str, list[str]]] = {
    "another learning rate": (None, "train.learning_rate=5e-4", RecipeError, "", ["--fresh"]),
    "a shorter duration": (None, "train.duration=2 steps", RecipeError, "", ["output_dir"]),
    "rows were taken away": (lambda w: write_rows(w.folder / "train.jsonl", 47), "", DataError, "", ["checkpoint.resume=force"]),
    "a word in a row was changed": (edit("train.jsonl", "amber", "umber"), "", DataError, "", ["checkpoint.resume=force"]),
    "config.yaml is broken": (lambda w: w.write("run/config.yaml", "model: {"), "", RecipeError, "run/config.yaml:1", ["--fresh"]),
    "another program's checkpoints": (foreign, "", UsageError, "run", ["output_dir"]),
    "metrics.jsonl is a pipe": (lambda w: ((w.out / "metrics.jsonl").unlink(), os.mkfifo(w.out / "metrics.jsonl")), "", ModelError, "metrics.jsonl", []),
    "progress of another version": (resealed("state/progress.json", b'{"step": 4}'), "", UsageError, "checkpoint-4", []),
    "optimizer of another form": (resealed("state/optimizer.safetensors", b"x"), "", UsageError, "state/optimizer.safetensors", ["--fresh"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_start_that_is_refused_touches_nothing(name: str, world: World) -> None:
    spoil, word, kind, where, fix = REFUSED[name]
    world.begun()
    if spoil is not None:
        spoil(world)
    before = snapshot(world.folder)
    with refuses(kind, where=where or None, fix=fix) as refused:
        dispatch([*world.again(), *filter(None, [word])])
    assert refused.value.exit_code == EXIT_USAGE
    assert snapshot(world.folder) == before


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "PMI_SIZE"])
def test_one_of_several_ranks_is_refused(
    name: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.begun()
    before = snapshot(world.folder)
    for key, value in {name: 4, "RANK": 1, "LOCAL_RANK": 1, "SLURM_NTASKS": 4}.items():
        monkeypatch.setenv(key, str(value))
    for words in (world.again(), world.again("--fresh"), ["bench", *world.again()[1:]]):
        with refuses(MachineError, names=[4], fix=[f"unset {name}"]):
            dispatch(words)
    assert snapshot(world.folder) == before


def test_what_is_forced_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as one rank in a batch job of many tasks."""
    job = {"WORLD_SIZE": "1", "RANK": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}
    for key, value in job.items():
        monkeypatch.setenv(key, value)
    world.begun()
    write_rows(world.folder / "train.jsonl", 47)
    assert dispatch(world.again("checkpoint.resume=force")) == EXIT_OK
    # From here on these are its data.
    assert dispatch(world.again("train.duration=6 steps")) == EXIT_OK
    assert steps_of(world.out) == list(range(1, 7))


def test_a_run_goes_on_over_a_torn_checkpoint_with_the_same_numbers(
    world: World, begun: Path
) -> None:
    file = world.begun() / "checkpoint-4" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)
    code, _, err = started(world.again("train.duration=4 steps", "checkpoint.keep=1"))
    assert code == EXIT_OK, err
    assert lines_with(err, "checkpoint-4")
    ours, whole = (read_records(run / "metrics.jsonl") for run in (world.out, begun / "run"))
    for one, other in zip(ours, whole, strict=True):
        for key in ("step", "loss", "grad_norm", "learning_rate"):
            assert getattr(one, key) == getattr(other, key)


def test_when_none_is_whole_the_run_starts_over_and_says_so(world: World) -> None:
    world.begun()
    (world.out / "checkpoint-2" / "manifest.json").unlink()
    for folder in (world.out / "checkpoint-4", world.out / "final"):
        (folder / "manifest.json").write_text('{"step": 4, "files": []}')
    code, _, err = started(world.again())
    assert code == EXIT_OK, err
    assert lines_with(err, "checkpoint-2")
    assert lines_with(err, "checkpoint-4")
    assert steps_of(world.out) == list(range(1, 6))


def test_a_second_start_of_a_finished_run_does_nothing(world: World) -> None:
    world.begun()
    before = snapshot(world.folder)
    done = invoke(*world.again("train.duration=4 steps"))
    assert done.code == EXIT_OK
    assert holds(done.out, 4, "train.duration", "--fresh")
    assert snapshot(world.folder) == before


STEP = b'{"step": 1, "loss": 2.5}\n'


# What lies in output_dir: files and their content
FOREIGN: dict[str, dict[str, str | bytes]] = {
    "config.yaml of another program": {"config.yaml": "colour: red\n"},
    "env.json that is no JSON": {"env.json": b"\xff\x00"},
    "metrics": {"metrics.jsonl": STEP * 3},
    "a log": {"log.txt": "mine\n"},
    "final": {"final/model.safetensors": b"w" * 999},
    "tensorboard": {"tensorboard/events.out.tfevents.1": b"e"},
    "a checkpoint of another program": {"checkpoint-500/trainer_state.json": "{}"},
    "hidden folder .checkpoint-5.partial": {".checkpoint-5.partial/x": "1"},
    "a lock of a run, and metrics": {".lock": "a run of tunesmith\n", "metrics.jsonl": STEP},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_a_runs_names_are_refused_and_not_touched(name: str, world: World) -> None:
    if name == "final":  # output_dir may be a link
        (world.folder / "elsewhere").mkdir()
        world.out.symlink_to(world.folder / "elsewhere")
    for path, content in FOREIGN[name].items():
        world.write(f"run/{path}", content)
    for word in ([], ["--fresh"], ["checkpoint.resume=force"]):
        command = world.train(*word)
        before = snapshot(world.folder)
        with refuses(UsageError, where=str(world.out), fix=["output_dir=runs/my-run"]):
            dispatch(command)
        assert snapshot(world.folder) == before


UNRELATED: dict[str, str | bytes] = {
    "notes.txt": "mine", "rows.jsonl": STEP, "data/a.csv": "a,b\n", "wandb/run-1/x": "1", "model.safetensors": b"w",
    ".notes.old/x": "1", ".cache.partial/x": "1", ".x.partial": "1", "finale/x": "1", "checkpoint-best/x": "1",
    "my-checkpoint-500/x": "1", "config.yml": "colour: red\n",
}  # fmt: skip


def test_unrelated_files_stay_through_train_and_fresh(world: World) -> None:
    """Of a folder that output_dir is a link to; also the rows that are trained on may lie there."""
    real = world.folder / "real"
    rows = {"train.jsonl": (world.folder / "train.jsonl").read_bytes()}
    for name, content in (UNRELATED | rows).items():
        world.write(f"real/{name}", content)
    world.out.symlink_to(real)
    before = snapshot(real)
    source = {"train": {"source": str(world.out / "train.jsonl")}}
    command = world.train("train.duration=2 steps", data=source, train={"warmup": "0 steps"})
    for words in ([], ["--fresh"]):
        assert dispatch([*command, *words]) == EXIT_OK
        after = snapshot(real)
        assert {name: after.get(name) for name in before} == before
        assert (real / "final" / "manifest.json").is_file()
    aside = {path.name for path in real.with_name(f"{real.name}.previous-1").iterdir()}
    assert {"final", "env.json", "config.yaml", "metrics.jsonl", "log.txt", "checkpoint-2"} <= aside
    assert not aside & {Path(name).parts[0] for name in before}


def test_what_a_link_in_a_run_leads_to_is_never_deleted(world: World) -> None:
    """Checkpoints and final/ were moved to a larger disk, with links in their places."""
    run, disk = world.begun(), world.folder / "disk"
    disk.mkdir()
    for name in ("checkpoint-2", "checkpoint-4", "final"):
        (run / name).rename(disk / name)
        (run / name).symlink_to(disk / name)
    before = snapshot(disk)
    assert dispatch(world.again("train.duration=6 steps", "checkpoint.keep=1")) == EXIT_OK
    assert snapshot(disk) == before
    assert json.loads((run / "final" / "manifest.json").read_text())["step"] == 6
    assert {p.name for p in run.glob("checkpoint-*") if not p.is_symlink()} == {"checkpoint-6"}


def test_a_folder_called_final_in_a_run_is_kept_and_rests_of_a_kill_are_swept_away(
    world: World,
) -> None:
    run = world.begun()
    shutil.rmtree(run / "final")
    names = "final/thesis.pdf .notes.old/x .checkpoint-6.partial/x .best.json.partial".split()
    for name in names:
        world.write(f"run/{name}", "precious")
    assert dispatch(world.again()) == EXIT_OK
    assert (run / "final.previous-1" / "thesis.pdf").read_text() == "precious"
    assert (run / ".notes.old" / "x").read_text() == "precious"
    assert not list(run.glob(".*.partial"))


@pytest.mark.parametrize("written", ["", "log.txt metrics.jsonl"])
def test_a_run_that_was_killed_at_its_beginning_starts_again(written: str, world: World) -> None:
    run = world.begun()
    for path in run.iterdir():
        if path.name not in (*written.split(), ".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if written:
        (run / "metrics.jsonl").write_text("")
    assert dispatch(world.again("train.duration=2 steps", "train.warmup=0 steps")) == EXIT_OK
    assert (run / "final" / "manifest.json").is_file()


def test_what_fresh_would_lose_is_not_moved_aside(world: World) -> None:
    """What the new run reads, and a run whose successor is refused."""
    run = world.begun()
    before = snapshot(world.folder)
    with refuses(UsageError, names=[run / "final"]):
        dispatch(world.again("--fresh", f"adapter.from={run / 'final'}"))
    with refuses(RecipeError, where="data.seq_len"):
        dispatch(world.again("--fresh", "data.seq_len=1000000"))
    assert snapshot(world.folder) == before


def test_a_learning_rate_that_blows_up_keeps_the_last_good_checkpoint(world: World) -> None:
    rate = {"learning_rate": 1e30, "warmup": "0 steps"}
    code, told, err = started(world.train("checkpoint.every=1 steps", train=rate))
    assert code == EXIT_FAILED, err
    assert told.cause == "not-finite"
    assert holds(told.fix, "train.learning_rate")
    found = json.loads((world.out / "failure.json").read_text())
    kept = sorted(p.name for p in world.out.glob("checkpoint-*"))
    assert kept
    assert kept[-1] in found["why"]
    assert len(steps_of(world.out)) == found["last_step"] - 1


def test_a_fix_for_a_full_disk_is_one_that_helps(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four checkpoints have room; three more than are kept may be there at once."""
    size = 1000 * (4 + checkpoint_bytes_per_parameter(load_recipe(world.recipe()).train, 4))
    size += sum(file.stat().st_size for file in world.tiny.glob("tokenizer*"))
    usage = shutil._ntuple_diskusage(10**12, 0, int(size * 4))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(plan_stage, "count_trained", lambda run, model: 1000)
    with refuses(MachineError, names=[f"{size * 5 / 1000:.1f} kB"], fix=["checkpoint.keep=1"]):
        dispatch(world.train("checkpoint.keep=2"))


def small_files() -> None:
    """No file may grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


def test_a_limit_on_the_size_of_files(world: World) -> None:
    """Needs no root: what is written grows too large inside a checkpoint."""
    run = world.begun()
    kept = snapshot(run / "checkpoint-4")
    words = world.again("train.duration=6 steps")
    done = run_warm(words, prepare=small_files)
    assert done.returncode == EXIT_FAILED, done.stderr
    assert "Traceback" not in done.stderr
    assert holds(error_in(done.stderr).what, "ulimit")
    found = json.loads((run / "failure.json").read_text())
    assert {*found} == {*"what where why last_step next cause rank host phase collective".split()}
    assert (found["rank"], found["phase"], found["last_step"]) == (0, "saving", 6)
    assert snapshot(run / "checkpoint-4") == kept
    assert not list(run.glob(".*partial*"))
    assert dispatch(words) == EXIT_OK
    assert steps_of(run) == list(range(1, 7))
