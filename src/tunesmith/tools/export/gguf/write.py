"""A planned GGUF file onto the disk, in bands of rows that threads read and quantize.

Peak memory is a few bands a thread, whatever the size of the model: the embedding of a 70B model
alone is 2 GB in bf16. Bands are written in the order of the file.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch

from tunesmith.host.cores import available_cores
from tunesmith.tools.export.gguf.families import pair_neighbors
from tunesmith.tools.export.gguf.plan import GgufPlan, GgufTensor, padded
from tunesmith.tools.export.gguf.quantize import quantize_rows

BAND_VALUES = 4 * 2**20  # 16 MB in fp32


def write_gguf(
    plan: GgufPlan,
    path: Path,
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the file to a new place beside `path`, then rename it.

    `progress` gets the number of bytes written so far. An error leaves neither file; OSError where
    the disk is full.
    """
    # The next one writes over what a killed one left.
    temporary = path.with_name(f".{path.name}.partial")
    torch_threads = torch.get_num_threads()
    try:
        with temporary.open("wb") as file:
            _write(file, plan, threads or available_cores(), progress or (lambda written: None))
            file.flush()
            # The data is on the disk before the name is: a crash leaves no torn file under the
            # name.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        # The workers set theirs to 1, and MKL has one number for all threads.
        torch.set_num_threads(torch_threads)


def _write(file: BinaryIO, plan: GgufPlan, threads: int, progress: Callable[[int], None]) -> None:
    file.write(plan.header)
    progress(file.tell())
    # One thread of torch in each worker: the workers themselves fill the cores.
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    bands = _bands(plan)
    running: deque[tuple[GgufTensor, bool, Future[memoryview]]] = deque()
    try:
        while True:
            # Two more than threads: a free thread begins another while this one writes.
            while len(running) < threads + 2 and (band := next(bands, None)) is not None:
                tensor, first, last, ends = band
                running.append((tensor, ends, pool.submit(_band_bytes, tensor, first, last)))
            if not running:
                return
            # In the order of the file, though bands may be ready in another.
            tensor, ends, future = running.popleft()
            file.write(future.result())
            if ends:
                file.write(bytes(padded(tensor.size) - tensor.size))
            progress(file.tell())
    finally:
        pool.shutdown(cancel_futures=True)


def _bands(plan: GgufPlan) -> Iterator[tuple[GgufTensor, int, int, bool]]:
    """Each tensor with the first row of a band, the one after its last, and whether it ends."""
    for tensor in plan.tensors:
        count = tensor.shape[0]
        # The step is counted in rows; the last band has what is left.
        step = _rows_of_a_band(tensor)
        for first in range(0, count, step):
            last = min(first + step, count)
            yield tensor, first, last, last == count


def _rows_of_a_band(tensor: GgufTensor) -> int:
    """Count the rows that fit, in whole heads where rows change places within a head."""
    values = 1
    for size in tensor.shape[1:]:
        values *= size
    # A head's halves change places, so a band must not cut one.
    unit = 1 if tensor.heads is None else tensor.shape[0] // tensor.heads
    return max(BAND_VALUES // values // unit, 1) * unit


def _band_bytes(tensor: GgufTensor, first: int, last: int) -> memoryview:
    rows = tensor.source.rows(first, last)
    if tensor.offset:
        rows = rows + tensor.offset
    if tensor.heads is not None:
        rows = pair_neighbors(rows, tensor.shape[0] // tensor.heads)
    return quantize_rows(rows.contiguous(), tensor.ggml_type, tensor.name)
