"""A planned GGUF file onto the disk, in bands of rows that threads read and quantize.

Peak memory is a few bands a thread, whatever the size of the model: the embedding of a 70B model
alone is 2 GB in bf16. Bands are written in the order of the file.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from tunesmith.tools.export.gguf.families import pair_neighbors
from tunesmith.tools.export.gguf.plan import GgufPlan, GgufTensor, padded
from tunesmith.tools.export.gguf.quantize import quantize_rows

BAND_VALUES = 4 * 2**20  # 16 MB in fp32


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
    torch_threads = torch.get_num_threads()
    # One thread of torch in each worker: the workers themselves fill the cores.
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    bands = _bands(plan)
    running: deque[tuple[Band, Future[memoryview]]] = deque()
    try:
        with path.open("wb") as file:
            file.write(plan.header)
            progress(file.tell(), plan.size)
            while True:
                # Two more than threads: a free thread begins another while this one writes.
                while len(running) < threads + 2 and (band := next(bands, None)):
                    running.append((band, pool.submit(_band_bytes, band)))
                if not running:
                    break
                # In the order of the file, though bands may be ready in another.
                band, future = running.popleft()
                file.write(future.result())
                if band.last == band.tensor.shape[0]:
                    file.write(bytes(padded(band.tensor.size) - band.tensor.size))
                progress(file.tell(), plan.size)
            # The data is on the disk before the file gets its name.
            file.flush()
            os.fsync(file.fileno())
    finally:
        pool.shutdown(cancel_futures=True)
        # The workers set theirs to 1, and MKL has one number for all threads.
        torch.set_num_threads(torch_threads)


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
