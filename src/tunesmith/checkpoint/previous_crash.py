"""The trace that a start leaves behind when it is killed, and the next one reports.

It is `running.json`, which every other end removes.
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
    """Differs after each start of the machine; empty where this is not Linux."""
    return BOOT.read_text().strip() if BOOT.exists() else ""


@contextlib.contextmanager
def note_running(run_dir: Path) -> Iterator[None]:
    """Leave a note in the run directory for the time of the block.

    A process that is killed cannot remove it.
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
    """An error that says how the last start of this directory was killed: after which step, and the
    likely cause as seen from here.

    None if it was not killed, or if another rank has reported how it ended. No run may hold the
    directory.
    """
    note = read_running(run_dir)
    if note is None:
        return None
    if (run_dir / FAILURE).exists() or (run_dir / STOPPED).exists():
        return None
    step = newest_record(run_dir).get("step")
    moment = f"after step {step}" if step else "before its first step"
    why, cause = _likely_cause(note)
    return RunError(
        f"the last start was killed {moment}",
        where=f"process {note['process']} on {note['host']}, started {note['began']}",
        why=why,
        fix=AGAIN,
        cause=cause,
    )


def _likely_cause(note: RunningNote) -> tuple[str, str]:
    """Why that process was killed, and the name of the cause."""
    if note["host"] != socket.gethostname():
        return "on that host, check: dmesg -T | grep -i oom", "killed"
    if note["boot"] != _boot_id():
        return "this machine was rebooted since", "restarted"
    # The kernel counts them from its start on.
    kills = oom_kills() - note["oom_kills"]
    if kills > 0:
        return (
            f"the kernel killed {kills} of this machine's processes since then "
            "(dmesg -T | grep -i oom)",
            "oom-kill",
        )
    return "the kernel has not killed a process since then", "killed"
