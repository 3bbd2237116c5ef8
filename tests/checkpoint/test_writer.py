"""Checkpoints written in the background: what is reported of them holds, whatever the thread is
doing.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.checkpoint import manifest
from tunesmith.checkpoint.writer import Writer
from tunesmith.errors import CheckpointError


class Held:
    """Fills a checkpoint's folder once it is let go."""

    def __init__(self, error: OSError | None = None) -> None:
        self.begun, self.go, self.error = threading.Event(), threading.Event(), error

    def __call__(self, folder: Path) -> None:
        (folder / "weights").write_bytes(b"x" * 1000)
        self.begun.set()
        assert self.go.wait(30), "never let go"
        if self.error is not None:
            raise self.error


def quick(folder: Path) -> None:
    (folder / "weights").write_bytes(b"x")


@pytest.fixture
def synced() -> list[str]:
    return []


@pytest.fixture
def writer(tmp_path: Path, synced: list[str]) -> Iterator[Writer]:
    def sync() -> None:
        synced.append(",".join(sorted(p.name for p in tmp_path.iterdir())))

    writer = Writer(tmp_path, 2, None, sync=sync)
    yield writer
    writer.close()


def whole(run_dir: Path) -> list[int]:
    found = manifest.list_checkpoints(run_dir)
    return sorted(step for step in found if manifest.find_damage(found[step]) is None)


def test_it_counts_only_when_it_is_whole_and_older_ones_go_after_that(writer, tmp_path, synced):
    for step in (1, 2):
        writer.write(quick, step, keep_step=None)
    assert writer.saved_step == 2
    save = Held()
    writer.write_async(save, 3, keep_step=None)
    assert save.begun.wait(30)
    assert not writer.failed
    # The older ones are needed until it is whole.
    assert (writer.saved_step, whole(tmp_path)) == (2, [1, 2])
    save.go.set()
    writer.wait()
    assert (writer.saved_step, whole(tmp_path)) == (3, [2, 3])
    # The records are on the disk first.
    assert synced == ["", "checkpoint-1", "checkpoint-1,checkpoint-2"]


def test_the_next_one_waits_and_the_spared_one_stays(writer: Writer, tmp_path: Path) -> None:
    first, order = Held(), []
    writer.write_async(first, 1, keep_step=1)
    threading.Timer(0.1, lambda: (order.append("released"), first.go.set())).start()
    writer.write_async(quick, 2, keep_step=1)
    order.append("second")
    assert order == ["released", "second"]
    for step in (3, 4):
        writer.write_async(quick, step, keep_step=1)
    writer.wait()
    assert whole(tmp_path) == [1, 3, 4]


def test_a_full_disk_in_the_thread_is_raised_in_the_loop(writer: Writer, tmp_path: Path) -> None:
    """The error is the very one that a write in the loop raises, once; what was whole stays."""

    def save(folder: Path) -> None:
        quick(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    writer.write(quick, 1, keep_step=None)
    with pytest.raises(CheckpointError) as at_once:
        writer.write(save, 2, keep_step=None)
    writer.write_async(save, 2, keep_step=None)
    until = time.monotonic() + 30
    while not writer.failed and time.monotonic() < until:
        time.sleep(0.01)
    assert writer.failed
    with pytest.raises(CheckpointError) as behind:
        writer.wait()
    assert not writer.failed
    assert behind.value.text() == at_once.value.text()
    assert (writer.saved_step, whole(tmp_path)) == (1, [1])
    assert not list(tmp_path.glob(".*"))
    writer.wait()


def test_close_lets_it_end_and_keeps_its_fault_to_itself(writer: Writer, tmp_path: Path) -> None:
    save = Held()
    writer.write_async(save, 5, keep_step=None)
    threading.Timer(0.1, save.go.set).start()
    writer.close()
    assert (writer.saved_step, whole(tmp_path)) == (5, [5])
    other = Writer(tmp_path, 2, 5, sync=lambda: None)
    broken = Held(OSError(errno.ENOSPC, "No space left on device"))
    broken.go.set()
    other.write_async(broken, 6, keep_step=None)
    other.close()
    other.close()
    assert (other.saved_step, whole(tmp_path)) == (5, [5])
    assert not [t for t in threading.enumerate() if t.name.startswith("tunesmith-checkpoint")]
