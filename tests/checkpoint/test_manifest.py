"""Checkpoints that are whole or not there, under kills and a full disk."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from errors import check_error
from logged import logged_lines
from page_cache import resident
from tunesmith.checkpoint import claim, manifest, replicate
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


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux can be told to drop pages"
)
def test_nothing_of_it_stays_in_the_page_cache(tmp_path: Path) -> None:
    """48 GiB of a 3B model trained in full would fill the memory that a GB10's GPU shares."""
    (tmp_path / "other").write_bytes(bytes(1 << 20))
    if resident(tmp_path / "other") < 200:
        pytest.skip("this file system does not cache")
    with manifest.atomic_folder(tmp_path / "checkpoint-1", 1) as folder:
        (folder / "weights").write_bytes(bytes(1 << 20))
    assert resident(tmp_path / "checkpoint-1" / "weights") == 0
    (tmp_path / "checkpoint-1" / "weights").read_bytes()
    assert manifest.find_damage(tmp_path / "checkpoint-1") is None
    assert resident(tmp_path / "checkpoint-1" / "weights") == 0


@pytest.mark.parametrize(
    ("tear", "words"),
    [
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
        (lambda p: (p / "manifest.json").write_text("{"), "cannot be read"),
        (
            lambda p: (p / "manifest.json").write_text('{"step": 7, "files": {"a.bin": 70}}'),
            "cannot be read",
        ),
        (lambda p: (p / "a.bin").unlink(), "a.bin is missing"),
        (lambda p: (p / "a.bin").write_text("short"), "has 5 bytes instead of 70"),
        (lambda p: (p / "a.bin").write_text("WEIGHTS" * 10), "do not match their checksum"),
    ],
)
def test_a_torn_one_is_passed_over_and_said(tmp_path: Path, tear, words: str) -> None:
    write(tmp_path, 1)
    tear(write(tmp_path, 2))
    with logged_lines() as said:
        found = replicate.newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == 1
    assert len(said) == 1
    assert "checkpoint-2" in said[0]
    assert words in said[0]


def test_none_whole(tmp_path: Path) -> None:
    with logged_lines() as said:
        assert replicate.newest_checkpoint(tmp_path) is None
    assert said == []


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


def test_a_full_disk_names_what_is_kept(tmp_path: Path) -> None:
    write(tmp_path, 5)
    with (
        pytest.raises(CheckpointError) as caught,
        manifest.atomic_folder(tmp_path / "checkpoint-6", 6),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    check_error(caught.value, cause="disk", names=["checkpoint-5"])
    assert manifest.find_damage(tmp_path / "checkpoint-5") is None


def test_replacing_keeps_the_new_one(tmp_path: Path) -> None:
    write(tmp_path, 5, "old")
    write(tmp_path, 5, "new")
    assert (tmp_path / "checkpoint-5" / "a.bin").read_text() == "new" * 10


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 10):
        write(tmp_path, step)
    manifest.prune(tmp_path, 2, latest=10, keep_step=1)
    assert [*manifest.list_checkpoints(tmp_path)] == [10, 4, 1]


def test_a_torn_one_of_a_later_step_takes_no_place(tmp_path: Path) -> None:
    for step in (2, 4, 8):
        write(tmp_path, step)
    manifest.prune(tmp_path, 1, latest=4, keep_step=None)
    assert [*manifest.list_checkpoints(tmp_path)] == [4]


def test_remove_leftovers_puts_back_a_folder_that_was_being_replaced(tmp_path: Path) -> None:
    write(tmp_path, 3).rename(tmp_path / ".checkpoint-3.old")
    (tmp_path / ".checkpoint-4.partial").mkdir()
    (tmp_path / ".best.json.partial").write_text("{")
    claim.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3"]


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
def test_kill_9_at_any_moment_leaves_a_whole_newest_one(tmp_path: Path) -> None:
    """Twelve kills at moments spread over writing, committing, renaming and pruning."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for number in range(12):
        run = tmp_path / str(number)
        run.mkdir()
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(run)], stdout=subprocess.PIPE, text=True, env=env
        )
        assert child.stdout is not None
        for _ in range(3):
            seen = int(child.stdout.readline())
        time.sleep(0.0013 * number)
        child.send_signal(signal.SIGKILL)
        seen = max([seen, *map(int, child.stdout.read().split())])
        child.wait()
        claim.remove_leftovers(run)
        found = replicate.newest_checkpoint(run)
        assert found is not None
        assert found[0] >= seen
        assert not list(run.glob(".*"))
