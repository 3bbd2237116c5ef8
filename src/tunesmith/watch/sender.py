"""The other host's side of `watch HOST:RUN`: a program for its plain python3 (3.8 or newer), which ssh hands over and runs there.

It imports the standard library alone and only reads. A line asks: JSON, from each file's name to what is known of it, as
[inode, bytes]. The answer is a JSON line for each piece that was added, followed by its bytes, and a line on the whole. The
program ends when its input does or when nobody asks for QUIET seconds, so a watcher that was killed leaves nothing here.
"""

import glob
import json
import os
import signal
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Tuple  # noqa: UP035

if TYPE_CHECKING:
    from tunesmith.launch.jobs import is_locked  # sent along by `remote.py`

QUIET = 120  # seconds
BLOCK = 8 << 20  # bytes


def answer_changes(folder: str, names: Tuple[str, ...], known: Dict[str, List[int]]) -> None:  # noqa: UP006
    """Write what the asker lacks of the run in `folder`, as bytes of the regular files of these names."""
    out, found = sys.stdout.buffer, []
    for path in sorted(path for name in names for path in glob.glob(os.path.join(glob.escape(folder), name))):
        name = os.path.relpath(path, folder)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
                continue
            with open(path, "rb") as file:
                seen, had = os.fstat(file.fileno()), known.get(name, [0, 0])
                start = had[1] if had[0] == seen.st_ino and had[1] <= seen.st_size else 0
                file.seek(start)
                found.append(name)
                new = had != [seen.st_ino, start]  # also where it is empty: sent once, as no bytes
                while new or start < seen.st_size:
                    block = file.read(min(BLOCK, seen.st_size - start))
                    piece = {"name": name, "inode": seen.st_ino, "start": start, "bytes": len(block)}
                    out.write(json.dumps(piece).encode() + b"\n" + block)
                    start += len(block)
                    new = False
                    if not block:  # it was cut since
                        break
        except OSError:  # it was removed in between
            continue
    whole: Dict[str, Any] = {"there": os.path.isdir(folder), "locked": is_locked(Path(folder)), "names": found}  # noqa: UP006
    out.write(json.dumps(whole).encode() + b"\n")
    out.flush()


def serve_run(folder: str, names: Tuple[str, ...]) -> None:  # noqa: UP006
    """Answer until the input ends."""
    folder = os.path.expanduser(folder)
    while True:
        signal.alarm(QUIET)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        answer_changes(folder, names, json.loads(line))
