"""Writer of a planned GGUF file. Threads read and quantize bands of rows.

Peak memory is a few bands per thread, and does not depend on the size of the model. In comparison,
the entire embedding of a 70B model takes 2 GB in bf16. Bands are written in the order of the file.
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

BAND_VALUES = 4 * 2**20  # maximum number of values in a band: 16 MB in fp32
BandJob = Callable[[], memoryview]


def write_gguf(
    plan: GgufPlan,
    path: Path,
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda written, size: None,
) -> None:
    """Write the planned GGUF file. Raise OSError if the disk is full.

    Args:
        progress: function that is called with the number of written bytes and the file size.
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
        # Flush the data to disk, because the caller then renames the file to its final name.
        file.flush()
        os.fsync(file.fileno())


class BandThreads:
    """Pool of threads that quantize bands of rows, for use in a `with` statement."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def __enter__(self) -> Self:
        self._torch_threads = torch.get_num_threads()
        # Let torch use one thread in each worker, because the workers together already use all
        # cores.
        self._pool = ThreadPoolExecutor(
            self._threads, initializer=torch.set_num_threads, initargs=(1,)
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        # Restore torch's number of threads. The workers set it to 1, and in MKL this setting
        # applies to all threads.
        torch.set_num_threads(self._torch_threads)

    def run(self, jobs: Iterable[BandJob]) -> Iterator[memoryview]:
        """Run jobs concurrently, and yield their results in the order of the jobs."""
        running: deque[Future[memoryview]] = deque()
        for job in jobs:
            running.append(self._pool.submit(job))
            # Keep two more jobs in the queue than there are threads, so that no thread is idle
            # while the caller writes a result.
            if len(running) == self._threads + 2:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def tensor_jobs(tensor: Tensor, ggml_type: str, name: str) -> Iterator[BandJob]:
    """Yield jobs that quantize a tensor in memory, such as a stack of experts, band by band.

    The tensor can be in bf16 or a transposed view. Each job copies only its band to contiguous
    fp32.
    """
    tensor = torch.atleast_2d(tensor)
    step = max(BAND_VALUES // tensor.shape[-1], 1)
    for index in product(*map(range, tensor.shape[:-2])):
        for rows in tensor[index].split(step):
            yield partial(_quantize_copy, rows, ggml_type, name)


def _quantize_copy(rows: Tensor, ggml_type: str, name: str) -> memoryview:
    return quantize_rows(rows.float().contiguous(), ggml_type, name)


class Band(NamedTuple):
    """Rows [first:last] of a tensor."""

    tensor: GgufTensor
    first: int
    last: int


def _bands(plan: GgufPlan) -> Iterator[Band]:
    for tensor in plan.tensors:
        count = tensor.shape[0]
        # Number of rows per band. The last band can be smaller.
        step = _rows_per_band(tensor)
        for first in range(0, count, step):
            yield Band(tensor, first, min(first + step, count))


def _rows_per_band(tensor: GgufTensor) -> int:
    """Return the number of rows per band: up to BAND_VALUES values, but at least a row or head."""
    values = prod(tensor.shape[1:])
    # If rows are reordered within each head, a band must consist of complete heads.
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
