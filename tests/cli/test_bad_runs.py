"""What goes wrong with a run that has begun: torn files, changed recipes and data, full disks, NaN;
and nothing is lost.

Each start that is refused leaves every file as it was; each run that fails leaves failure.json and
its last whole checkpoint, and the same command goes on from there once the fault is mended.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.bad_table import cut, flip
from cli.bad_world import Capture, World, records, snapshot, started
from errors import holds, lines_with, refuses
from logged import logged_lines
from recipes import write_rows
from tunesmith.cli.main import main
from tunesmith.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, MachineError
from tunesmith.training.run import train

pytestmark = pytest.mark.slow

SHORT = ["--max-new-tokens", "4", "--device", "cpu"]


# --- starts that are refused


def foreign(world: World) -> None:
    """Checkpoints of another program in output_dir."""
    shutil.rmtree(world.out)
    for step in (500, 1000, 1500):
        world.write(f"run/checkpoint-{step}/trainer_state.json", "{}")


def other_rows(world: World) -> None:
    write_rows(world.folder / "train.jsonl", 47)


def edit(name: str, old: str, new: str) -> Callable[[World], None]:
    def spoil(world: World) -> None:
        path = world.folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return spoil


def nothing(world: World) -> None: ...


# what is done after four steps, words of the next start, and parts of what is told
REFUSED: dict[str, tuple[Callable[[World], object], list[str], str, str, str]] = {
    "another learning rate": (nothing, ["train.learning_rate=5e-4"], "", "train.learning_rate: 0.001 -> 0.0005", "--fresh"),
    "another rank": (nothing, ["adapter.rank=8"], "", "adapter.rank: 4 -> 8", "--fresh"),
    "another data file": (lambda w: write_rows(w.folder / "b.jsonl", 8), ["data.train.source=b.jsonl"], "", "b.jsonl", ""),
    "a shorter duration": (nothing, ["train.duration=2 steps"], "", 'train.duration: "4 steps" -> "2 steps"', "output_dir"),
    "rows were taken away": (other_rows, [], "", "train.jsonl", "checkpoint.resume=force"),
    "a word in a row was changed": (edit("train.jsonl", "amber", "umber"), [], "", "train.jsonl", "checkpoint.resume=force"),
    "config.yaml is broken": (lambda w: w.write("run/config.yaml", "model: {"), [], "", "run/config.yaml:1", "--fresh"),
    "config.yaml is empty": (lambda w: w.write("run/config.yaml", ""), [], "cannot be read", "run/config.yaml", "--fresh"),
    "config.yaml has an unknown key": (edit("run/config.yaml", "method:", "methud:"), [], "", "run/config.yaml:1", "--fresh"),
    "config.yaml is gone": (lambda w: (w.out / "config.yaml").unlink(), [], "", "run/config.yaml", "--fresh"),
    "another program's checkpoints": (foreign, [], "checkpoint-1500", "run", "output_dir"),
    "the model is gone": (nothing, ["model.name=no/such/folder"], "", "no/such/folder", "--fresh"),
    "the data is gone": (lambda w: (w.folder / "train.jsonl").unlink(), [], "", "train.jsonl", ""),
    "metrics.jsonl is a folder": (lambda w: ((w.out / "metrics.jsonl").unlink(), (w.out / "metrics.jsonl").mkdir()), [], "", "metrics.jsonl", ""),
}  # fmt: skip


def resealed(name: str, content: bytes) -> Callable[[World], None]:
    """A checkpoint that is whole by its manifest, as one of another version may be, and that cannot
    be read.
    """

    def spoil(world: World) -> None:
        from tunesmith.checkpoint.manifest import flush_files, write_manifest

        world.write(f"run/checkpoint-4/{name}", content)
        folder = world.out / "checkpoint-4"
        write_manifest(folder, 4, flush_files(folder))

    return spoil


REFUSED |= {
    "progress of another version": (resealed("state/progress.json", b'{"step": 4}'), [], "state/progress.json", "checkpoint-4", ""),
    "optimizer of another form": (resealed("state/optimizer.safetensors", b"x"), [], "state/optimizer", "checkpoint-4", "--fresh"),
    "adapter of another form": (resealed("adapter_model.safetensors", b"x"), [], "", "checkpoint-4/adapter_model.safetensors", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_start_that_is_refused_touches_nothing(name: str, world: World, capsys: Capture) -> None:
    spoil, words, what, where, fix = REFUSED[name]
    world.begun()
    spoil(world)
    before = snapshot(world.folder)
    code, parts, err = started([*world.again(), *words], capsys)
    assert code == EXIT_USAGE, err
    assert what in parts["error"], err
    assert where in err
    assert fix in parts["fix"], err
    assert snapshot(world.folder) == before


RANKS = {
    "half an environment": {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
    "srun": {"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8", "SLURM_PROCID": "3"},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "4"},
    "mpiexec": {"PMI_SIZE": "4", "PMI_RANK": "0"},
}


@pytest.mark.parametrize("words", [[], ["--fresh"]], ids=str)
@pytest.mark.parametrize("launcher", RANKS)
def test_one_of_several_ranks_is_refused(
    launcher: str, words: list[str], world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.begun()
    before, (name, count) = snapshot(world.folder), next(iter(RANKS[launcher].items()))
    with monkeypatch.context() as patch:
        for key, value in RANKS[launcher].items():
            patch.setenv(key, value)
        code, parts, err = started([*world.again(), *words], capsys)
        bench, _, _ = started(["bench", *world.again()[1:]], capsys)
        with refuses(MachineError, names=[count], fix=[f"unset {name}"]):
            train(world.folder / "recipe.yaml", quiet=True)
    assert code == bench == EXIT_USAGE, err
    assert holds(parts["error"], count)
    assert f"{name}={count}" in parts["where"]
    assert "torchrun --nproc-per-node N -m tunesmith train" in parts["fix"]
    assert f"unset {name}" in parts["fix"]
    assert snapshot(world.folder) == before


def test_one_rank_trains_in_a_batch_job_of_many_tasks(
    world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.begun()
    for key, value in {
        "WORLD_SIZE": "1",
        "RANK": "0",
        "SLURM_NTASKS": "8",
        "SLURM_STEP_NUM_TASKS": "1",
    }.items():
        monkeypatch.setenv(key, value)
    code, _, err = started(world.again("train.duration=5 steps"), capsys)
    assert code == EXIT_OK, err


def test_another_run_holds_the_folder(world: World, capsys: Capture) -> None:
    world.begun()
    before = snapshot(world.folder)
    with (world.out / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, parts, err = started(world.again(), capsys)
    assert (code, parts["where"]) == (EXIT_USAGE, str(world.out)), err
    assert holds(parts["fix"], "output_dir")
    assert snapshot(world.folder) == before


def test_what_is_forced_goes_on(world: World, capsys: Capture) -> None:
    world.begun()
    other_rows(world)
    code, _, err = started(world.again("checkpoint.resume=force"), capsys)
    assert code == EXIT_OK, err
    assert [r["step"] for r in records(world.out)] == list(range(1, 9))
    # From here on these are its data
    code, _, err = started(world.again("train.duration=10 steps"), capsys)
    assert code == EXIT_OK, err


# --- torn checkpoints

WHOLE = ["adapter_config.json", "adapter_model.safetensors", "state/optimizer.safetensors", "state/progress.json",
         "tokenizer.json", "manifest.json"]  # fmt: skip
TEARS: dict[str, Callable[[Path], object]] = {
    "cut": lambda file: cut(file, 10),
    "flipped": flip,
    "emptied": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("tear", TEARS)
@pytest.mark.parametrize("name", WHOLE)
def test_a_torn_checkpoint_is_passed_over(
    name: str, tear: str, world: World, begun: Path, capsys: Capture
) -> None:
    """The run goes on from the one before, says so, and ends with the numbers of a run that was
    never torn.
    """
    from tunesmith.checkpoint import replicate

    world.begun()
    TEARS[tear](world.out / "checkpoint-4" / name)
    with logged_lines() as said:
        found = replicate.newest_checkpoint(world.out)
    if (name, tear) == ("manifest.json", "flipped") and found is not None and found[0] == 4:
        return  # a flipped bit in the whitespace of the manifest leaves it as it was
    assert found is not None
    assert found[0] == 2
    assert lines_with(said[0], "checkpoint-4")


def test_a_run_goes_on_over_a_torn_checkpoint_with_the_same_numbers(
    world: World, begun: Path, capsys: Capture
) -> None:
    world.begun()
    flip(world.out / "checkpoint-4" / "adapter_model.safetensors")
    code, _, err = started(world.again("train.duration=4 steps", "checkpoint.keep=1"), capsys)
    assert code == EXIT_OK, err
    assert lines_with(err, "checkpoint-4")
    keys = ("step", "loss", "grad_norm", "learning_rate")
    assert [[r[k] for k in keys] for r in records(world.out)] == [
        [r[k] for k in keys] for r in records(begun / "run")
    ]


def test_a_torn_later_checkpoint_never_costs_a_whole_one(world: World, capsys: Capture) -> None:
    """With keep: 1, the torn one of step 4 must not be the one that is kept."""
    world.begun()
    shutil.rmtree(world.out / "final")
    cut(world.out / "checkpoint-4" / "adapter_model.safetensors")
    (world.out / "checkpoint-4").rename(world.out / "checkpoint-40")
    code, _, err = started(world.again("checkpoint.keep=1"), capsys)
    assert code == EXIT_OK, err
    assert sorted(p.name for p in world.out.glob("checkpoint-*")) == ["checkpoint-8"]


def test_when_none_is_whole_the_run_starts_over_and_says_so(world: World, capsys: Capture) -> None:
    world.begun()
    for folder in (*world.out.glob("checkpoint-*"), world.out / "final"):
        (folder / "manifest.json").unlink()
    code, _, err = started(world.again(), capsys)
    assert code == EXIT_OK, err
    assert lines_with(err, "checkpoint-2")
    assert lines_with(err, "checkpoint-4")
    assert [r["step"] for r in records(world.out)] == list(range(1, 9))


def test_a_second_start_of_a_finished_run_does_nothing(world: World, capsys: Capture) -> None:
    world.begun()
    before = snapshot(world.folder)
    assert main(world.again("train.duration=4 steps")) == EXIT_OK
    told_so = capsys.readouterr().out
    assert holds(told_so, 4, "train.duration", "--fresh")
    assert snapshot(world.folder) == before


def test_rests_of_a_kill_are_swept_away(world: World, capsys: Capture) -> None:
    world.begun()
    world.write("run/.checkpoint-6.partial/x", "half")
    world.write("run/.best.json.partial", "{")
    code, _, err = started(world.again(), capsys)
    assert code == EXIT_OK, err
    assert not list(world.out.glob(".*.partial"))


# --- adapters to begin with


def grown(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {k: torch.cat([v, v], 0 if "lora_A" in k else 1) for k, v in tensors.items()},
        folder / "adapter_model.safetensors",
    )


def setting(**values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return spoil


ADAPTERS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "cut off": (lambda f: cut(f / "adapter_model.safetensors"), "", "adapter_model.safetensors"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "", "base"),
    "broken settings": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json", "adapter_config.json:1"),
    "settings without a rank": (setting(r=None), "", "adapter_config.json"),
    "DoRA": (setting(use_dora=True), "use_dora", "adapter_config.json"),
    "not LoRA": (setting(peft_type="PREFIX_TUNING"), "", "adapter_config.json"),
    "another rank": (grown, "shape", "base"),
    "another scale": (setting(lora_alpha=64), "16", "base"),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_cannot_be_gone_on_from(name: str, world: World, capsys: Capture) -> None:
    spoil, what, where = ADAPTERS[name]
    source = world.begun() / "final"
    # An adapter from elsewhere has no manifest: with one its checksums are compared first.
    elsewhere = shutil.ignore_patterns("manifest.json")
    base = Path(shutil.copytree(source, world.folder / "base", ignore=elsewhere))
    shutil.rmtree(world.out)
    spoil(base)
    words = world.train(adapter={"from": str(base)})
    before = snapshot(world.folder)
    code, parts, err = started(words, capsys)
    assert code == EXIT_USAGE, err
    assert what in parts["error"], err
    assert where in parts["where"], err
    assert parts["fix"], err
    assert "tunesmith fetch" not in parts["fix"], err
    assert snapshot(world.folder) == before


# --- verbs on torn runs


@pytest.mark.parametrize("verb", ["chat", "generate", "eval", "merge"])
def test_verbs_take_the_newest_whole_one_and_refuse_a_torn_one_by_name(
    verb: str, world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, held = world.begun(), str(world.folder / "held.jsonl")
    more = {"chat": SHORT, "generate": ["--input", held, "--output", "-", *SHORT], "eval": ["--data", held],
            "merge": ["--output", str(world.folder / "merged")]}[verb]  # fmt: skip
    (run / "final" / "manifest.json").unlink()
    before = snapshot(world.folder)
    code, parts, err = started([verb, str(run / "final"), *more], capsys)
    assert code in (EXIT_FAILED, EXIT_USAGE), err
    assert str(run / "final") in parts["error"]
    assert str(run) in parts["fix"]
    assert snapshot(world.folder) == before


# --- caches


@pytest.mark.parametrize("spoil", ["a file", "torn", "foreign"])
def test_a_spoilt_token_cache_costs_time_only(
    spoil: str, world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = world.folder / "cache"
    monkeypatch.setenv("TUNESMITH_CACHE", str(cache))
    if spoil == "a file":
        cache.write_text("mine")
    else:
        assert main(["data", *world.train()[1:]]) == EXIT_OK
        for file in cache.rglob("ids.bin"):
            flip(file) if spoil == "torn" else file.write_bytes(b"PK\3\4")
    words = world.train("train.duration=2 steps")
    code, _, err = started(words, capsys)
    assert code == EXIT_OK, err
    assert spoil != "a file" or cache.read_text() == "mine"


# --- files of a run that are not what they should be


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "env.json", "log.txt"])
def test_a_pipe_or_device_in_a_run_is_not_opened(name: str, world: World, capsys: Capture) -> None:
    """Reading one may never end."""
    for spoil, kind in (
        (os.mkfifo, "a named pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
    ):
        path = world.begun() / name
        path.unlink()
        spoil(path)
        code, parts, err = started(world.again(), capsys)
        assert (code, parts["error"]) == (EXIT_USAGE, f"{name} is {kind}, not a file"), err
        path.unlink()


@pytest.mark.parametrize(
    "files", [{"adapter_model.safetensors": True}, [], "x", {"a": {"bytes": "many"}}, None]
)
def test_a_manifest_of_another_form_is_a_torn_checkpoint(
    files: object, world: World, capsys: Capture
) -> None:
    manifest = json.dumps({"step": 4, "files": files})
    (world.begun() / "checkpoint-4" / "manifest.json").write_text(manifest)
    (world.out / "final" / "manifest.json").write_text(manifest)
    code, _, err = started(world.again(), capsys)
    assert code == EXIT_OK, err
    assert lines_with(err, "checkpoint-4", "manifest.json")
    assert [r["step"] for r in records(world.out)] == list(range(1, 9))


def test_links_that_lead_to_themselves_are_moved_aside_or_refused(
    world: World, capsys: Capture
) -> None:
    loop = world.begun() / "metrics.jsonl"
    loop.unlink()
    loop.symlink_to(loop)
    code, parts, err = started(["merge", str(world.out), "--output", str(loop)], capsys)
    assert (code, bool(parts["error"] and parts["fix"])) == (EXIT_USAGE, True), err
    code, _, err = started(world.again("--fresh"), capsys)
    assert code == EXIT_OK, err
    assert (world.folder / "run.previous-1" / "metrics.jsonl").is_symlink()


def test_an_endless_word_is_not_told_in_full(world: World, capsys: Capture) -> None:
    code, parts, err = started(["train", str(world.folder / "recipe.yaml"), "x" * 70_000], capsys)
    assert code == EXIT_USAGE, err
    assert max(map(len, err.splitlines())) < 2100
    assert parts["fix"]
