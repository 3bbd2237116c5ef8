"""Writes a run's checkpoints, at once or in a thread beside the steps."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tunesmith.checkpoint.manifest import Entries, atomic_folder, prune

# Writes files into an empty folder; returns the entries of those that it hashed as it wrote them.
SaveFunction = Callable[[Path], Entries | None]


class Writer:
    """Writes `checkpoint-<step>` into a run directory and deletes the oldest beyond `keep`.

    An error of the background thread is raised unchanged by the next `write`, `write_async` or
    `wait`. A run waits before it ends, so that no thread writes into a directory that another run
    may already hold.

    Args:
        saved_step: step of the newest complete checkpoint, at first of that which the run resumes
            from; or None.
        sync: flushes to the disk what must be there before a checkpoint counts; called in the
            thread that writes.
    """

    def __init__(
        self, run_dir: Path, keep: int, saved_step: int | None, *, sync: Callable[[], None]
    ) -> None:
        self.saved_step = saved_step
        self._run_dir = run_dir
        self._keep = keep
        self._sync = sync
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tunesmith-checkpoint")
        self._running: Future[None] | None = None

    def write(self, save: SaveFunction, step: int, *, keep_step: int | None) -> None:
        """Write a checkpoint now, after the one in progress.

        keep_step: this checkpoint stays however old it is.

        CheckpointError if it cannot be written; what was there before stays.
        """
        self.wait()
        self._write(save, step, keep_step)

    def write_async(self, save: SaveFunction, step: int, *, keep_step: int | None) -> None:
        """Write as `write` does, in the background thread."""
        self.wait()
        self._running = self._pool.submit(self._write, save, step, keep_step)

    def _write(self, save: SaveFunction, step: int, keep_step: int | None) -> None:
        self._sync()
        with atomic_folder(self._run_dir / f"checkpoint-{step}", step) as folder:
            save(folder)
        self.saved_step = step
        prune(self._run_dir, self._keep, latest=step, keep_step=keep_step)

    @property
    def failed(self) -> bool:
        """Tell whether the last write has ended with an error, which `wait` raises."""
        running = self._running
        return running is not None and running.done() and running.exception() is not None

    def wait(self) -> None:
        """Wait for the write in progress, if there is one, and raise its error."""
        running = self._running
        # The error is raised once.
        self._running = None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Let the write in progress finish, and end the thread.

        Its error is not raised: the run ends for another reason.
        """
        self._running = None
        self._pool.shutdown()
