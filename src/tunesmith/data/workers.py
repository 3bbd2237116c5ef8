"""A pool of processes that call one function, for work that holds Python's lock.

A worker is a new interpreter that reads the function, then its tasks, from its standard input, and
ends with that. Unlike multiprocessing's it is not forked below torch's threads, never runs a user's
script again, and no ctrl-C of the terminal reaches it.
"""

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import wait
from queue import SimpleQueue
from typing import Generic, TypeVar

from tunesmith.errors import MachineError, TunesmithError
from tunesmith.host.child_output import exit_text

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerPool(Generic[Task, Result]):
    """Some processes, and the threads that wait for them.

    Args:
        function: what each of them calls; it is pickled to it once.
        what: what errors call one of them.
    """

    def __init__(self, function: Callable[[Task], Result], count: int, what: str) -> None:
        self._workers = [Worker(function, what) for _ in range(count)]
        self._idle = SimpleQueue[Worker[Task, Result]]()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="tunesmith-workers")

    def submit(self, task: Task, where: str) -> Future[Result]:
        """Have a task done by the next idle worker; `where` is its place, for errors.

        The future raises the function's error, or MachineError where the worker was killed.
        """
        return self._threads.submit(self._call, task, where)

    def _call(self, task: Task, where: str) -> Result:
        worker = self._idle.get()
        try:
            return worker(task, where)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the processes, and lose what they were doing."""
        # Killed, then collected: a worker that waits for a task would wait for ever.
        for worker in self._workers:
            worker.process.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()


class Worker(Generic[Task, Result]):
    """One process that calls a function, which is pickled to it once.

    The thread of its first task sends it the function too: so all workers start at once.

    Args:
        what: what errors call the process.
    """

    def __init__(self, function: Callable[[Task], Result], what: str) -> None:
        code = (
            f"import sys; sys.path[:] = {sys.path!r};"
            " from tunesmith.data.workers import serve; serve()"
        )
        # The other cores have workers of their own.
        env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        self.what = what
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
        self._unsent: list[object] = [function]

    def __call__(self, task: Task, where: str, seconds: float | None = None) -> Result:
        """Apply the function to a task and return its result, or raise its error.

        Args:
            where: the place of the task, for errors.
            seconds: the time limit. After a TimeoutError the worker can only be closed.

        Raises:
            TimeoutError: the task takes longer than `seconds`.
            MachineError: the process ended.
        """
        requests = self.process.stdin
        answers = self.process.stdout
        assert requests is not None
        assert answers is not None
        # The function, with all that it needs, goes first.
        self._unsent.append(task)
        try:
            while self._unsent:
                pickle.dump(self._unsent.pop(0), requests)
            requests.flush()
            is_late = seconds is not None and not wait([answers.fileno()], seconds)
            answer: Result | Exception = TimeoutError() if is_late else pickle.load(answers)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            exit_code = self.process.wait()
            raise MachineError(
                f"{self.what} ended before its answer",
                where=where,
                why=exit_text(exit_code),
                fix="close other programs and start again",
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Kill the process, also in the middle of a task."""
        self.process.kill()
        self.process.communicate()


def serve() -> None:
    """A worker's life: a function, then tasks on stdin; the result or error of each on stdout."""
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    # What a library prints must not come between the answers.
    os.dup2(2, 1)
    # The end of stdin ends the worker.
    with suppress(EOFError, BrokenPipeError):
        function = pickle.load(requests)
        while True:
            task = pickle.load(requests)
            try:
                answer: object = function(task)
            except TunesmithError as error:
                answer = error
            except Exception as error:
                answer = RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
            pickle.dump(answer, answers)
            answers.flush()
    # What was left to write has no reader.
    os._exit(0)
