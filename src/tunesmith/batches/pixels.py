"""Preparation of the pixels of pictures in worker processes, while the model computes.

Decoding and scaling a picture takes up to one second on a core, and the result has up to 70 MB
(Qwen3-VL with 3 megapixels). Therefore pixels are not stored on disk, and are prepared only for a
few steps in advance.
"""

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

from tunesmith.errors import DataError
from tunesmith.host.cores import available_cores
from tunesmith.host.workers import Worker, WorkerPool
from tunesmith.rows.pictures import open_picture, picture_digest, picture_place, read_picture
from tunesmith.rows.samples import Picture, pictures_of
from tunesmith.tokens.text.example import Pixels
from tunesmith.tokens.token_set import SourceTokens

if TYPE_CHECKING:
    from tunesmith.tokens.text.placeholders import PictureProcessor

# Number of CPU cores per worker process. The worker uses only one of them. The others remain free
# for training and for other ranks.
CORES_PER_WORKER = 4
MAX_PIXEL_WORKERS = 8


@dataclass(frozen=True)
class PixelTask:
    """The pictures of one row, as a task for a worker process.

    Attributes:
        pictures: the pictures, not yet decoded.
        digests: the digests of the pictures at the time of tokenization, to detect changed files.
            Empty if they are not known.
        where: file and line of the row.
    """

    pictures: tuple[Picture, ...]
    digests: tuple[int, ...] = ()
    where: str = ""


def make_pixels(processor: "PictureProcessor", task: PixelTask) -> Pixels:
    """Read, check and decode the pictures of one row, and process them in one processor call."""
    images = []
    for n, picture in enumerate(task.pictures):
        data = read_picture(picture, task.where)
        place = picture_place(picture, task.where)
        if task.digests and picture_digest(data) != task.digests[n]:
            raise DataError(
                "the picture has changed since its row was tokenized",
                where=place,
                fix="restore the old file, or resume with checkpoint.resume=force, which"
                " continues with the new file",
            )
        images.append(open_picture(data, place, processor.max_pixels))
    return processor.pixels(images)


@dataclass(frozen=True)
class PicturesOfPrompt:
    """The pictures of a prompt, which are read when their pixels are needed."""

    processor: "PictureProcessor"
    task: PixelTask

    @property
    def token_id(self) -> int:
        return self.processor.token_id

    def begin(self) -> None:
        """Do nothing: `pixels` reads the pictures in this process."""

    def pixels(self) -> Pixels:
        """Compute the pixels. Raise DataError if a picture cannot be read."""
        return make_pixels(self.processor, self.task)


def default_workers() -> int:
    """Return the number of worker processes of this rank, from its number of CPU cores.

    With a GPU, the result is at least 1. Without a worker process, the loader's thread would hold
    Python's global interpreter lock while the main thread needs it to launch kernels.
    """
    import torch

    cores = available_cores()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # If the ranks together see more cores than the machine has, they share the cores. This is the
    # case with torchrun. srun binds each rank to separate cores.
    if cores * ranks > (os.cpu_count() or 1):
        cores //= ranks
    min_workers = 1 if torch.cuda.is_available() else 0
    return min(max(cores // CORES_PER_WORKER, min_workers), MAX_PIXEL_WORKERS)


class PixelReader:
    """Reader of the pictures of examples. A pool of worker processes prepares the pixels.

    The processes end when the reader is deleted.

    Args:
        processor: the processor of the model, which converts pictures to pixels.
        workers: number of processes. If None, `default_workers()`. If 0, the calling thread
            prepares the pictures.
    """

    def __init__(self, processor: "PictureProcessor", *, workers: int | None = None) -> None:
        # Each worker gets a copy of this function.
        self._make = partial(make_pixels, processor)
        self.token_id = processor.token_id
        self.workers = default_workers() if workers is None else workers
        self._starting = Lock()
        self._pool: WorkerPool[Worker[PixelTask, Pixels]] | None = None

    def of(self, part: SourceTokens, at: int, digests: Sequence[int]) -> "PicturesOfRow":
        """Return the pictures of example `at` of a source.

        The row is read later, when the pictures are needed.
        """
        return PicturesOfRow(self, part, at, tuple(digests))

    def submit(self, task: PixelTask) -> Callable[[], Pixels]:
        """Start the preparation of a row's pixels. Return a function that waits for the result."""
        if not self.workers:
            return partial(self._make, task)
        # Use a lock to create the pool, because two threads call this method: one for training rows
        # and one for validation rows.
        with self._starting:
            if self._pool is None:
                what = "a process that prepares pictures"
                self._pool = WorkerPool([Worker(self._make, what) for _ in range(self.workers)])
                weakref.finalize(self, self._pool.close)
        return self._pool.submit(Worker.__call__, task, task.where).result


@dataclass(eq=False, repr=False)
class PicturesOfRow:
    """The pictures of one row. This is the value of `Example.pictures`."""

    _reader: PixelReader
    _part: SourceTokens
    _at: int
    _digests: tuple[int, ...]
    _wait: Callable[[], Pixels] | None = None

    @property
    def token_id(self) -> int:
        return self._reader.token_id

    def begin(self) -> None:
        """Read the row and start the preparation of its pixels, if this is the first call."""
        if self._wait is None:
            pictures = pictures_of(self._part.sample(self._at))
            task = PixelTask(pictures, self._digests, self._part.where(self._at))
            self._wait = self._reader.submit(task)

    def pixels(self) -> Pixels:
        """Wait for the pixels. Raise DataError if a picture has changed since tokenization."""
        self.begin()
        assert self._wait is not None
        return self._wait()
