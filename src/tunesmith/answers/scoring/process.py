"""Processes that run scorers. A process is killed if an answer takes too long.

A scorer of the user can do anything: it can hang, exit, fork, or print without end. In each case
the error names the scorer and the row, and other answers can still be scored.
"""

import faulthandler
import logging
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from contextlib import suppress
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Self

from tunesmith.answers.scoring.own_scorers import OwnScorer, load_own_scorer
from tunesmith.answers.scoring.scorers import (
    SCORERS,
    AnswerScores,
    RewardedAnswer,
    ScoredRow,
    Scorer,
    find_scorer,
    own_scorer_file,
)
from tunesmith.answers.scoring.tool_calls import CallReader
from tunesmith.errors import DataError, MachineError, RunError, UsageError
from tunesmith.host.workers import Worker, WorkerPool, end_with_parent

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
# The scoring ends with an error if a scorer fails for this share of the answers of one call of
# `ScorerPool.score_all`, and for at least MIN_FAULTS answers.
FAULT_SHARE = 0.1
MIN_FAULTS = 3
SHOWN_FAULTS = 3  # number of faults that one call of `ScorerPool.score_all` logs with their cause
POLL_SECONDS = 0.2  # interval in which a scoring asks whether it is cancelled
# Time after its limit in which the parent kills the process. Later, the process ends by itself,
# because the parent was killed.
SECONDS_TO_BE_KILLED = 5


class _Call(NamedTuple):
    """A task of the process.

    Attributes:
        name: name of the scorer.
        seconds: the time limit of the task.
        row: the row that the scorer checks. None: it scores answers, or it is only loaded.
        answers: the answers to score, which are answers to one row.
        state, limit: see `OwnScorer.scores`.
    """

    name: str
    seconds: float
    row: ScoredRow | None = None
    answers: tuple[RewardedAnswer, ...] = ()
    state: Mapping[str, float] = {}
    limit: float = 1


@cache
def _cached_scorer(name: str, call_reader: CallReader | None) -> Scorer | OwnScorer:
    """Load a scorer once in the process, because loading a file of the user may take seconds."""
    if name in SCORERS:
        return find_scorer(name, call_reader)
    # Add the folder to sys.path, as `python rewards.py` does, so that the file can import other
    # files in its folder.
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(own_scorer_file(name)[0].absolute().parent))
    return load_own_scorer(name)


@cache
def _limit_process() -> tuple[int, int]:
    """Limit what the scorers of this process can do to the machine.

    Returns:
        Descriptors of the file to which printed text is written, and of the previous stderr.
    """
    end_with_parent()
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


def _run_scorer(call_reader: CallReader | None, call: _Call) -> list[AnswerScores] | bool:
    """Run a task. This function runs in the scorers' process.

    Return the scores of the answers. Without answers, return whether the scorer takes a group.
    """
    printed, terminal = _limit_process()
    process = os.getpid()
    limit = call.seconds + SECONDS_TO_BE_KILLED
    faulthandler.dump_traceback_later(limit, exit=True, file=printed)
    try:
        scorer = _cached_scorer(call.name, call_reader)
        if call.row is not None and isinstance(scorer, Scorer):
            scorer.check(call.row)
        if call.answers:
            return scorer.scores(call.answers, call.state, call.limit)
        return scorer.takes_group
    finally:
        # A fork of the scorer must not send a second result.
        if os.getpid() != process:
            os._exit(0)
        faulthandler.cancel_dump_traceback_later()
        os.write(terminal, os.pread(printed, MAX_SHOWN_BYTES, 0))
        os.ftruncate(printed, 0)


class ScorerProcess:
    """A process that runs scorers. It is started again after it was killed. Use it in `with`.

    Args:
        names: names of scorers.
        call_reader: parser for tool calls, see `find_scorer`.
        own_seconds: time limit for one answer in a scorer of the user.
        limit: see `OwnScorer.scores`.

    Attributes:
        group_scorers: names of the scorers that get all answers to a row. They are known after the
            start.
    """

    def __init__(
        self,
        names: Sequence[str],
        call_reader: CallReader | None = None,
        own_seconds: float = OWN_SCORER_SECONDS,
        limit: float = 1,
    ) -> None:
        self.names = names
        self.own_seconds = own_seconds
        self.limit = limit
        self.group_scorers: list[str] = []
        self._function = partial(_run_scorer, call_reader)
        self._worker: Worker[_Call, Any] | None = None

    def start(self) -> Worker[_Call, Any]:
        """Start the process if it does not run, and load the scorers.

        Raise UsageError as `load_own_scorer`, and if a file takes too long or ends the process.
        """
        if self._worker is None:
            self._worker = Worker(self._function, "the scorers' process")
            for name in self.names:
                if self._call(_Call(name, LOAD_SECONDS), f"--score {name}", UsageError):
                    self.group_scorers.append(name)
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

    def kill(self) -> None:
        """Kill the process, so that a thread that waits for it gets an error."""
        if self._worker is not None:
            self._worker.kill()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = None

    def check(self, name: str, row: ScoredRow) -> None:
        """Raise DataError if the scorer cannot score the row."""
        row.check(name)
        if name in SCORERS:
            self._call(_Call(name, SCORER_SECONDS, row), row.where, DataError)

    def score(
        self, name: str, answers: Sequence[RewardedAnswer], state: Mapping[str, float] = {}
    ) -> list[AnswerScores]:
        """Return the scores of answers to one row: one answer, unless the scorer takes a group.

        Raise RunError if the scorer fails, ends its process or takes too long.
        """
        seconds = SCORER_SECONDS if name in SCORERS else self.own_seconds * len(answers)
        call = _Call(name, seconds, None, tuple(answers), state, self.limit)
        scores: list[AnswerScores] = self._call(call, answers[0].row.where, RunError)
        return scores

    def _call(self, call: _Call, where: str, error: type[UsageError] | type[RunError]) -> Any:
        seconds = call.seconds
        worker = self._worker or self.start()
        try:
            return worker(call, where, seconds)
        except TimeoutError:
            self.close()
            what = f"the scorer {call.name} takes longer than {seconds:g} seconds"
            why = "a regular expression such as (a+)+$ can need exponential time on this text"
            fix = "remove nested repeats from the pattern or schema of the row"
            if call.name not in SCORERS:
                why = "the scorer may be in an endless loop, or may wait for something"
                fix = f"fix the scorer: one answer may take at most {self.own_seconds:g} seconds"
            if error is UsageError:
                what = f"the file of {call.name} takes longer than {seconds:g} seconds to load"
                fix = "start no work when the file is loaded, only define functions"
        except MachineError as fault:
            self.close()
            what = f"the scorer {call.name} ended its process"
            why = fault.why
            fix = "return a number instead of ending the process, and use less memory"
        fix = f"{fix}, then run the same command again; existing answers are kept"
        raise error(what, where=where, why=why, fix=fix)


class ScorerPool(WorkerPool[ScorerProcess]):
    """Several processes that score answers at the same time. Use it in a `with` statement.

    Args:
        names, call_reader, own_seconds, limit: as for `ScorerProcess`.
        count: number of processes.
    """

    def __init__(
        self,
        names: Sequence[str],
        call_reader: CallReader | None = None,
        own_seconds: float = OWN_SCORER_SECONDS,
        limit: float = 1,
        *,
        count: int = 1,
    ) -> None:
        super().__init__(
            [ScorerProcess(names, call_reader, own_seconds, limit) for _ in range(count)]
        )

    def __enter__(self) -> Self:
        self.workers[0].__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self, name: str, row: ScoredRow) -> None:
        """Raise DataError if the scorer cannot score the row."""
        self.workers[0].check(name, row)

    def score_all(
        self,
        name: str,
        answers: Sequence[RewardedAnswer],
        cancelled: Callable[[], bool] = lambda: False,
        state: Mapping[str, float] = {},
    ) -> list[AnswerScores | None]:
        """Return the scores of each answer. They are None if the scorer failed, which is logged.

        Args:
            answers: answers to several rows. All answers to one row follow each other.
            cancelled: function that is called several times a second. If it returns True, the
                processes are killed, and the scores of all answers are None.
            state: see `OwnScorer.scores`.

        Raise RunError if the scorer has failed for FAULT_SHARE of the answers.
        """
        first = self.workers[0]
        first.start()
        groups = [[answer] for answer in answers]
        if name in first.group_scorers:
            groups = [[*group] for _, group in groupby(answers, key=lambda answer: id(answer.row))]
        scores: list[AnswerScores | None] = []
        failed = 0
        futures = [self.submit(ScorerProcess.score, name, group, state) for group in groups]
        try:
            for group, future in zip(groups, futures, strict=True):
                while not wait([future], POLL_SECONDS).done or cancelled():
                    if cancelled():
                        self.kill()
                        return [None] * len(answers)
                fault = future.exception()
                if not isinstance(fault, RunError):
                    scores += future.result()
                    continue
                scores += [None] * len(group)
                failed += len(group)
                if failed >= max(MIN_FAULTS, FAULT_SHARE * len(answers)):
                    raise fault
                if failed <= SHOWN_FAULTS:
                    log.warning(f"{fault.where}: {fault.what}; {fault.why}")
        finally:
            for future in futures:
                future.cancel()
        if failed > SHOWN_FAULTS:
            log.warning(f"the scorer {name} failed for {failed} of {len(answers)} answers")
        return scores
