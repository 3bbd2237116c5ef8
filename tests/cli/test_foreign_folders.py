"""A start in a folder that holds somebody's files: refused and nothing touched, or trained with
each of them left as it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.bad_world import Capture, World, started
from errors import holds
from tunesmith.errors import EXIT_OK, EXIT_USAGE

pytestmark = pytest.mark.slow

STEP = b'{"step": 1, "loss": 2.5}\n'


def every_file(folder: Path) -> dict[str, str]:
    """All that lies in a folder, hidden files and links too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        link, name = path.is_symlink(), str(path.relative_to(folder))
        content = (
            os.readlink(path).encode()
            if link
            else path.read_bytes()
            if path.is_file()
            else b"folder"
        )
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def linked(name: str, inside: str = "weights.bin") -> Callable[[World], object]:
    def make(world: World) -> None:
        world.out.mkdir(exist_ok=True)
        world.write(f"elsewhere/{inside}", "precious")
        (world.out / name).symlink_to(world.folder / "elsewhere")

    return make


def own_recipe(world: World) -> None:
    """The user's recipe is called config.yaml, and lies where the run would write its own."""
    world.out.mkdir()
    shutil.copy(world.recipe(), world.out / "config.yaml")


# what lies in output_dir: files and their content, or a function; "NAME/FILE" makes a folder
FOREIGN: dict[str, dict[str, str | bytes] | Callable[[World], object]] = {
    "a recipe": own_recipe,
    "config.yaml of another program": {"config.yaml": "colour: red\n"},
    "empty config.yaml": {"config.yaml": ""},
    "env.json of another program": {"env.json": '{"PATH": "/bin"}'},
    "env.json that is a list": {"env.json": "[1, 2]"},
    "env.json that is no JSON": {"env.json": b"\xff\x00"},
    "env.json that is a folder": {"env.json/a": "x"},
    "metrics": {"metrics.jsonl": STEP * 3},
    "empty metrics": {"metrics.jsonl": ""},
    "a log": {"log.txt": "mine\n"},
    "failure.json": {"failure.json": "{}"},
    "best.json": {"best.json": "{}"},
    "wandb-id.txt": {"wandb-id.txt": "abc"},
    "final": {"final/model.safetensors": b"w" * 999},
    "final with a manifest of its own": {"final/manifest.json": "{}", "final/a": "x"},
    "final that is a file": {"final": "x"},
    "tensorboard": {"tensorboard/events.out.tfevents.1": b"e"},
    "profile": {"profile/rank0.json": "{}"},
    "checkpoints of another program": {"checkpoint-500/trainer_state.json": "{}", "checkpoint-1000/x": "1"},
    "a checkpoint that is a file": {"checkpoint-5": "x"},
    "hidden folder .checkpoint-5.partial": {".checkpoint-5.partial/x": "1"},
    "hidden folder .checkpoint-5.old": {".checkpoint-5.old/x": "1"},
    "hidden folder .final.old": {".final.old/x": "1"},
    "hidden folder .final.partial": {".final.partial/x": "1"},
    "hidden file .env.json.7.partial": {".env.json.7.partial": "{"},
    "a lock of a run, and metrics": {".lock": "a run of tunesmith\n", "metrics.jsonl": STEP},
    "a lock of a run, and config.yaml": {".lock": "a run of tunesmith\n", "config.yaml": "colour: red\n"},
    "a lock of a run, and final": {".lock": "a run of tunesmith\n", "final/x": "1"},
    "a lock of another program": {".lock": "4711\n", "log.txt": "mine"},
    "a link to a folder as checkpoint-500": linked("checkpoint-500"),
    "a link to a folder as final": linked("final"),
    "a broken link as config.yaml": lambda w: (w.out.mkdir(), (w.out / "config.yaml").symlink_to("nowhere")),
    "output_dir is a link to a folder with metrics": lambda w: (
        w.write("elsewhere/metrics.jsonl", STEP),
        w.out.symlink_to(w.folder / "elsewhere"),
    ),
}  # fmt: skip


def lay(world: World, layout: dict[str, str | bytes] | Callable[[World], object]) -> None:
    if callable(layout):
        layout(world)
        return
    for name, content in layout.items():
        world.write(f"run/{name}", content)


@pytest.mark.parametrize(
    "words", [[], ["--fresh"], ["checkpoint.resume=never"], ["checkpoint.resume=force"]], ids=str
)
@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_a_runs_names_are_refused_and_not_touched(
    name: str, words: list[str], world: World, capsys: Capture
) -> None:
    lay(world, FOREIGN[name])
    command = world.train(*words)
    if name == "a recipe":
        command[1] = str(world.out / "config.yaml")
    before = every_file(world.folder)
    code, parts, err = started(command, capsys)
    assert code == EXIT_USAGE, err
    assert parts["where"] == str(world.out)
    assert "output_dir=" in parts["fix"]
    assert every_file(world.folder) == before


UNRELATED: dict[str, str | bytes] = {
    "notes.txt": "mine", "rows.jsonl": STEP, "data/a.csv": "a,b\n", "wandb/run-1/x": "1", "model.safetensors": b"w",
    ".notes.old/x": "1", ".cache.partial/x": "1", ".x.partial": "1", "finale/x": "1", "checkpoint-best/x": "1",
    "my-checkpoint-500/x": "1", "config.yml": "colour: red\n",
}  # fmt: skip


@pytest.mark.parametrize(
    "word", ["train.learing_rate=1", "data.train.source=no.jsonl", "model.name=no/such/folder"]
)
def test_a_refused_start_deletes_nothing_and_leaves_no_lock(
    word: str, world: World, capsys: Capture
) -> None:
    lay(world, UNRELATED)
    command, before = world.train(word), every_file(world.folder)
    code, _, err = started(command, capsys)
    assert code == EXIT_USAGE, err
    assert every_file(world.folder) == before


@pytest.mark.parametrize("place", [".", "..", "/", "~", "~/", "work"])
def test_the_working_and_the_home_directory_are_not_for_a_run(
    place: str, world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = world.folder / "work"
    (work / "below").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(world.folder))
    monkeypatch.chdir(work)
    before = every_file(world.folder)
    output_dir = str(work) if place == "work" else place
    code, parts, err = started([*world.train(), f"output_dir={output_dir}"], capsys)
    assert code == EXIT_USAGE, err
    # In YAML ~ is null.
    where = "command line: output_dir"
    if place != "~":
        where = os.path.abspath(os.path.expanduser(output_dir))
    assert parts["where"] == where
    assert "output_dir=" in parts["fix"]
    assert every_file(world.folder) == before


@pytest.mark.parametrize("place", ["a folder", "a link"])
def test_unrelated_files_stay_through_train_and_fresh(
    place: str, world: World, capsys: Capture
) -> None:
    """Also the rows that are trained on may lie there."""
    lay(world, UNRELATED | {"train.jsonl": (world.folder / "train.jsonl").read_bytes()})
    before, real = every_file(world.out), world.out
    if place == "a link":
        real = world.out.rename(world.folder / "real")
        world.out.symlink_to(real)
    command = world.train(
        "train.duration=3 steps", data={"train": {"source": str(world.out / "train.jsonl")}}
    )
    for words in ([], ["--fresh"]):
        code, _, err = started([*command, *words], capsys)
        assert code == EXIT_OK, err
        assert {name: every_file(real).get(name) for name in before} == before
        assert (real / "final" / "manifest.json").is_file()
    aside = {path.name for path in real.with_name(f"{real.name}.previous-1").iterdir()}
    assert {"final", "env.json", "config.yaml", "metrics.jsonl", "log.txt", "checkpoint-3"} <= aside
    assert not aside & {Path(name).parts[0] for name in before}


def test_a_link_in_a_run_is_read_and_what_it_leads_to_is_never_deleted(
    world: World, capsys: Capture
) -> None:
    """Checkpoints and final/ were moved to a larger disk, with links in their places."""
    run, disk = world.begun(), world.folder / "disk"
    disk.mkdir()
    for name in ("checkpoint-2", "checkpoint-4", "final"):
        (run / name).rename(disk / name)
        (run / name).symlink_to(disk / name)
    before = every_file(disk)
    code, _, err = started(world.again("checkpoint.keep=1"), capsys)
    assert code == EXIT_OK, err
    assert every_file(disk) == before
    assert json.loads((run / "final" / "manifest.json").read_text())["step"] == 8
    assert {p.name for p in run.glob("checkpoint-*") if not p.is_symlink()} == {"checkpoint-8"}


def test_a_folder_called_final_in_a_run_is_kept(world: World, capsys: Capture) -> None:
    run = world.begun()
    shutil.rmtree(run / "final")
    world.write("run/final/thesis.pdf", "precious")
    world.write("run/.notes.old/x", "precious")
    world.write("run/.checkpoint-6.partial/x", "half")
    code, _, err = started(world.again(), capsys)
    assert code == EXIT_OK, err
    assert (run / "final.previous-1" / "thesis.pdf").read_text() == "precious"
    assert (run / ".notes.old" / "x").read_text() == "precious"
    assert not (run / ".checkpoint-6.partial").exists()


BEGUN = {
    "killed before anything was written": (),
    "killed while the log was opened": ("log.txt",),
    "killed before env.json": ("log.txt", "metrics.jsonl", "tensorboard"),
    "killed before config.yaml": ("log.txt", "metrics.jsonl", "tensorboard", "env.json"),
    "killed before the first checkpoint": (
        "log.txt",
        "metrics.jsonl",
        "tensorboard",
        "env.json",
        "config.yaml",
    ),
}


@pytest.mark.parametrize("name", BEGUN)
def test_a_run_that_was_killed_at_its_beginning_starts_again(
    name: str, world: World, capsys: Capture
) -> None:
    run, written = world.begun(), BEGUN[name]
    for path in run.iterdir():
        if path.name not in (*written, ".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if "metrics.jsonl" in written and "env.json" not in written:
        (run / "metrics.jsonl").write_text("")
    code, _, err = started(world.again("train.duration=3 steps"), capsys)
    assert code == EXIT_OK, err
    assert (run / "final" / "manifest.json").is_file()


def test_a_run_of_an_older_version_goes_on(world: World, capsys: Capture) -> None:
    """Its lock file is empty, or was not copied with the rest."""
    run = world.begun()
    (run / ".lock").unlink()
    code, _, err = started(world.again("train.duration=5 steps"), capsys)
    assert code == EXIT_OK, err
    (run / ".lock").write_text("")
    code, _, err = started(world.again("train.duration=6 steps"), capsys)
    assert code == EXIT_OK, err
    assert json.loads((run / "final" / "manifest.json").read_text())["step"] == 6


def test_a_run_that_cannot_be_moved_aside_stays(
    world: World, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mounted output_dir: its neighbours are on another disk."""
    world.begun()
    before = every_file(world.folder)

    def across(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", across)
        code, parts, err = started(world.again("--fresh"), capsys)
    assert code == EXIT_USAGE, err
    assert holds(parts["error"], world.folder / "run.previous-1")
    assert "cross-device" in parts["why"]
    assert every_file(world.folder) == before


def test_what_the_new_run_reads_is_not_moved_aside(world: World, capsys: Capture) -> None:
    run = world.begun()
    before = every_file(world.folder)
    code, parts, err = started(world.again("--fresh", f"adapter.from={run / 'final'}"), capsys)
    assert code == EXIT_USAGE, err
    assert str(run / "final") in parts["why"]
    assert every_file(world.folder) == before
