"""Processes that run scorers. A process is killed if an answer takes too long.

A scorer of the user can do anything: it can hang, exit, fork, or print without end. In each case
the error names the scorer and the row, and other answers can still be scored.
"""

import logging
import os
import resource
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, Self

from tunesmith.data.workers import Worker
from tunesmith.errors import DataError, MachineError, RunError, UsageError
from tunesmith.scoring.scorers import SCORERS, ScoredRow, find_scorer, score_answer
from tunesmith.scoring.tool_calls import CallReader

log = logging.getLogger(__name__)

# Time limits for one row, in seconds. The user's own scorers have more time, because they may call
# services or run code.
SCORER_SECONDS = 10
OWN_SCORER_SECONDS = 60
# Time limit for loading the file of a scorer, in seconds. The file may import large packages.
LOAD_SECONDS = 120
# Maximum size of a file that a scorer writes. The text that it prints for one answer is such a
# file, of which the first MAX_SHOWN_BYTES are shown.
MAX_WRITTEN_BYTES = 256 << 20
MAX_SHOWN_BYTES = 4000
# Number of answers whose scorers may fail in one call of `ScorerPool.scores`.
MAX_FAULTS = 2


class _Call(NamedTuple):
    """A task of the process.

    Attributes:
        name: name of the scorer.
        answer: the answer. None: the scorer only checks the row, and the result is 0.
        row: the row of the answer. None: the scorer is only loaded, and the result is 0.
    """

    name: str
    answer: str | None = None
    row: ScoredRow | None = None


# Keep the scorers in the process, because loading a file of the user may take seconds.
_cached_scorer = cache(find_scorer)


@cache
def _limit_process() -> tuple[int, int]:
    """Limit what the scorers of this process can do to the machine.

    Returns:
        Descriptors of the file to which printed text is written, and of the previous stderr.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = MAX_WRITTEN_BYTES if hard == resource.RLIM_INFINITY else min(hard, MAX_WRITTEN_BYTES)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    # If memory runs out, the kernel kills this process first, not the training.
    with suppress(OSError):  # only Linux has this file
        Path("/proc/self/oom_score_adj").write_text("1000")
    created, name = tempfile.mkstemp()
    os.close(created)
    printed = os.open(name, os.O_RDWR | os.O_APPEND)
    os.unlink(name)
    terminal = os.dup(2)
    for descriptor in (1, 2):
        os.dup2(printed, descriptor)
    return printed, terminal


def _run_scorer(call_reader: CallReader | None, call: _Call) -> float:
    """Return the score of an answer. This function runs in the scorers' process."""
    printed, terminal = _limit_process()
    process = os.getpid()
    try:
        scorer = _cached_scorer(call.name, call_reader)
        if call.row is None:
            return 0.0
        if call.answer is None:
            scorer.check(call.row)
            return 0.0
        return score_answer(scorer, call.answer, call.row)
    finally:
        # A fork of the scorer must not send a second result.
        if os.getpid() != process:
            os._exit(0)
        os.write(terminal, os.pread(printed, MAX_SHOWN_BYTES, 0))
        os.ftruncate(printed, 0)


class ScorerProcess:
    """A process that runs scorers. It is started again after it was killed. Use it in `with`.

    Args:
        names: names of scorers.
        call_reader: parser for tool calls, see `find_scorer`.
        own_seconds: time limit for a scorer of the user.
    """

    def __init__(
        self,
        names: Sequence[str],
        call_reader: CallReader | None = None,
        own_seconds: float | None = None,
    ) -> None:
        self.names = names
        self.own_seconds = OWN_SCORER_SECONDS if own_seconds is None else own_seconds
        self._function = partial(_run_scorer, call_reader)
        self._worker: Worker[_Call, float] | None = None

    def start(self) -> Worker[_Call, float]:
        """Start the process if it does not run, and load the scorers.

        Raise UsageError as `find_scorer`, and if a file takes too long or ends the process.
        """
        if self._worker is None:
            self._worker = Worker(self._function, "the scorers' process")
            for name in self.names:
                self._call(_Call(name), f"--score {name}", UsageError)
        return self._worker

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = None

    def check(self, name: str, row: ScoredRow) -> None:
        """Raise DataError if the scorer cannot score the row."""
        if name in SCORERS and not row.is_answered:
            raise DataError(
                "the row has no answer",
                where=row.where,
                why=f"the scorer {name} compares answers with it",
                fix="write the answer, delete the row, or use your own scorer",
            )
        self._call(_Call(name, None, row), row.where, DataError)

    def score(self, name: str, answer: str, row: ScoredRow) -> float:
        """Return the score of an answer.

        Raise RunError if the scorer fails, ends its process or takes too long.
        """
        return self._call(_Call(name, answer, row), row.where, RunError)

    def _call(self, call: _Call, where: str, error: type[UsageError] | type[RunError]) -> float:
        is_own = call.name not in SCORERS
        seconds = self.own_seconds if is_own else SCORER_SECONDS
        if call.row is None:
            seconds = LOAD_SECONDS
        worker = self._worker or self.start()
        try:
            return worker(call, where, seconds)
        except TimeoutError:
            self.close()
            what = f"the scorer {call.name} takes longer than {seconds:g} seconds"
            why = "a regular expression such as (a+)+$ can need exponential time on this text"
            fix = "remove nested repeats from the pattern or schema of the row"
            if is_own:
                why = "the scorer may be in an endless loop, or may wait for something"
                fix = f"fix the scorer: one row may take at most {seconds:g} seconds"
            if call.row is None:
                what = f"the file of {call.name} takes longer than {seconds:g} seconds to load"
                fix = "start no work when the file is loaded, only define functions"
        except MachineError as fault:
            self.close()
            what = f"the scorer {call.name} ended its process"
            why = fault.why
            fix = "return a number instead of ending the process, and use less memory"
        fix = f"{fix}, then run the same command again; existing answers are kept"
        raise error(what, where=where, why=why, fix=fix)


class ScorerPool:
    """Several processes that score answers at the same time. Use it in a `with` statement.

    Args:
        count: number of processes.
        names, call_reader, own_seconds: as for `ScorerProcess`.
    """

    def __init__(
        self,
        names: Sequence[str],
        call_reader: CallReader | None = None,
        own_seconds: float | None = None,
        *,
        count: int = 1,
    ) -> None:
        self._processes = [ScorerProcess(names, call_reader, own_seconds) for _ in range(count)]
        self._idle = SimpleQueue[ScorerProcess]()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="tunesmith-scorers")

    def __enter__(self) -> Self:
        self._processes[0].__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self.close()

    def close(self) -> None:
        """End the processes. A later call of `scores` starts them again."""
        for process in self._processes:
            process.close()

    def check(self, name: str, row: ScoredRow) -> None:
        """Raise DataError if the scorer cannot score the row."""
        self._processes[0].check(name, row)

    def scores(
        self,
        name: str,
        answers: Sequence[tuple[str, ScoredRow]],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[float | None]:
        """Return the score of each answer. It is None if the scorer has failed, which is logged.

        Args:
            cancelled: function that is called after each score. If it returns True, the remaining
                scores are None.

        Raise RunError if the scorer has failed for more than MAX_FAULTS answers.
        """

        is_cancelled = False

        def score(answer: str, row: ScoredRow) -> float | RunError | None:
            if is_cancelled:
                return None
            process = self._idle.get()
            try:
                return process.score(name, answer, row)
            except RunError as error:
                return error
            finally:
                self._idle.put(process)

        found = self._threads.map(lambda item: score(*item), answers)
        scores: list[float | None] = []
        faults: list[RunError] = []
        for result in found:
            is_cancelled = is_cancelled or cancelled()
            if isinstance(result, RunError):
                faults.append(result)
                if len(faults) > MAX_FAULTS:
                    raise result
                log.warning(f"{result.where}: {result.what}; {result.why}")
            scores.append(None if isinstance(result, RunError) else result)
        return scores
