"""Conversion of rows to examples in several processes. The result is the same as with one process.

Several processes are faster, because most of the time is spent on rendering the chat template, and
Python does this in only one thread.
"""

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import partial

from tunesmith.config.row_settings import NOTATION, with_notation
from tunesmith.errors import DataError
from tunesmith.host.cores import available_cores
from tunesmith.host.workers import Worker, WorkerPool
from tunesmith.tokens.encode import EncodedRow, RowBatch, RowEncoder

# Minimum number of rows per worker. With fewer rows a worker is not worthwhile, because it takes
# about a second to start.
MIN_ROWS_PER_WORKER = 5_000
# Maximum number of workers. More workers are not useful, because one process reads the rows for all
# of them.
MAX_WORKERS = 16

Encoded = tuple[RowBatch, list[EncodedRow | DataError]]


def encode_batches(
    encode: RowEncoder, batches: Iterable[RowBatch], *, rows: int
) -> Iterator[Encoded]:
    """Yield each batch with its examples, in order. Only a few batches are in memory at a time.

    Args:
        rows: total number of rows. This process encodes them itself if there are only a few, or if
            workers cannot load the tokenizer.

    Raises:
        MachineError: a worker was killed.
        TunesmithError: the error of the first batch with an error.
    """
    count = min(rows // MIN_ROWS_PER_WORKER, available_cores(), MAX_WORKERS)
    # Use workers only with tokenizer classes of Transformers, because other classes may not be
    # importable in a new process.
    tokenizer_module = type(encode.template.tokenizer).__module__
    is_importable = bool(sys.executable) and tokenizer_module.startswith("transformers.")
    if count < 2 or not is_importable:
        for batch in batches:
            yield batch, encode(batch)
        return
    task = partial(with_notation, NOTATION.get(), encode)
    pool = WorkerPool([Worker(task, "a tokenizer process") for _ in range(count)])
    waiting = deque[tuple[RowBatch, Future[list[EncodedRow | DataError]]]]()
    try:
        for batch in batches:
            where = f"row {batch.first + 1} or after"
            waiting.append((batch, pool.submit(Worker.__call__, batch, where)))
            # Submit at most two batches per worker. This keeps all workers busy and limits the
            # memory.
            if len(waiting) > 2 * count:
                first, encoded = waiting.popleft()
                yield first, encoded.result()
        for batch, encoded in waiting:
            yield batch, encoded.result()
    finally:
        pool.close()
