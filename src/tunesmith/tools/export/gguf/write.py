"""A planned GGUF file onto the disk, in bands of rows that threads read and quantize.

Peak memory is a few bands a thread, whatever the size of the model: the embedding of a 70B model
alone is 2 GB in bf16. Bands are written in the order of the file.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from tunesmith.tools.export.gguf.families import pair_neighbors
from tunesmith.tools.export.gguf.plan import GgufPlan, GgufTensor, padded
from tunesmith.tools.export.gguf.quantize import quantize_rows

BAND_VALUES = 4 * 2**20  # 16 MB in fp32
BandJob = Callable[[], memoryview]


def write_gguf(
    plan: GgufPlan,
    path: Path,
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda written, size: None,
) -> None:
    """Write the file; `progress` gets the bytes written so far, and those of the file.

    OSError where the disk is full.
    """
    bands = list(_bands(plan))
    with BandThreads(threads) as workers, path.open("wb") as file:
        file.write(plan.header)
        progress(file.tell(), plan.size)
        results = workers.run(partial(_band_bytes, band) for band in bands)
        for band, data in zip(bands, results, strict=True):
            file.write(data)
            if band.last == band.tensor.shape[0]:
                file.write(bytes(padded(band.tensor.size) - band.tensor.size))
            progress(file.tell(), plan.size)
        # The data is on the disk before the file gets its name.
        file.flush()
        os.fsync(file.fileno())


class BandThreads:
    """Threads that quantize bands of rows, for use in a `with` statement."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def __enter__(self) -> Self:
        self._torch_threads = torch.get_num_threads()
        # One thread of torch in each worker: the workers themselves fill the cores.
        self._pool = ThreadPoolExecutor(
            self._threads, initializer=torch.set_num_threads, initargs=(1,)
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        # The workers set theirs to 1, and MKL has one number for all threads.
        torch.set_num_threads(self._torch_threads)

    def run(self, jobs: Iterable[BandJob]) -> Iterator[memoryview]:
        """Yield the results in the order of the jobs, though they may be ready in another."""
        running: deque[Future[memoryview]] = deque()
        for job in jobs:
            running.append(self._pool.submit(job))
            # Two more than threads: a free thread begins another while the caller writes one.
            if len(running) == self._threads + 2:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def tensor_jobs(tensor: Tensor, ggml_type: str, name: str) -> Iterator[BandJob]:
    """Yield the jobs that quantize a tensor in memory, such as a stack of experts, band by band.

    Only bands are copied, as contiguous fp32: the tensor may be in bf16, or a transposed view.
    """
    tensor = torch.atleast_2d(tensor)
    step = max(BAND_VALUES // tensor.shape[-1], 1)
    for index in product(*map(range, tensor.shape[:-2])):
        for rows in tensor[index].split(step):
            yield partial(_quantize_copy, rows, ggml_type, name)


def _quantize_copy(rows: Tensor, ggml_type: str, name: str) -> memoryview:
    return quantize_rows(rows.float().contiguous(), ggml_type, name)


class Band(NamedTuple):
    """The rows of a tensor from the first to before the last."""

    tensor: GgufTensor
    first: int
    last: int


def _bands(plan: GgufPlan) -> Iterator[Band]:
    for tensor in plan.tensors:
        count = tensor.shape[0]
        # The step is counted in rows; the last band has what is left.
        step = _rows_of_a_band(tensor)
        for first in range(0, count, step):
            yield Band(tensor, first, min(first + step, count))


def _rows_of_a_band(tensor: GgufTensor) -> int:
    """Count the rows that fit, in whole heads where rows change places within a head."""
    values = prod(tensor.shape[1:])
    # A head's halves change places, so a band must not cut one.
    unit = 1 if tensor.heads is None else tensor.shape[0] // tensor.heads
    return max(BAND_VALUES // values // unit, 1) * unit


def _band_bytes(band: Band) -> memoryview:
    tensor, first, last = band
    rows = tensor.source.rows(first, last)
    if tensor.offset:
        rows = rows + tensor.offset
    if tensor.heads is not None:
        rows = pair_neighbors(rows, tensor.shape[0] // tensor.heads)
    return quantize_rows(rows.contiguous(), tensor.ggml_type, tensor.name)
