"""Who writes a run's checkpoints: the caller itself, or one thread behind the training, one checkpoint at a time.

What is said of a checkpoint is as true as if the loop had written it: it counts only once its folder has its name, older
ones go only after that, and a fault of the disk is raised in the loop, as it was, by the first call after it. Whoever
ends a run waits first, so that no thread writes into a directory that another run may already hold.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tunesmith.checkpoint import state

Fill = Callable[[Path], None]


class Writer:
    """Writes `checkpoint-<step>` into a run directory and drops the oldest beyond `keep`.

    Args:
        run_dir: where the checkpoints lie.
        keep: how many of them stay.
        saved_step: step of the checkpoint that the run goes on from, or None.
        sync: puts on the disk what must be there before a checkpoint counts; called in the thread that writes.

    Attributes:
        saved_step: step of the newest whole checkpoint.
    """

    def __init__(self, run_dir: Path, keep: int, saved_step: int | None, *, sync: Callable[[], None]) -> None:
        self.saved_step = saved_step
        self._run_dir, self._keep, self._sync = run_dir, keep, sync
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tunesmith-checkpoint")
        self._running: Future[None] | None = None

    def write(self, fill: Fill, step: int, *, spare: int | None) -> None:
        """Write a checkpoint now, after the one under way.

        Args:
            fill: writes all that the checkpoint holds into an empty folder.
            step: the step it belongs to.
            spare: step of the checkpoint that stays however old it is, or None.

        Raises:
            CheckpointError: it cannot be written; what was there before stays. So in all of these.
        """
        self.wait()
        self._write(fill, step, spare)

    def write_behind(self, fill: Fill, step: int, *, spare: int | None) -> None:
        """The same in the thread, once the one under way is done."""
        self.wait()
        self._running = self._pool.submit(self._write, fill, step, spare)

    def _write(self, fill: Fill, step: int, spare: int | None) -> None:
        self._sync()
        with state.writing(self._run_dir / f"checkpoint-{step}", step) as folder:
            fill(folder)
        self.saved_step = step
        state.prune(self._run_dir, self._keep, latest=step, spare=spare)

    def check(self) -> None:
        """Raise what the last write raised, if it has ended; one that has not is not waited for."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the write under way, if there is one; raise what it raised."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Let the write under way come to its end, and the thread with it.

        A fault of that write is dropped: the run ends for another reason, which is the one to tell.
        """
        self._running = None
        self._pool.shutdown()
