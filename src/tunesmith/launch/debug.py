"""`--debug` of a launch: what each rank and NCCL say on every node, in one archive beside the run.

The nodes need no common disk: each sends its archive to the node that holds the ranks' store, through that store.
"""

import io
import os
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import mask
from tunesmith.host.files import write_atomically

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LARGEST = 7 << 20  # bytes of a node's archive: the store takes values of 8 MiB
NEWEST = 4 << 20  # bytes of a file's end that are kept
PATIENCE = 15.0  # seconds for the archives of the other nodes


def say_all(folder: Path) -> list[str]:
    """Have NCCL and the ranks write files in `folder`; the words for torch's launcher."""
    os.environ |= {
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_FILE": f"{folder}/nccl-%h-%p.log",
        "TUNESMITH_DEBUG": "1",
    }
    return ["--tee", "3"]


def pack_logs(folder: Path, prefix: str) -> bytes:
    """The ends of a folder's files as a .tar.gz, tokens masked, below `prefix`; the newest files that fit in LARGEST."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for file in sorted(
            (p for p in folder.rglob("*") if p.is_file()), key=lambda p: -p.stat().st_mtime
        ):
            text = mask(file.read_bytes()[-NEWEST:].decode(errors="replace")).encode()
            about = tarfile.TarInfo(f"{prefix}/{file.relative_to(folder)}")
            about.size, about.mtime = len(text), file.stat().st_mtime
            archive.addfile(about, io.BytesIO(text))
            if packed.tell() > LARGEST - NEWEST:
                break
    return packed.getvalue()


def collect_logs(
    store: "TCPStore", folder: Path, name: str, nodes: int, target: Path | None
) -> str:
    """Send this node's logs to the one that holds the store, which writes all of them to `target`; a line on it there.

    A node that does not answer within PATIENCE seconds is left out, and named by its number.
    """
    own = pack_logs(folder, name)
    if target is None:
        store.set(f"debug/{store.add('debug', 1)}", own)  # type: ignore[arg-type]
        return ""
    others, end = [f"debug/{number}" for number in range(1, nodes)], time.monotonic() + PATIENCE
    while not store.check(others) and time.monotonic() < end:
        time.sleep(0.1)
    here = [key for key in others if store.check([key])]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for part in (own, *map(store.get, here)):
            with tarfile.open(fileobj=io.BytesIO(part), mode="r:gz") as node:
                for member in node:
                    archive.addfile(member, node.extractfile(member))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, packed.getvalue())
    missing = (
        f"; {len(others) - len(here)} of {nodes} nodes sent nothing"
        if len(here) < len(others)
        else ""
    )
    return f"logs of {len(here) + 1} node{'s' if here else ''}: {target}{missing}"
