"""Checkpoints that are whole or not there, under kills and a full disk."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from errors import holds, refuses
from logged import logged_lines
from records import record
from tunesmith.checkpoint import claim, manifest, replicate
from tunesmith.checkpoint.resume import PROGRESS, Progress
from tunesmith.errors import CheckpointError


def write(run: Path, step: int, text: str = "weights") -> Path:
    place = run / f"checkpoint-{step}"
    with manifest.atomic_folder(place, step) as folder:
        (folder / "a.bin").write_text(text * 10)
        (folder / "state").mkdir()
        (folder / "state" / "b.bin").write_text(text)
    return place


def test_manifest_has_sizes_and_checksums(tmp_path: Path) -> None:
    place = write(tmp_path, 7)
    content = json.loads((place / "manifest.json").read_text())
    assert content["step"] == 7
    assert set(content["files"]) == {"a.bin", "state/b.bin"}
    assert content["files"]["a.bin"]["bytes"] == 70
    assert len(content["files"]["a.bin"]["sha256"]) == 64
    assert manifest.find_damage(place) is None
    assert manifest.last_step_of(place) == 7


DAMAGE = {
    "manifest.json": [None, "{", '{"step": 7, "files": {"a.bin": 70}}'],
    "a.bin": [None, "WEIGHTS" * 10],
}


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name in DAMAGE for content in DAMAGE[name]]
)
def test_a_torn_one_is_passed_over_and_said(tmp_path: Path, name: str, content: str | None) -> None:
    write(tmp_path, 1)
    file = write(tmp_path, 2) / name
    file.unlink()
    if content is not None:
        file.write_text(content)
    with logged_lines() as said:
        assert replicate.newest_checkpoint(tmp_path) == (1, 0)
    assert len(said) == 1
    assert holds(said[0], "checkpoint-2", name)


def test_an_error_in_the_block_leaves_no_trace_and_the_old_one(tmp_path: Path) -> None:
    write(tmp_path, 5, "old")

    def fail() -> None:
        with manifest.atomic_folder(tmp_path / "checkpoint-5", 5) as folder:
            (folder / "a.bin").write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "checkpoint-5" / "a.bin").read_text() == "old" * 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-5"]
    write(tmp_path, 5, "new")
    assert (tmp_path / "checkpoint-5" / "a.bin").read_text() == "new" * 10


@pytest.mark.parametrize(
    ("steps", "keep", "latest", "kept_step", "left"),
    [
        ((1, 2, 3, 4, 10), 2, 10, 1, [10, 4, 1]),  # the newest ones and the best
        ((2, 4, 8), 1, 4, None, [4]),  # a torn one of a later step takes no place
    ],
)
def test_prune_keeps_the_newest_and_the_best(steps, keep, latest, kept_step, left, tmp_path):
    for step in steps:
        write(tmp_path, step)
    manifest.prune(tmp_path, keep, latest=latest, keep_step=kept_step)
    assert [*manifest.list_checkpoints(tmp_path)] == left


def test_remove_leftovers_puts_back_a_folder_that_was_being_replaced(tmp_path: Path) -> None:
    write(tmp_path, 3).rename(tmp_path / ".checkpoint-3.old")
    (tmp_path / ".checkpoint-4.partial").mkdir()
    (tmp_path / ".best.json.partial").write_text("{")
    claim.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3"]


@pytest.mark.parametrize("beside", ["nothing", "torn", "other", "other, renamed"])
def test_a_kill_before_the_renaming_loses_no_checkpoint(beside: str, tmp_path: Path) -> None:
    """A folder under its hidden name is complete. It takes the place of a torn one, which stays."""
    place = write(tmp_path, 3, "b" if beside == "other, renamed" else "a")
    place.rename(tmp_path / ".checkpoint-3.partial")
    if beside.startswith("other"):
        write(tmp_path, 3, "a" if beside == "other, renamed" else "b")
    elif beside == "torn":
        place.mkdir()
        (place / "a.bin").write_text("torn")
    assert replicate.newest_checkpoint(tmp_path) == (3, 0)
    assert manifest.find_damage(place) is None
    claim.remove_leftovers(tmp_path)
    texts = {path.read_text() for path in tmp_path.glob("*/a.bin")}
    assert texts <= {"a" * 10, "b" * 10, "torn"}
    assert ("torn" in texts) == (beside == "torn")


WRITER = """
import sys
from pathlib import Path
from tunesmith.checkpoint import manifest
run = Path(sys.argv[1])
for step in range(1, 100_000):
    with manifest.atomic_folder(run / f"checkpoint-{step}", step) as folder:
        for name in "abcd":
            (folder / name).write_bytes(bytes([step % 256]) * 50_000)
    manifest.prune(run, 2, latest=step, keep_step=None)
    print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills", [range(0, 12, 4), pytest.param(range(24), marks=pytest.mark.nightly)]
)
def test_kill_9_at_any_moment_leaves_a_whole_newest_one(kills: range, tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for number in kills:
        run = tmp_path / str(number)
        run.mkdir()
        command = [sys.executable, "-c", WRITER, str(run)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        assert child.stdout is not None
        for _ in range(3):
            seen = int(child.stdout.readline())
        time.sleep(0.0013 * number)
        child.kill()
        seen = max([seen, *map(int, child.stdout.read().split())])
        child.wait()
        claim.remove_leftovers(run)
        found = replicate.newest_checkpoint(run)
        assert found is not None
        assert found[0] >= seen
        assert not list(run.glob(".*"))


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    last = record(3, val_loss=math.inf, extra={"kl": 0.1})
    before = Progress(3, 1.5, last, best_step=2, kept_step=1, kept_score=[2.5], worse=1)
    before.write(tmp_path)
    assert Progress.read(tmp_path) == before


OLD = {"step": 3, "seconds": 1.5, "record": json.loads(record(3).to_json()), "validated": True}


def test_an_older_file_is_read_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / PROGRESS
    path.parent.mkdir()
    path.write_text(json.dumps(OLD | {"rounding": "counter"}))  # a key of an earlier version
    assert Progress.read(tmp_path) == Progress(step=3, seconds=1.5, record=record(3))
    for broken, named in (({"step": 3}, ["'record'"]), ([], []), ("{", [])):
        path.write_text(json.dumps(broken))
        with refuses(CheckpointError, names=[PROGRESS, *named]):
            Progress.read(tmp_path)
