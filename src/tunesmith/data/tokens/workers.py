"""Rows -> examples, batch by batch, by several processes: in order, and bit for bit as by one.

Most of the time goes into rendering a chat template, which Python does in one thread. A worker is a
new interpreter that reads the encoder, then rows, from its standard input, and ends with that.
Unlike multiprocessing's it is not forked below torch's threads, never runs a user's script again,
and no ctrl-C of the terminal reaches it.
"""

import os
import pickle
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue

from tunesmith.data.tokens.encode import EncodedRow, RowBatch, RowEncoder
from tunesmith.errors import DataError, MachineError, TunesmithError
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
    workers = [_Worker(encode) for _ in range(count)]
    idle = SimpleQueue[_Worker]()
    for worker in workers:
        idle.put(worker)

    def encode_in_worker(batch: RowBatch) -> list[EncodedRow | DataError]:
        worker = idle.get()
        try:
            return worker(batch)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(count)
    waiting = deque[tuple[RowBatch, Future[list[EncodedRow | DataError]]]]()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(encode_in_worker, batch)))
            # Two batches a worker: none waits for this thread, and memory stays small.
            if len(waiting) > 2 * count:
                first, encoded = waiting.popleft()
                yield first, encoded.result()
        for batch, encoded in waiting:
            yield batch, encoded.result()
    finally:
        # Killed, then collected: a worker that waits for a batch would wait for ever.
        for worker in workers:
            worker.process.kill()
        pool.shutdown(cancel_futures=True)
        for worker in workers:
            worker.process.communicate()


class _Worker:
    """One process.

    The thread of its first batch sends it the encoder too: so all workers start at once.
    """

    def __init__(self, encode: RowEncoder) -> None:
        code = (
            f"import sys; sys.path[:] = {sys.path!r};"
            " from tunesmith.data.tokens.workers import serve; serve()"
        )
        # The other cores have workers of their own.
        env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
        self._unsent: list[object] = [encode]

    def __call__(self, batch: RowBatch) -> list[EncodedRow | DataError]:
        requests = self.process.stdin
        answers = self.process.stdout
        assert requests is not None
        assert answers is not None
        # The encoder, with template and tokenizer, goes first.
        self._unsent.append(batch)
        try:
            while self._unsent:
                pickle.dump(self._unsent.pop(0), requests)
            requests.flush()
            answer: list[EncodedRow | DataError] | Exception = pickle.load(answers)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            exit_code = self.process.wait()
            raise MachineError(
                f"a tokenizer process exited with code {exit_code}",
                where=f"row {batch.first + 1} or after",
                why="the kernel may have killed it for lack of memory (check dmesg)",
                fix="close other programs and start again",
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def serve() -> None:
    """A worker's life: an encoder, then batches on stdin; the examples or the error of each on
    stdout.
    """
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    # What a library prints must not come between the answers.
    os.dup2(2, 1)
    # The end of stdin ends the worker.
    with suppress(EOFError, BrokenPipeError):
        encode = pickle.load(requests)
        while True:
            batch = pickle.load(requests)
            try:
                answer: object = encode(batch)
            except TunesmithError as error:
                answer = error
            except Exception as error:
                answer = RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
            pickle.dump(answer, answers)
            answers.flush()
    # What was left to write has no reader.
    os._exit(0)
