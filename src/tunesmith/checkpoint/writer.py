"""Writes a run's checkpoints, one at a time: in the calling thread, or in one background thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tunesmith.checkpoint import state

Fill = Callable[[Path], None]


class Writer:
    """Writes `checkpoint-<step>` into a run directory and deletes the oldest beyond `keep`.

    An error of the background thread is raised unchanged by the next call. A run waits before it ends, so that no thread
    writes into a directory that another run may already hold.

    Args:
        run_dir: the folder of the checkpoints.
        keep: how many of them stay.
        saved_step: step of the checkpoint that the run resumes from, or None.
        sync: flushes to the disk what must be there before a checkpoint counts; called in the thread that writes.

    Attributes:
        saved_step: step of the newest complete checkpoint.
    """

    def __init__(self, run_dir: Path, keep: int, saved_step: int | None, *, sync: Callable[[], None]) -> None:
        self.saved_step = saved_step
        self._run_dir, self._keep, self._sync = run_dir, keep, sync
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tunesmith-checkpoint")
        self._running: Future[None] | None = None

    def write(self, fill: Fill, step: int, *, keep_step: int | None) -> None:
        """Write a checkpoint now, after the one in progress.

        Args:
            fill: writes the checkpoint's files into an empty folder.
            step: the step it belongs to.
            keep_step: step of a checkpoint that stays however old it is, or None.

        Raises:
            CheckpointError: it cannot be written; what was there before stays. All methods but `close` raise it.
        """
        self.wait()
        self._write(fill, step, keep_step)

    def write_async(self, fill: Fill, step: int, *, keep_step: int | None) -> None:
        """As `write`, in the background thread."""
        self.wait()
        self._running = self._pool.submit(self._write, fill, step, keep_step)

    def _write(self, fill: Fill, step: int, keep_step: int | None) -> None:
        self._sync()
        with state.writing(self._run_dir / f"checkpoint-{step}", step) as folder:
            fill(folder)
        self.saved_step = step
        state.prune(self._run_dir, self._keep, latest=step, keep_step=keep_step)

    def check(self) -> None:
        """Raise the error of the last write, if it has ended with one; do not wait for it."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the write in progress, if there is one, and raise its error."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Let the write in progress finish, and end the thread.

        An error of that write is dropped: the run ends for another reason, which is the one to report.
        """
        self._running = None
        self._pool.shutdown()
