"""The other node's side of `ship`: a program for its plain python3 (3.8 or newer), sent by ssh.

It imports the standard library alone. It reads a JSON command a line, some followed by bytes,
answers each with a JSON line, and ends when its input does or nothing comes for QUIET seconds: a
launcher that was killed leaves nothing here.
"""

import glob
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from typing import Any, BinaryIO, Dict, List, Optional  # noqa: UP035

QUIET = 120  # seconds
BLOCK = 1 << 20  # bytes


class Receiver:
    """Each public method but `serve` is a command; arguments and results are JSON."""

    def __init__(self, data: BinaryIO) -> None:
        self.data = data

    def look(self) -> Dict[str, Any]:  # noqa: UP006
        """Who this is, and {RDMA device whose link is up: {its network interface: MTU}}."""
        rdma = {}
        for device in sorted(glob.glob("/sys/class/infiniband/*")):
            if "ACTIVE" in _text(device + "/ports/1/state"):
                mtus = {}
                for path in glob.glob(device + "/device/net/*"):
                    name = os.path.basename(path)
                    mtus[name] = _text("/sys/class/net/" + name + "/mtu")
                rdma[os.path.basename(device)] = mtus
        return {
            "host": socket.gethostname(),
            "user": [os.getuid(), os.getgid()],
            "gpu": os.path.exists("/dev/nvidiactl"),
            "rdma": rdma,
        }

    def run(self, words: List[str], text: str = "") -> List[Any]:  # noqa: UP006
        """A command's exit code, output and errors."""
        try:
            process = subprocess.run(words, input=text.encode(), capture_output=True, check=False)
        except OSError as error:
            return [127, "", f"{words[0]}: {error.strerror}"]
        return [
            process.returncode,
            process.stdout.decode(errors="replace"),
            process.stderr.decode(errors="replace"),
        ]

    def have(self, files: List[List[Any]]) -> List[Optional[List[int]]]:  # noqa: UP006,UP045
        """For each [place, bytes, SHA-256, whether its name tells its content] the pieces here.

        None: the file is here.
        """
        pieces: List[Optional[List[int]]] = []  # noqa: UP006,UP045
        for place, size, digest, named in files:
            # Reading a file of some gigabytes takes long: its size is compared first.
            has_size = os.path.isfile(place) and os.path.getsize(place) == size
            if has_size and (named or _digest(place) == digest):
                pieces.append(None)
            else:
                journal = _text(_partial(place, digest) + ".pieces")
                # A piece that two attempts have brought is there twice.
                pieces.append(sorted({int(line) for line in journal.split()}))
        return pieces

    def put(self, place: str, digest: str, index: int, start: int, count: int) -> bool:
        """Write piece `index` of a file at `start`: the `count` bytes that follow the command."""
        partial = _partial(place, digest)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        # No O_TRUNC: other pieces are in the file already, and several processes write into it.
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
            # Pieces come in any order: the file is sparse until all are there.
            file.seek(start)
            while count:
                signal.alarm(QUIET)
                block = self.data.read(min(count, BLOCK))
                # The launcher is gone. The piece is not in the journal, and is sent again.
                if not block:
                    sys.exit(1)
                file.write(block)
                count -= len(block)
        # The journal after the data: a piece that is in it is whole.
        with open(partial + ".pieces", "a") as journal:
            journal.write(f"{index}\n")
        return True

    def commit(self, place: str, digest: str) -> bool:
        """Give a file its name if its content is what was to be sent; else remove it."""
        partial = _partial(place, digest)
        is_whole = _digest(partial) == digest
        # The journal goes first: without it a next attempt sends everything again, with it but no
        # file it would send too little.
        os.unlink(partial + ".pieces")
        if is_whole:
            os.replace(partial, place)
        else:
            os.unlink(partial)
        return is_whole

    def serve(self) -> None:
        """Answer commands until the input ends."""
        while True:
            signal.alarm(QUIET)
            line = self.data.readline()
            # A command may hash for minutes.
            signal.alarm(0)
            if not line:
                return
            command = json.loads(line)
            name = command.pop("do")
            try:
                # `__dict__` of the class itself: only the commands of this class can be named by a
                # line.
                answer = {"ok": type(self).__dict__[name](self, **command)}
            except OSError as error:
                answer = {"error": f"{error.filename}: {error.strerror}"}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
            # Its bytes are still in the input, where the next command would be read.
            if "error" in answer and name == "put":
                return


def _partial(place: str, digest: str) -> str:
    """Where a file is written until it is whole."""
    head, name = os.path.split(place)
    return os.path.join(head, f".{name[:200]}.{digest[:16]}.partial")


def _text(path: str) -> str:
    """A file's text; empty where there is none."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()
