"""Processes that call one function, and a pool of them.

The pool is used for work that holds Python's global interpreter lock.

A worker is a new Python interpreter. It reads the function and then its tasks from standard input,
and exits at the end of the input. Unlike a multiprocessing worker, it is not forked from a process
with torch's threads, does not run the user's script again, and does not receive Ctrl-C from the
terminal.
"""

import ctypes
import os
import pickle
import secrets
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from threading import TIMEOUT_MAX, Timer
from typing import Concatenate, Generic, ParamSpec, Protocol, TypeVar

import psutil

from tunesmith.errors import MachineError, TunesmithError
from tunesmith.host.child_output import exit_text

# Time in which a worker whose pipe is closed has to exit before it is killed.
SECONDS_TO_EXIT = 1
# Environment variable by which the processes of a worker are found.
_WORKER_VARIABLE = "TUNESMITH_WORKER"
# Options of Linux's prctl.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

Task = TypeVar("Task")
Result = TypeVar("Result")
Caller = TypeVar("Caller", bound="KillableWorker")
Arguments = ParamSpec("Arguments")


class KillableWorker(Protocol):
    """A worker of a `WorkerPool`."""

    def kill(self) -> None: ...

    def close(self) -> None: ...


class WorkerPool(Generic[Caller]):
    """A pool of workers, with one thread per worker that waits for the result."""

    def __init__(self, workers: Sequence[Caller]) -> None:
        self.workers = workers
        self._idle = SimpleQueue[Caller]()
        for worker in workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(len(workers), "tunesmith-workers")

    def submit(
        self,
        call: Callable[Concatenate[Caller, Arguments], Result],
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Future[Result]:
        """Call a method of the next idle worker. The future raises the method's error."""

        def call_idle_worker() -> Result:
            worker = self._idle.get()
            try:
                return call(worker, *args, **options)
            finally:
                self._idle.put(worker)

        return self._threads.submit(call_idle_worker)

    def kill(self) -> None:
        """Kill the processes. Running tasks get an error."""
        for worker in self.workers:
            worker.kill()

    def close(self) -> None:
        """End the processes. Unfinished tasks are lost. Some workers start again for a new task."""
        # Kill the processes first, because `shutdown` waits until the threads have the results of
        # all running tasks.
        self.kill()
        self._threads.shutdown(cancel_futures=True)
        self._threads = ThreadPoolExecutor(len(self.workers), "tunesmith-workers")
        for worker in self.workers:
            worker.close()


class Worker(Generic[Task, Result]):
    """A process that calls one function with the tasks that it receives.

    The function is pickled once. It is sent together with the first task, in the thread of this
    task, so that all workers start concurrently.

    Args:
        what: name of the process in error messages.
    """

    def __init__(self, function: Callable[[Task], Result], what: str) -> None:
        code = (
            f"import sys; sys.path[:] = {sys.path!r};"
            " from tunesmith.host.workers import serve; serve()"
        )
        # Disable the tokenizer's threads, because each CPU core already has a worker.
        self.what = what
        self.mark = secrets.token_hex(8)
        env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", _WORKER_VARIABLE: self.mark}
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
            where: the name of the task in error messages.
            seconds: the time limit. After a TimeoutError the worker can only be closed.

        Raises:
            TimeoutError: the task takes longer than `seconds`.
            MachineError: the process ended.
        """
        requests = self.process.stdin
        answers = self.process.stdout
        assert requests is not None
        assert answers is not None
        began = time.monotonic()
        # The function can write a part of a result, so that the pipe is readable without a result.
        limit = Timer(TIMEOUT_MAX if seconds is None else seconds, self.kill)
        limit.daemon = True
        limit.start()
        # The notation of errors and the function must be sent before the first task. Until then,
        # `_unsent` contains them.
        self._unsent.append(task)
        try:
            while self._unsent:
                pickle.dump(self._unsent.pop(0), requests)
            requests.flush()
            answer: Result | Exception = pickle.load(answers)
        except Exception as error:  # the function can write anything to the pipe
            if seconds is not None and time.monotonic() - began >= seconds:
                raise TimeoutError from None
            # The function may have closed or written to the pipe without ending the process.
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(SECONDS_TO_EXIT)
            self.process.kill()
            raise MachineError(
                f"{self.what} exited without a result",
                where=where,
                why=exit_text(self.process.wait()),
                fix="close other programs to free memory, and start again",
            ) from error
        finally:
            limit.cancel()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self) -> None:
        """Kill the process and the processes that it has started, also daemons."""
        # A process that the function has started can have a session of its own. Stop the function
        # first, so that it starts no other process after this list.
        started: list[psutil.Process] = []
        if self.process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                worker = psutil.Process(self.process.pid)
                worker.suspend()
                started = worker.children(recursive=True)
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        else:
            # The children of a process that has ended belong to the system's first process.
            for process in psutil.process_iter():
                with suppress(psutil.Error, OSError):
                    if process.environ().get(_WORKER_VARIABLE) == self.mark:
                        started.append(process)
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def close(self) -> None:
        """Kill the process and the processes that it has started, even if it runs a task."""
        self.kill()
        # Do not wait for the end of the pipes: a process that was not found can hold them.
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        self.process.wait()


def _prctl(option: int, value: int) -> None:
    """Set an option of this process. It has no effect if the system is not Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def end_with_parent() -> None:
    """Let the kernel kill this process when the thread that has started it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def serve() -> None:
    """Read a function and then tasks from stdin.

    Write the result or error of each task to stdout.
    """
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    # Redirect stdout to stderr, so that text that libraries print is not mixed with the results.
    # Close stdin, so that the function and its processes cannot read the tasks.
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # Daemons of the function become children of this process, so that `Worker.kill` finds them.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    # EOFError means that stdin has ended. The worker exits in this case.
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
    # Exit without flushing buffers, because no process reads the remaining output.
    os._exit(0)
