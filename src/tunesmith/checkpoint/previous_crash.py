"""What a start that is killed leaves behind, and the next one tells: `running.json`, which every other end removes."""

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
from tunesmith.run_dir import FAILURE, RUNNING, STOPPED, read_running

BOOT = Path("/proc/sys/kernel/random/boot_id")


def _boot() -> str:
    return BOOT.read_text().strip() if BOOT.exists() else ""  # not Linux


@contextlib.contextmanager
def note_running(run_dir: Path) -> Iterator[None]:
    """Leave a note in the run directory for the time of the block; a process that is killed cannot remove it."""
    note = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "boot": _boot(),
        "oom_kills": oom_kills(),
    }
    write_atomically(
        run_dir / RUNNING,
        json.dumps(note | {"began": time.strftime("%Y-%m-%d %H:%M:%S")}, indent=1),
    )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (run_dir / RUNNING).unlink(missing_ok=True)


def killed_before(run_dir: Path) -> RunError | None:
    """The end of the last start of this directory, which nothing holds now, if it was killed and no other rank has said so:
    after which step, and the likely cause as seen from here."""
    note = read_running(run_dir)
    if note is None:
        return None
    where = f"process {note['process']} on {note['host']}, begun {note['began']}"
    if (run_dir / FAILURE).exists() or (run_dir / STOPPED).exists():
        return None
    steps = newest_record(run_dir).get("step")
    what = (
        f"the last start was killed {f'after step {steps}' if steps else 'before its first step'}"
    )
    if note["host"] != socket.gethostname():
        return RunError(
            what,
            where=where,
            why="its host knows more: dmesg -T | grep -i oom",
            fix=AGAIN,
            cause="killed",
        )
    if note["boot"] != _boot():
        return RunError(
            what,
            where=where,
            why="this machine was started again since",
            fix=AGAIN,
            cause="restarted",
        )
    if (new := oom_kills() - note["oom_kills"]) > 0:
        why = f"the kernel ended {new} of this machine's processes since then (dmesg -T | grep -i oom)"
        return RunError(what, where=where, why=why, fix=AGAIN, cause="oom-kill")
    return RunError(
        what,
        where=where,
        why="the kernel has ended no process since then",
        fix=AGAIN,
        cause="killed",
    )
