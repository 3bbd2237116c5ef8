"""A note in the run directory that a process is training. If the process is killed, the next start
of the run finds the note and reports this.

The note is `running.json`. It is removed at the end of the run, unless the process is killed.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from tunesmith.distributed.diagnosis import AGAIN
from tunesmith.errors import RunError
from tunesmith.host.files import write_atomically
from tunesmith.host.memory import oom_kills
from tunesmith.metrics.record import newest_record
from tunesmith.run_dir import FAILURE, RUNNING, STOPPED, RunningNote, read_running

BOOT = Path("/proc/sys/kernel/random/boot_id")


def _boot_id() -> str:
    """Return an id that changes at each boot of the machine.

    Return "" if the system is not Linux.
    """
    return BOOT.read_text().strip() if BOOT.exists() else ""


@contextlib.contextmanager
def note_running(run_dir: Path) -> Iterator[None]:
    """Keep a note in the run directory while the block runs.

    A killed process cannot remove the note, so the next start of the run finds it.
    """
    note = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "oom_kills": oom_kills(),
        "began": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    write_atomically(run_dir / RUNNING, json.dumps(note, indent=1))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (run_dir / RUNNING).unlink(missing_ok=True)


def find_previous_crash(run_dir: Path) -> RunError | None:
    """Return an error that says how the previous process in this run directory was killed.

    The error names the last step and the likely cause. Return None if the process was not killed or
    if it has written why it ended. Call this only if no run is active in the directory.
    """
    note = read_running(run_dir)
    if note is None:
        return None
    # A report that is older than the note is from an earlier process. It is deleted only after the
    # model is loaded.
    began = _written_at(run_dir / RUNNING)
    if any(_written_at(run_dir / report) >= began for report in (FAILURE, STOPPED)):
        return None
    step = newest_record(run_dir).get("step")
    moment = "before its first step"
    if step:
        moment = f"after step {step}"
    why, cause = _likely_cause(note)
    return RunError(
        f"the previous process of this run was killed {moment}",
        where=f"process {note['process']} on {note['host']}, started {note['began']}",
        why=why,
        fix=AGAIN,
        cause=cause,
    )


def _written_at(path: Path) -> int:
    """Return the modification time in nanoseconds, or 0 if the file does not exist."""
    try:
        return path.stat().st_mtime_ns
    except OSError:  # the run can delete the file at any time
        return 0


def _likely_cause(note: RunningNote) -> tuple[str, str]:
    """Return why the process was probably killed, and the name of the cause."""
    if note["host"] != socket.gethostname():
        return "the reason is unknown here; check `dmesg -T | grep -i oom` on that host", "killed"
    if note["boot"] != _boot_id():
        return "this machine was rebooted after that start", "restarted"
    # Subtract the count at the start of the run, because the kernel counts from boot.
    kills = oom_kills() - note["oom_kills"]
    if kills > 0:
        return (
            f"the kernel killed {kills} of this machine's processes after that start "
            "(dmesg -T | grep -i oom)",
            "oom-kill",
        )
    return "the kernel has not killed a process after that start", "killed"
