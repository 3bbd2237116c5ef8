"""Writer of a planned GGUF file. Threads read and quantize bands of rows.

Peak memory is a few bands per thread, and does not depend on the size of the model. In comparison,
the entire embedding of a 70B model takes 2 GB in bf16. Bands are written in the order of the file.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, islice, product
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.tools.export.gguf.families import pair_neighbors
from tunesmith.tools.export.gguf.plan import GgufPlan, GgufTensor, padded
from tunesmith.tools.export.gguf.quantize import quantize_rows

BAND_VALUES = 4 * 2**20  # maximum number of values in a band: 16 MB in fp32
BandJob = Callable[[], memoryview]
# Function that is called with the number of finished units of work, and the number of all units.
Progress = Callable[[int, int], None]


def write_gguf(
    plan: GgufPlan,
    path: Path,
    *,
    threads: int = 1,
    progress: Progress = lambda written, size: None,
) -> None:
    """Write the planned GGUF file. Raise OSError if the disk is full.

    Args:
        progress: function that is called with the number of written bytes and the file size.
    """
    jobs = [list(_row_jobs(tensor)) for tensor in plan.tensors]
    with BandThreads(threads) as workers:
        bands = workers.run(chain.from_iterable(jobs))
        tensors = (islice(bands, len(tensor_jobs)) for tensor_jobs in jobs)
        write_tensors(path, plan.header, tensors, lambda written: progress(written, plan.size))


def write_tensors(
    path: Path,
    header: bytes,
    tensors: Iterable[Iterable[memoryview]],
    progress: Callable[[int], None],
) -> None:
    """Write a GGUF file.

    Args:
        tensors: for each tensor, the bytes of its bands.
        progress: function that is called with the number of written bytes.
    """
    with path.open("wb") as file:
        file.write(header)
        for bands in tensors:
            for band in bands:
                file.write(band)
                progress(file.tell())
            file.write(bytes(padded(file.tell()) - file.tell()))
        progress(file.tell())
        # Flush the data to disk, because the caller then renames the file to its final name.
        file.flush()
        os.fsync(file.fileno())


class BandThreads(ThreadPoolExecutor):
    """Pool of threads that quantize bands of rows, for use in a `with` statement."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._torch_threads = torch.get_num_threads()
        # Let torch use one thread in each worker, because the workers together already use all
        # cores.
        super().__init__(threads, initializer=torch.set_num_threads, initargs=(1,))

    def __exit__(self, *error: object) -> None:
        self.shutdown(cancel_futures=True)
        # Restore torch's number of threads. The workers set it to 1, and in MKL this setting
        # applies to all threads.
        torch.set_num_threads(self._torch_threads)

    def run(self, jobs: Iterable[BandJob]) -> Iterator[memoryview]:
        """Run jobs concurrently, and yield their results in the order of the jobs."""
        running: deque[Future[memoryview]] = deque()
        for job in jobs:
            running.append(self.submit(job))
            # Keep two more jobs in the queue than there are threads, so that no thread is idle
            # while the caller writes a result.
            if len(running) == self.threads + 2:
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
            yield partial(quantize_rows, rows, ggml_type, name)


def _row_jobs(tensor: GgufTensor) -> Iterator[BandJob]:
    """Yield jobs that read and quantize a tensor of a plan, band by band."""
    count = tensor.shape[0]
    # If rows are reordered within each head, a band must consist of complete heads.
    unit = 1 if tensor.heads is None else count // tensor.heads
    step = max(BAND_VALUES // prod(tensor.shape[1:]) // unit, 1) * unit
    for first in range(0, count, step):
        yield partial(_quantized_rows, tensor, first, min(first + step, count))


def _quantized_rows(tensor: GgufTensor, first: int, last: int) -> memoryview:
    rows = tensor.source.rows(first, last)
    if tensor.offset:
        rows = rows + tensor.offset
    if tensor.heads is not None:
        rows = pair_neighbors(rows, tensor.shape[0] // tensor.heads)
    return quantize_rows(rows, tensor.ggml_type, tensor.name)
