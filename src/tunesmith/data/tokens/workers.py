"""Rows -> examples, batch by batch, by several processes: in order, and bit for bit as by one.

Most of the time goes into rendering a chat template, which Python does in one thread.
"""

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

from tunesmith.data.tokens.encode import EncodedRow, RowBatch, RowEncoder
from tunesmith.data.workers import WorkerPool
from tunesmith.errors import DataError
from tunesmith.host.cores import available_cores

# A worker takes about a second to start.
ROWS_EACH = 5_000
# One process reads the rows for all workers.
MAX_WORKERS = 16

Encoded = tuple[RowBatch, list[EncodedRow | DataError]]


def encode_batches(
    encode: RowEncoder, batches: Iterable[RowBatch], *, rows: int
) -> Iterator[Encoded]:
    """Each batch with its examples, in order; few batches are in memory at once.

    Args:
        rows: in all. Few are encoded here, and so are all with a tokenizer that only this process
            can load.

    Raises:
        MachineError: a worker was killed.
        TunesmithError: that of the first batch that has one.
    """
    count = min(rows // ROWS_EACH, available_cores(), MAX_WORKERS)
    # A tokenizer of other code may not be importable in a process that starts anew.
    tokenizer_module = type(encode.template.tokenizer).__module__
    can_be_sent = bool(sys.executable) and tokenizer_module.startswith("transformers.")
    if count < 2 or not can_be_sent:
        for batch in batches:
            yield batch, encode(batch)
        return
    pool = WorkerPool(encode, count, "a tokenizer process")
    waiting = deque[tuple[RowBatch, Future[list[EncodedRow | DataError]]]]()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(batch, f"row {batch.first + 1} or after")))
            # Two batches a worker: none waits for this thread, and memory stays small.
            if len(waiting) > 2 * count:
                first, encoded = waiting.popleft()
                yield first, encoded.result()
        for batch, encoded in waiting:
            yield batch, encoded.result()
    finally:
        pool.close()
