"""`--debug` of a launch: what ranks and NCCL print on every node, in one archive beside the run.

The nodes need no common disk: each sends its archive to the node that holds the ranks' store,
through that store.
"""

import io
import os
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import mask
from tunesmith.host.files import write_atomically
from tunesmith.units import count_of

if TYPE_CHECKING:
    from torch.distributed import TCPStore

MAX_ARCHIVE = 7 << 20  # bytes of a node's archive: the store takes values of 8 MiB
FILE_TAIL = 4 << 20  # bytes at a file's end that are collected
COLLECT_TIMEOUT = 15.0  # seconds for the archives of the other nodes


def enable_debug_logs(folder: Path) -> list[str]:
    """Have NCCL and the ranks write files in `folder`; the words for torch's launcher."""
    os.environ |= {
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_FILE": f"{folder}/nccl-%h-%p.log",
        "TUNESMITH_DEBUG": "1",
    }
    # Both streams of each rank go to the terminal and to a file.
    return ["--tee", "3"]


def pack_logs(folder: Path, prefix: str) -> bytes:
    """The ends of a folder's files as a .tar.gz, tokens masked, below `prefix`.

    Where they are more than MAX_ARCHIVE bytes, the newest that fit.
    """
    files = [file for file in folder.rglob("*") if file.is_file()]
    files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    packed = io.BytesIO()
    # The archive is built in memory: its bytes become one value of the store.
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for file in files:
            tail = file.read_bytes()[-FILE_TAIL:].decode(errors="replace")
            text = mask(tail).encode()
            # Names begin with the node, so that files of two nodes do not meet in the joined
            # archive.
            member = tarfile.TarInfo(f"{prefix}/{file.relative_to(folder)}")
            member.size = len(text)
            member.mtime = file.stat().st_mtime
            archive.addfile(member, io.BytesIO(text))
            # Another one may not fit.
            if packed.tell() > MAX_ARCHIVE - FILE_TAIL:
                break
    return packed.getvalue()


def collect_logs(
    store: "TCPStore", folder: Path, name: str, nodes: int, target: Path | None
) -> str:
    """Send this node's logs to the node that holds the store, which writes all nodes' to `target`.

    A node that does not answer within COLLECT_TIMEOUT seconds is left out, and counted.

    Args:
        name: of this node.
        target: the archive, on the node that holds the store; None on others.

    Returns:
        A line for the terminal; empty on others.
    """
    archive_here = pack_logs(folder, name)
    # The other nodes cannot know each other's numbers: `add` gives each the next free one.
    if target is None:
        number = store.add("debug", 1)
        store.set(f"debug/{number}", archive_here)  # type: ignore[arg-type]
        return ""
    keys = [f"debug/{number}" for number in range(1, nodes)]
    deadline = time.monotonic() + COLLECT_TIMEOUT
    while not store.check(keys) and time.monotonic() < deadline:
        time.sleep(0.1)
    # `get` would wait for a key that is not there.
    archives = [archive_here, *(store.get(key) for key in keys if store.check([key]))]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as joined:
        for part in archives:
            with tarfile.open(fileobj=io.BytesIO(part), mode="r:gz") as archive:
                for member in archive:
                    joined.addfile(member, archive.extractfile(member))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, packed.getvalue())
    line = f"logs of {count_of(len(archives), 'node')}: {target}"
    missing = nodes - len(archives)
    if missing:
        line += f"; {missing} of {nodes} nodes did not respond"
    return line
