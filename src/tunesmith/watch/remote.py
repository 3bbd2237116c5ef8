"""A run directory on another host, over the system's ssh: what is appended there is appended to a copy here.

The other host needs sshd and python3, nothing of ours: `sender.py` travels along and ends with the connection. A connection
that breaks (a laptop that slept) is made anew, and goes on where the copy ends.
"""

import fcntl
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunesmith.errors import MachineError, UsageError
from tunesmith.host_files import write_atomically
from tunesmith.launch.jobs import is_locked
from tunesmith.launch.ship import SSH
from tunesmith.run_directory import (
    FAILURE,
    FINAL,
    IDENTITY,
    LOCK,
    LOG,
    MANIFEST,
    METRICS,
    RECIPE,
    RUNNING,
    SAMPLES,
    STOPPED,
)
from tunesmith.shell import shell_path, shell_word

AGAIN = 10.0  # seconds between two attempts to connect
FILES = (  # what a watcher reads of a run, as patterns
    RECIPE, IDENTITY, METRICS, "metrics-rank*.jsonl", SAMPLES, LOG, FAILURE, STOPPED, RUNNING, f"{FINAL}/{MANIFEST}",
)  # fmt: skip
# What the other host may name: a file of a run, never a path out of the copy.
_NAME = re.compile(r"(?!\.)[\w-]+\.(?:yaml|json|jsonl|txt)|final/manifest\.json")
_WORD = re.compile(r"((?!-)[\w.@%\[\]-]+):(.+)", re.ASCII)


def split_remote(word: str) -> tuple[str, str]:
    """`host:runs/x` as host and folder, as scp reads it."""
    if found := _WORD.fullmatch(word):
        return found[1], found[2]
    what, fix = f"{word!r} is neither a path nor HOST:RUN", "tunesmith watch spark-b:runs/my-run"
    raise UsageError(what, where="command line", fix=fix)


class RemoteRun:
    """The copy of a host's run directory, in `copy`. `lost` says why the other side does not answer, if it does not."""

    def __init__(self, host: str, place: str) -> None:
        self.host, self.place, self.lost = host, place, ""
        self._base = Path(tempfile.mkdtemp(prefix="tunesmith-watch-"))
        self.copy = self._base / (Path(place).name or host)
        self.copy.mkdir()
        self._known: dict[str, list[int]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._tried = 0.0
        self._lock: int | None = None

    def refresh(self) -> None:
        """Bring the copy up to date; where that fails, `lost` says why, and it is tried again later."""
        if self._process is None:
            if self.lost and time.monotonic() - self._tried < AGAIN:
                return
            self._connect()
        try:
            self._ask()
            self.lost = ""
        except (OSError, ValueError, KeyError) as error:
            self._disconnect(str(error))

    def check(self) -> None:
        """MachineError or UsageError unless the host answers and has the folder: for the start of a command."""
        self.refresh()
        if self.lost:
            what, fix = f"{self.host} cannot be reached", f"ssh {shell_word(self.host)} python3 --version"
            raise MachineError(what, where=f"{self.host}:{self.place}", why=self.lost, fix=fix)
        if not self._there:
            fix = f"ssh {shell_word(self.host)} ls -d {shell_word(shell_path(self.place))}; relative to the home directory there"
            raise UsageError("there is no such run directory", where=f"{self.host}:{self.place}", fix=fix)

    def close(self) -> None:
        """End the connection and remove the copy."""
        self._disconnect("closed")
        self._set_lock(False)
        shutil.rmtree(self._base, ignore_errors=True)

    def _connect(self) -> None:
        self._tried = time.monotonic()
        start = (
            f"\nimport fcntl\nLOCK = {LOCK!r}\n{inspect.getsource(is_locked)}\nserve_run({self.place!r}, {FILES!r})\n"
        )
        program = Path(__file__).with_name("sender.py").read_bytes() + start.encode()
        boot = f"import sys;exec(sys.stdin.buffer.read({len(program)}))"
        words = [SSH[0], "-C", *SSH[1:], "--", self.host, f"exec python3 -c {shlex.quote(boot)}"]
        pipe = subprocess.PIPE
        try:
            # A group of its own: ctrl-C goes to the watcher, which ends the connection.
            self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        except OSError as error:
            fix = "apt-get install openssh-client"
            raise MachineError(f"ssh cannot be started: {error.strerror}", fix=fix) from None
        assert self._process.stdin is not None
        with suppress(OSError):  # `_ask` meets it too
            self._process.stdin.write(program)

    def _ask(self) -> None:
        """One question and its answer. OSError or ValueError where the connection ends."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(self._known).encode() + b"\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            told: dict[str, Any] = json.loads(line)
            if "there" in told:
                self._there = bool(told["there"])
                for name in [name for name in self._known if name not in told["names"]]:
                    (self.copy / name).unlink(missing_ok=True)
                    del self._known[name]
                self._set_lock(bool(told["locked"]))
                return
            data = self._process.stdout.read(int(told["bytes"]))
            if len(data) < told["bytes"] or not _NAME.fullmatch(told["name"]):
                break
            self._append(told["name"], int(told["start"]), data)
            self._known[told["name"]] = [int(told["inode"]), int(told["start"]) + len(data)]
        raise OSError("the connection ended")

    def _append(self, name: str, start: int, data: bytes) -> None:
        """Write a piece; one from the beginning replaces the file, as a cut-back does there."""
        path = self.copy / name
        path.parent.mkdir(exist_ok=True)
        if start == 0:
            write_atomically(path, data)
        else:
            with path.open("ab") as file:
                file.write(data)

    def _set_lock(self, locked: bool) -> None:
        """Lock the copy while the run is locked there: whoever looks at the copy sees a running one."""
        if locked and self._lock is None:
            self._lock = os.open(self.copy / LOCK, os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif not locked and self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _disconnect(self, why: str) -> None:
        if self._process is not None:
            self._process.kill()
            said = self._process.communicate()[1].decode(errors="replace").strip().splitlines()
            why = said[-1][:300] if said else why
        self._process, self.lost = None, why
