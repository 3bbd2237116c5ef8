"""A file of JSON lines that grows answer by answer, so that a killed command goes on where it was.

A file that is killed while it is written has at most a last line without its end, which is written
again.
"""

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self

from tunesmith.errors import MachineError, RunError, UsageError, disk_fault
from tunesmith.run_dir import read_bytes


class ResumedFile:
    """A file of JSON lines, gone on with after its last whole line. A context; it holds a lock.

    Attributes:
        lines: the whole lines that are there, without their ends.
        torn: what comes after them.
    """

    def __init__(self, path: Path) -> None:
        """Nothing is written before the context is entered; MachineError for a file that cannot be
        read.
        """
        self.path = path
        self.lines: list[bytes] = []
        self.torn = b""
        self._file: BinaryIO | None = None
        self._is_cut = False  # to the whole lines, before the first write
        self._read_size = 0
        if path.exists():
            try:
                content = read_bytes(path)
            except OSError as error:
                raise MachineError(
                    f"{path.name} cannot be read",
                    where=f"--output {path}",
                    why=error.strerror or str(error),
                    fix="name another file: --output FILE",
                ) from error
            self._read_size = len(content)
            *self.lines, self.torn = content.split(b"\n")

    def __enter__(self) -> Self:
        """Create the file and lock it. Its content stays until the first line is written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
            self._lock(self._file)
        except BlockingIOError:
            self.__exit__()
            raise UsageError(
                "another command writes this file",
                where=str(self.path),
                fix="wait for it and start again, or name another file: --output FILE",
            ) from None
        except OSError as error:
            self.__exit__()
            raise MachineError(
                f"{self.path} cannot be written",
                where=f"--output {self.path}",
                why=error.strerror or str(error),
                fix="write it elsewhere: --output",
            ) from error
        return self

    def _lock(self, file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_size not in (0, self._read_size):
            raise BlockingIOError  # it was written since it was read

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            # Closing writes once more what a full disk did not take: that error was raised.
            with suppress(OSError):
                self._file.close()
            self._file = None

    def write(self, record: dict[str, object], *, why: str = "") -> None:
        """Write one more line; RunError where the disk takes no more, for which `why` says how far
        it came.
        """
        assert self._file is not None
        line = json.dumps(record, ensure_ascii=False, default=str) + "\n"
        try:
            if not self._is_cut:
                self._file.truncate(sum(len(line) + 1 for line in self.lines))
                self._is_cut = True
            # UTF-8 has no lone surrogate: it is written as its JSON escape.
            self._file.write(line.encode("utf-8", "backslashreplace"))
            # A process that is killed loses one answer.
            self._file.flush()
        except OSError as error:
            raise write_error(str(self.path), error, why) from error


def write_error(name: str, error: OSError, why: str) -> RunError:
    """The error of a file that takes no more answers; `why` says how many are in it."""
    fault = disk_fault(error)
    return RunError(
        fault or f"{name} cannot be written: {error.strerror}",
        where=name,
        why=why,
        fix="free disk space (df -h), then run the same command again",
        cause="disk" if fault else "",
    )
