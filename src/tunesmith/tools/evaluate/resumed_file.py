"""File of JSON lines that stores each answer immediately, so that a killed command can resume.

If the command is killed during a write, only the last line is incomplete. The resumed command
writes this line again.
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
    """File of JSON lines that is continued after its last complete line.

    Use the object in a `with` statement. The file is locked inside the block.

    Attributes:
        lines: the complete lines, without line breaks.
        torn: the bytes after the last complete line.
    """

    def __init__(self, path: Path) -> None:
        """Read the existing lines. The file is not changed before the `with` block starts.

        Raise MachineError if the file cannot be read.
        """
        self.path = path
        self.lines: list[bytes] = []
        self.torn = b""
        self._file: BinaryIO | None = None
        self._is_truncated = False  # whether the incomplete last line was removed
        self._read_size = 0
        if path.exists():
            try:
                content = read_bytes(path)
            except OSError as error:
                raise self._fault("read", error) from error
            self._read_size = len(content)
            *self.lines, self.torn = content.split(b"\n")

    def __enter__(self) -> Self:
        """Open or create the file, and lock it. The content is unchanged until the first write."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
            self._lock(self._file)
        except BlockingIOError:
            self.__exit__()
            raise UsageError(
                "another command is writing this file",
                where=self.path,
                fix="wait until the other command has finished, or use another file: --output FILE",
            ) from None
        except OSError as error:
            self.__exit__()
            raise self._fault("written", error) from error
        return self

    def _lock(self, file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_size not in (0, self._read_size):
            raise BlockingIOError  # another command has changed the file since it was read

    def _fault(self, action: str, error: OSError) -> MachineError:
        """Build the error for a file that cannot be read or written. `action` is the participle."""
        return MachineError(
            f"{self.path} cannot be {action}",
            where=f"--output {self.path}",
            why=error.strerror or str(error),
            fix="use another file: --output FILE",
        )

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            # If the disk is full, `close` tries again to write the buffered bytes and fails. Ignore
            # this error, because `write` has already raised it.
            with suppress(OSError):
                self._file.close()
            self._file = None

    def write(self, record: dict[str, object], *, why: str = "") -> None:
        """Append one line. Raise RunError if the file cannot be written.

        Args:
            why: clause with the number of answers in the file, for the error message.
        """
        assert self._file is not None
        line = json_line(record)
        try:
            if not self._is_truncated:
                self._file.truncate(sum(len(line) + 1 for line in self.lines))
                self._is_truncated = True
            # UTF-8 cannot encode a lone surrogate, so write it as a JSON escape.
            self._file.write(line.encode("utf-8", "backslashreplace"))
            # Flush each line, so that a killed process loses at most one answer.
            self._file.flush()
        except OSError as error:
            raise write_error(str(self.path), error, why) from error


def json_line(record: dict[str, object]) -> str:
    """Return a line with a record as JSON. Values that JSON does not have are written as text."""
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def write_error(name: str, error: OSError, why: str) -> RunError:
    """Build the error for a file of answers that cannot be written.

    `why` is a clause with the number of answers in the file.
    """
    fault = disk_fault(error)
    fix = "use another file: --output FILE"
    if fault:
        fix = "free disk space (df -h), then run the same command again"
    return RunError(
        fault or f"{name} cannot be written: {error.strerror}",
        where=name,
        why=why,
        fix=fix,
        cause="disk" if fault else "",
    )
