"""The pixels of rows' pictures, prepared by other processes while the model computes.

Decoding and scaling a picture takes up to a second of a core (Qwen3-VL at 3 megapixels), and the
result up to 70 MB: nothing of it is kept on the disk, and few steps are prepared ahead.
"""

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

from tunesmith.data.rows.pictures import open_picture, picture_digest, picture_place, read_picture
from tunesmith.data.rows.samples import Picture
from tunesmith.data.text.example import Pixels
from tunesmith.data.tokens.token_set import SourceTokens
from tunesmith.data.workers import WorkerPool
from tunesmith.errors import DataError
from tunesmith.host.cores import available_cores

if TYPE_CHECKING:
    from tunesmith.data.text.placeholders import PictureProcessor

# One process for so many cores: the others compute, on a GPU machine for the other ranks.
CORES_EACH = 4
MAX_PIXEL_WORKERS = 8


@dataclass(frozen=True)
class PixelTask:
    """The pictures of one row.

    Attributes:
        digests: what their bytes hashed to when they became tokens; empty where that is not known.
        where: the row's place.
    """

    pictures: tuple[Picture, ...]
    digests: tuple[int, ...] = ()
    where: str = ""


@dataclass(frozen=True)
class PixelMaker:
    """Makes pixels of a row's pictures; sent to each process once."""

    processor: "PictureProcessor"

    def __call__(self, task: PixelTask) -> Pixels:
        """Read, check, open and process the pictures of one row, in one call of the processor."""
        images = []
        for n, picture in enumerate(task.pictures):
            data = read_picture(picture, task.where)
            place = picture_place(picture, task.where)
            if task.digests and picture_digest(data) != task.digests[n]:
                raise DataError(
                    "the picture has changed since its row became tokens",
                    where=place,
                    why="its file was changed since the rows were read",
                    fix="put the old file back; or resume with checkpoint.resume=force, which"
                    " continues with the new one",
                )
            images.append(open_picture(data, place, self.processor.max_pixels))
        return self.processor.pixels(images)


def default_workers() -> int:
    """Return how many processes prepare pictures for this rank, by its cores.

    With a GPU there is at least one: the thread that prepares pictures would hold Python's lock
    while the thread that launches kernels needs it.
    """
    import torch

    cores = available_cores()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Under srun each rank is bound to cores of its own; under torchrun all ranks share the cores.
    if cores * ranks > (os.cpu_count() or 1):
        cores //= ranks
    min_workers = 1 if torch.cuda.is_available() else 0
    return min(max(cores // CORES_EACH, min_workers), MAX_PIXEL_WORKERS)


class PixelReader:
    """Hands out the pictures of the rows of token sets.

    Its processes end with it.

    Args:
        workers: processes; None: `default_workers`. With none of them a row's pictures are made in
            the thread that asks for them.
    """

    def __init__(self, processor: "PictureProcessor", *, workers: int | None = None) -> None:
        self._make = PixelMaker(processor)
        self.token_id = processor.token_id
        self.workers = default_workers() if workers is None else workers
        self._starting = Lock()
        self._pool: WorkerPool[PixelTask, Pixels] | None = None

    def of(self, part: SourceTokens, at: int, digests: Sequence[int]) -> "PicturesOfRow":
        """The pictures of an example of a source; its row is read when they are asked for."""
        return PicturesOfRow(self, part, at, tuple(digests))

    def submit(self, task: PixelTask) -> Callable[[], Pixels]:
        """Have the pixels of a row made; what is returned waits for them."""
        if not self.workers:
            return partial(self._make, task)
        # Asked for by the thread of the training rows, and by that of the held-out ones.
        with self._starting:
            if self._pool is None:
                what = "a process that prepares pictures"
                self._pool = WorkerPool(self._make, self.workers, what)
                weakref.finalize(self, self._pool.close)
        return self._pool.submit(task, task.where).result


class PicturesOfRow:
    """The pictures of one row, as an `Example` has them."""

    def __init__(
        self, reader: PixelReader, part: SourceTokens, at: int, digests: tuple[int, ...]
    ) -> None:
        self._reader = reader
        self._part = part
        self._at = at
        self._digests = digests
        self._wait: Callable[[], Pixels] | None = None

    @property
    def token_id(self) -> int:
        return self._reader.token_id

    def begin(self) -> None:
        """Read the row, and have its pixels made, unless that was begun before."""
        if self._wait is None:
            pictures = self._part.row_pictures(self._at)
            task = PixelTask(pictures, self._digests, self._part.where(self._at))
            self._wait = self._reader.submit(task)

    def pixels(self) -> Pixels:
        """Wait for the pixels; DataError where a picture is not the one that was tokenized."""
        self.begin()
        assert self._wait is not None
        return self._wait()
