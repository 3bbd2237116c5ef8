"""Rows as a file has them -> examples, batch by batch, by several processes: in order, and bit for bit as by one.

Most of the time goes into rendering a chat template, which Python does in one thread. A worker is a new interpreter
that is given the encoder, then rows, on its standard input, and ends with that. Unlike multiprocessing's it is not
forked below torch's threads, never runs a user's script again, and no ctrl-C of the terminal reaches it.
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
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

import numpy as np

from tunesmith.config.schema import Source
from tunesmith.data.batch import Example
from tunesmith.data.flaws import row_flaws
from tunesmith.data.formats import Conversation, Sample, Text, convert_row
from tunesmith.data.template import Template, TrainOn
from tunesmith.errors import DataError, MachineError, TunesmithError
from tunesmith.host_files import available_cores

ROWS_EACH = 5_000  # a worker takes about a second to start
MOST = 16  # one process reads the rows for all of them
_PROMPTS_ALL, _PROMPTS_EVERY = 256, 32  # rows whose prompt is rendered apart and compared: the first, then every n-th


class RowBatch(NamedTuple):
    """Rows, or why they cannot be read, with their places. first: index of the first."""

    first: int
    rows: list[dict[str, Any] | TunesmithError]
    places: list[str]


Prompt = Literal["unsupervised", "supervised", "apart", "unchecked"]


class EncodedRow(NamedTuple):
    """The example of a row, uncut, and the names of its flaws. prompt: whether one of its tokens is supervised; `apart`:
    rendered alone it is not the beginning of the example; `unchecked`: this row's was not rendered alone."""

    example: Example
    flaws: list[str]
    prompt: Prompt


Encoded = tuple[RowBatch, list[EncodedRow]]


@dataclass(frozen=True)
class RowEncoder:
    """All that the examples of a source depend on beside its rows."""

    template: Template
    source: Source
    system: str | None
    train_on: TrainOn

    def __call__(self, batch: RowBatch) -> list[EncodedRow]:
        """The examples of a batch; DataError for the first row that has none, or cannot be read."""
        samples, encoded = [], []
        for row, place in zip(batch.rows, batch.places, strict=True):
            if isinstance(row, TunesmithError):
                raise row
            samples.append(convert_row(row, self.source, where=place, system=self.system))
        examples = self.template.encode_many(samples, self.train_on, where=batch.places)
        for i, (sample, example) in enumerate(zip(samples, examples, strict=True), batch.first):
            compared = self.train_on != "all" and (i < _PROMPTS_ALL or i % _PROMPTS_EVERY == 0)
            prompt = _check_prompt(self.template, sample, example) if compared else "unchecked"
            encoded.append(EncodedRow(example, list(row_flaws(sample, raw=self.template.raw)), prompt))
        return encoded


def _check_prompt(template: Template, sample: Sample, example: Example) -> Prompt:
    """`EncodedRow.prompt`; some templates write a turn differently once others follow: `apart`."""
    if isinstance(sample, Text):
        return "apart"
    if isinstance(sample, Conversation):
        turn = next(n for n, m in enumerate(sample.messages) if m["role"] == "assistant")
        sample = Conversation(sample.messages[: turn + 1], sample.tools, 0, sample.instruction)
    try:
        prompt = template.prompt(sample)
    except DataError:  # a template that wants more turns than this beginning has
        return "apart"
    if not prompt or prompt != np.asarray(example.ids[: len(prompt)]).tolist():
        return "apart"
    return "supervised" if np.any(example.trained[: len(prompt)]) else "unsupervised"


def encode_batches(encode: RowEncoder, batches: Iterable[RowBatch], *, rows: int) -> Iterator[Encoded]:
    """Each batch with its examples, in order, or the error of the first that has one; few batches are in memory at once.

    `rows` in all: few are encoded here, and so are all with a tokenizer that only this process can load. MachineError
    where a worker is killed.
    """
    count = min(rows // ROWS_EACH, available_cores(), MOST)
    if count < 2 or not sys.executable or not type(encode.template.tokenizer).__module__.startswith("transformers."):
        yield from ((batch, encode(batch)) for batch in batches)
        return
    idle, workers = SimpleQueue[_Worker](), [_Worker(encode) for _ in range(count)]
    for worker in workers:
        idle.put(worker)

    def ask(batch: RowBatch) -> list[EncodedRow]:
        worker = idle.get()
        try:
            return worker(batch)
        finally:
            idle.put(worker)

    pool, waiting = ThreadPoolExecutor(count), deque[tuple[RowBatch, Future[list[EncodedRow]]]]()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(ask, batch)))
            if len(waiting) > 2 * count:
                first, encoded = waiting.popleft()
                yield first, encoded.result()
        yield from ((batch, encoded.result()) for batch, encoded in waiting)
    finally:
        for worker in workers:
            worker.process.kill()
        pool.shutdown(cancel_futures=True)
        for worker in workers:
            worker.process.communicate()


class _Worker:
    """One process. It is given the encoder with its first batch, by that one's thread: all of them start at once."""

    def __init__(self, encode: RowEncoder) -> None:
        code = f"import sys; sys.path[:] = {sys.path!r}; from tunesmith.data.workers import serve; serve()"
        env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}  # the other cores have workers of their own
        pipe, command = subprocess.PIPE, [sys.executable, "-c", code]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, start_new_session=True)
        self.untold: list[object] = [encode]

    def __call__(self, batch: RowBatch) -> list[EncodedRow]:
        asked, answers = self.process.stdin, self.process.stdout
        assert asked is not None
        assert answers is not None
        self.untold.append(batch)
        try:
            while self.untold:
                pickle.dump(self.untold.pop(0), asked)
            asked.flush()
            answer: list[EncodedRow] | Exception = pickle.load(answers)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            what = f"a process that tokenises rows ended with the exit code {self.process.wait()}"
            why, fix = "the system kills one when memory runs out (dmesg tells)", "start again with less beside it"
            raise MachineError(what, where=f"row {batch.first + 1} or after", why=why, fix=fix) from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def serve() -> None:
    """A worker's life: an encoder, then batches on stdin; the examples or the error of each on stdout."""
    asked, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    with suppress(EOFError, BrokenPipeError):
        encode = pickle.load(asked)
        while True:
            batch = pickle.load(asked)
            try:
                answer: object = encode(batch)
            except TunesmithError as error:
                answer = error
            except Exception as error:
                answer = RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
            pickle.dump(answer, answers)
            answers.flush()
    os._exit(0)  # what was left to write has no reader
