"""The writer of a run's checkpoints. It writes immediately or in a background thread."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tunesmith.checkpoint.manifest import Entries, atomic_folder, prune

# Type of a function that writes files into an empty folder. It returns the manifest entries of the
# files that it has already hashed.
SaveFunction = Callable[[Path], Entries | None]


class Writer:
    """A writer of `checkpoint-<step>` folders in a run directory.

    It keeps the `keep` newest folders and deletes older ones.

    An error of the background thread is raised unchanged by the next call of `write`, `write_async`
    or `wait`. A run calls `wait` before it ends, so that no thread writes into a directory that
    another run may already use.

    Args:
        saved_step: step of the newest complete checkpoint, initially the one from which the run
            resumes. None if there is none.
        sync: function that flushes other files of the run to the disk. It is called before each
            checkpoint, in the thread that writes the checkpoint.
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
        """Write a checkpoint now. If another checkpoint is in progress, wait for it first.

        Args:
            keep_step: step of a checkpoint that is not deleted, regardless of its age.

        Raise CheckpointError if it cannot be written. Existing checkpoints are then unchanged.
        """
        self.wait()
        self._write(save, step, keep_step)

    def write_async(self, save: SaveFunction, step: int, *, keep_step: int | None) -> None:
        """Write a checkpoint as `write` does, but in the background thread."""
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
        """Return whether the last write has failed. `wait` raises its error."""
        running = self._running
        return running is not None and running.done() and running.exception() is not None

    def wait(self) -> None:
        """Wait for the write in progress, if there is one, and raise its error."""
        running = self._running
        # Clear the attribute before waiting, so that an error is raised only once.
        self._running = None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait for the write in progress, and end the thread.

        The error of the write is not raised, because the run already ends for another reason.
        """
        self._running = None
        self._pool.shutdown()
