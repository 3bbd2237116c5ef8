"""The command line, or another program, in a process of its own that starts at once.

Importing torch and Transformers takes seconds, and the suite starts some two thousand processes.
They are forked from one that has imported both and done nothing else: `multiprocessing`'s fork
server, the one that `ranks.py` forks its ranks from. `_run` then does what exec leaves to a new
process: streams, environment, folder and words; `Forked` does the same for the ranks that a
launcher starts, in the place of one private method of Popen. What differs from a user's process:
modules are loaded before the environment is set, so a setting that a module reads when it is
imported has to be read again (`prepare`), and nothing of Python's own start is seen. Tests of that
start their own interpreter.

TUNESMITH_TESTS_FORK=0 starts an interpreter for each instead; `test_warm.py` shows that both ways
give the same.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import tempfile
import termios
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import reduction
from pathlib import Path
from typing import Any, NoReturn

from ranks import FORKS, forkserver

ENTRIES = {
    "tunesmith": "tunesmith.cli.main:main",
    "tunesmith.launch.node": "tunesmith.launch.node:run_agent",
    "torch.distributed.run": "torch.distributed.run:main",
    "accelerate.commands.launch": "accelerate.commands.launch:main",
}
CLOSED = -1
MAX_WAIT_S = 480  # for what compiles on a busy machine: it only ends what hangs


class Warm:
    """`tunesmith WORDS` under way, with what tests use of a Popen.

    Args:
        words: of the command line, after the program.
        env, cwd: of the process; the test's own where not said.
        streams: file descriptors of stdin, stdout and stderr, or CLOSED; without one stdin is
            empty, and what is written is kept for `communicate`.
        prepare: a function that a process can import, called in it before anything else.
        program: that runs in place of the command line: a module of ENTRIES, the file of a script,
            or code.
    """

    def __init__(
        self,
        words: Sequence[object],
        *,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        streams: Sequence[int | None] = (None, None, None),
        prepare: Callable[[], object] | None = None,
        program: str | Path = "tunesmith",
    ) -> None:
        self._kept = [tempfile.TemporaryFile("w+b") if fd is None else None for fd in streams]  # noqa: SIM115
        fds = [
            fd if kept is None else kept.fileno()
            for fd, kept in zip(streams, self._kept, strict=True)
        ]
        environment = dict(os.environ if env is None else env)
        descriptors = [fd if fd == CLOSED else _Descriptor(fd) for fd in fds]
        arguments = (
            str(program), [*map(str, words)], environment, str(cwd or Path.cwd()), descriptors,
            prepare,
        )  # fmt: skip
        self._process = forkserver().Process(target=_run, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As Popen has it: None while it runs, minus the number of the signal that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float = MAX_WAIT_S) -> int:
        """The exit code; TimeoutExpired, and the process killed, after that many seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired("tunesmith", timeout)
        return self._process.exitcode

    def communicate(self, timeout: float = MAX_WAIT_S) -> tuple[str, str]:
        """What it wrote, after its end; "" of a stream that was given."""
        self.wait(timeout)
        return _text(self._kept[1]), _text(self._kept[2])


def run_warm(
    words: Sequence[object], *, timeout: float = MAX_WAIT_S, **options: Any
) -> subprocess.CompletedProcess[str]:
    """`tunesmith WORDS` to its end, or that of `program`, within `timeout` seconds."""
    started = Warm(words, **options)
    out, err = started.communicate(timeout)
    return subprocess.CompletedProcess(words, started.wait(), out, err)


def read_hub_settings() -> None:
    """Before a command: read the environment anew, which huggingface_hub does as it is imported."""
    from huggingface_hub import constants

    importlib.reload(constants)


class _Descriptor:
    """A file descriptor that goes along to a forked process."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (reduction.DupFd(self.fd),)


def _arrived(duplicate: Any) -> int:
    fd: int = duplicate.detach()
    return fd


def _text(file: Any) -> str:
    if file is None:
        return ""
    file.seek(0)
    text: str = file.read().decode(errors="replace")
    return text


def take_terminal() -> None:
    """Before a command: its standard input is the terminal that it runs on."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Forked(subprocess.Popen[Any]):
    """A Popen that forks `python -m MODULE` of ENTRIES and `python FILE.py` itself."""

    def _execute_child(self, args: Any, executable: Any, *others: Any) -> None:
        words = [args] if isinstance(args, str | bytes | os.PathLike) else list(args)
        count = _program_words(words)
        if not count:
            super()._execute_child(args, executable, *others)  # type: ignore[misc]
            return
        env, pipes = others[4], others[8:14]
        self.pid = os.fork()
        if self.pid == 0:
            become(words[count - 1], words[count:], env, [pipes[0], pipes[3], pipes[5]])
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def _program_words(words: list[str]) -> int:
    """How many words of a command name a program that can be forked, itself the last; 0 of others."""
    if words[0] != sys.executable:
        return 0
    flags = next((n for n, word in enumerate(words) if n and word != "-u"), len(words))
    if words[flags : flags + 1] == ["-m"] and words[flags + 1] in ENTRIES:
        return flags + 2
    return flags + 1 if words[flags : flags + 1] and words[flags].endswith(".py") else 0


def fork_ranks() -> None:
    """`prepare` of a launcher: the agent and the ranks that it starts are forked from it."""
    if not FORKS:
        return
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess.Popen = subprocess_handler.Popen = Forked  # type: ignore[misc]


def become(
    module: str, words: list[str], env: dict[str, str] | None, streams: list[int]
) -> NoReturn:
    """What exec leaves to a process that was forked: streams, environment, no signal handlers."""
    code: Any = 1
    try:
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(
                    number,
                    signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL,
                )
        os.setsid()
        own = [os.dup(fd if given < 0 else given) for fd, given in enumerate(streams)]
        others = partial(os.closerange, 3, 2**20)
        _run(module, words, dict(os.environ if env is None else env), str(Path.cwd()), own, others)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _run(
    program: str,
    words: list[str],
    env: dict[str, str],
    cwd: str,
    streams: list[int],
    prepare: Callable[[], object] | None,
) -> None:
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        stream = None  # as Python starts with a closed one
        if streams[fd] == CLOSED:
            os.close(fd)
        else:
            os.dup2(streams[fd], fd)
            os.close(streams[fd])
            errors = "backslashreplace" if fd == 2 else "strict"
            options = {"encoding": "utf-8", "errors": errors, "closefd": False, "buffering": 1}
            stream = os.fdopen(fd, "w" if fd else "r", **options)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if prepare:
        prepare()
    sys.argv = [program, *words]
    if program in ENTRIES:
        sys.exit(pkgutil.resolve_name(ENTRIES[program])())
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        exec(program, {"__name__": "__main__"})
