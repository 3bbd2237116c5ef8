"""Bring files to other nodes: over ssh, by content, in several streams, resumed where an earlier attempt ended, checked.

The other node needs sshd and python3, nothing of ours: `receiver.py` travels along. A single ssh connection encrypts on one
core and reaches a small part of a fast cable, so each file is cut into pieces that several connections carry. A file gets
its name there once its SHA-256 is right. When the launcher ends, however it ends, the connections do, and so do their
programs on the other side.
"""

import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, Self

from tunesmith.checkpoint.manifest import digest_of_file
from tunesmith.errors import MachineError, UsageError
from tunesmith.host.cores import available_cores
from tunesmith.host.files import cache_folder
from tunesmith.host.shell import shell_command, shell_word
from tunesmith.hub.download import FetchProgress

# No connection is shared or left open, no agent or port goes along, and a dead link is given up after 15 seconds.
SSH = ["ssh", "-T", *(f"-o{option}" for option in (
    "BatchMode=yes", "ConnectTimeout=10", "ControlPath=none", "ForwardAgent=no", "ForwardX11=no", "ClearAllForwardings=yes",
    "ServerAliveInterval=5", "ServerAliveCountMax=3", "Compression=no",
))]  # fmt: skip
PIECE = 64 << 20  # bytes
BLOCK = 1 << 20
STREAMS = 8  # at most
SEAL = -1  # in place of a piece: all are there
_HOST = re.compile(r"(?!-)[\w.@:%\[\]-]+", re.ASCII)
_LFS = re.compile(r"[0-9a-f]{64}")  # the name of a blob in the Hub's cache: its SHA-256


@dataclass(frozen=True)
class ShippedFile:
    """A file here, and its place on another node. `named`: the place's name tells the content, so the size is enough to know
    that it is there."""

    source: Path
    place: str
    size: int
    digest: str
    named: bool


class Connection:
    """`Receiver` at work on a host, or without ssh on this node (""). MachineError where it is not reached or fails."""

    def __init__(self, host: str) -> None:
        if host and not _HOST.fullmatch(host):
            fix = "--hosts spark-b, or an address, as ssh takes it"
            raise UsageError(f"{host!r} is no host", where="--hosts", fix=fix)
        program = (
            Path(__file__).with_name("receiver.py").read_bytes()
            + b"\nReceiver(sys.stdin.buffer).serve()\n"
        )
        boot = f"import sys;exec(sys.stdin.buffer.read({len(program)}))"
        there, pipe = [*SSH, "--", host, f"exec python3 -c {shlex.quote(boot)}"], subprocess.PIPE
        self.host, self.name = host, host or "this node"
        try:
            words = there if host else [sys.executable, "-c", boot]
            self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe)
        except OSError as error:
            what, fix = (
                f"{words[0]} cannot be started: {error.strerror}",
                "apt-get install openssh-client",
            )
            raise MachineError(what, fix=fix) from None
        self._send([program])

    def ask(self, command: str, data: Iterable[bytes] = (), **arguments: Any) -> Any:
        """The answer to one command of `Receiver`, whose bytes, if it takes any, are `data`."""
        line = self._send(
            [json.dumps({"do": command, **arguments}).encode() + b"\n"], data, answer=True
        )
        answer = json.loads(line)
        if "error" in answer:
            fix = (
                f"df -h and ls -ld there: {shell_command(['ssh', self.host] if self.host else [])}"
            )
            raise MachineError(f"{self.name}: {answer['error']}", where=command, fix=fix)
        return answer["ok"]

    def run(self, *words: str, given: str = "") -> str:
        """What a command prints there; MachineError with its last line of complaint if it fails."""
        code, out, complaint = self.ask("run", words=words, given=given)
        if code:
            why = (complaint.strip() or f"exit code {code}").splitlines()[-1][:300]
            what, where = f"{words[0]} failed on {self.name}", " ".join(words[:3])
            raise MachineError(what, where=where, why=why, fix="tunesmith doctor")
        return str(out)

    def _send(
        self, first: Iterable[bytes], data: Iterable[bytes] = (), *, answer: bool = False
    ) -> bytes:
        """Write both; the line that comes, if one is awaited. Where the connection breaks, what ssh says of it."""
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            for block in chain(first, data):
                process.stdin.write(block)
            process.stdin.flush()
            if not answer or (line := process.stdout.readline()):
                return line if answer else b""
        except OSError:
            pass
        process.kill()
        said = process.stderr.read().decode(errors="replace").strip().splitlines()
        fix = f"ssh {shell_word(self.host)} python3 --version; if it asks for a password: ssh-copy-id {shell_word(self.host)}"
        why = said[-1][:300] if said else "it closed the connection"
        raise MachineError(
            f"{self.name} cannot be reached by ssh", where=self.name, why=why, fix=fix
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Where the input ends so does the other side, and ssh with it; one that is killed leaves it behind for a moment.
        for seconds in (2, None):
            with suppress(OSError, ValueError, subprocess.TimeoutExpired):
                self.process.communicate(timeout=seconds)
            self.process.kill()


def by_content(path: Path) -> tuple[str, list[ShippedFile]]:
    """A file's or folder's place on every node, named by its content, and the files below it."""
    inside = path.rglob("*") if path.is_dir() else [path]
    files = [file for file in sorted(inside) if file.is_file() and not file.name.startswith(".")]
    listed = [(str(file.relative_to(path)), digest_of_file(file)) for file in files]
    folder = f"{path.name[:100]}--{sha256(json.dumps(listed).encode()).hexdigest()[:32]}"
    place = str(cache_folder("shipped").absolute() / folder / path.name)
    places = [os.path.normpath(os.path.join(place, inner)) for inner, _ in listed]
    rows = zip(files, places, listed, strict=True)
    return place, [
        ShippedFile(file, there, file.stat().st_size, digest, True)
        for file, there, (_, digest) in rows
    ]


def by_place(path: Path) -> ShippedFile:
    """A file that has the same path on every node, and may be another one there."""
    named = bool(_LFS.fullmatch(path.name))
    return ShippedFile(
        path, str(path), path.stat().st_size, path.name if named else digest_of_file(path), named
    )


def of_cache(
    folder: Path, snapshot: Path | None = None
) -> tuple[list[ShippedFile], list[tuple[str, str]]]:
    """The files and links (place, target) of a repository's folder in the Hub's cache, or of one snapshot of it, which have
    the same place on every node."""

    def belongs(path: Path) -> bool:
        is_ref = path.parent.name == "refs" and path.is_file()
        return (
            snapshot is None
            or snapshot in path.parents
            or (is_ref and path.read_text() == snapshot.name)
        )

    paths = [path for path in folder.rglob("*") if belongs(path)]
    links = [(str(path), os.readlink(path)) for path in paths if path.is_symlink()]
    real = {path for path in paths if path.is_file() and not path.is_symlink()}
    real |= {
        Path(os.path.normpath(os.path.join(os.path.dirname(place), target)))
        for place, target in links
    }
    return [
        by_place(path) for path in sorted(real) if path.suffix not in (".incomplete", ".lock")
    ], links


def place_here(files: Iterable[ShippedFile]) -> None:
    """Give this node the files at their places too: a small one as a copy, which a later edit does not change, a large one
    as another name of the same file where the disk has such."""
    for file in files:
        place = Path(file.place)
        if place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
        with suppress(OSError):
            if file.size > PIECE:
                os.link(file.source.resolve(), partial)
        if not partial.exists():
            shutil.copyfile(file.source, partial)
        os.replace(partial, place)


def ship(files: Sequence[ShippedFile], host: str, progress: FetchProgress) -> int:
    """Bring files to a host, those that it lacks -> how many bytes went. MachineError where the host is not reached, its disk
    is full, or a file is not what was sent."""
    distinct = list({file.place: file for file in files}.values())
    with Connection(host) as first:
        states = first.ask("have", files=[[f.place, f.size, f.digest, f.named] for f in distinct])
    work: queue.SimpleQueue[tuple[ShippedFile, int]] = queue.SimpleQueue()
    left, total = dict[str, int](), 0
    for file, state in (
        (file, state) for file, state in zip(distinct, states, strict=True) if state is not None
    ):
        missing = [index for index in range(max(1, -(-file.size // PIECE))) if index not in state]
        left[file.place] = len(missing)
        total += sum(_bounds(file, index)[1] for index in missing)
        for index in missing or [SEAL]:
            work.put((file, index))
    stop, lock = threading.Event(), threading.Lock()

    def carry() -> None:
        with Connection(host) as connection:
            while not stop.is_set() and not work.empty():
                try:
                    file, index = work.get_nowait()
                except queue.Empty:
                    return
                if index != SEAL:
                    start, count = _bounds(file, index)
                    blocks = _blocks(file, start, count, stop, advance)
                    where = {"place": file.place, "digest": file.digest}
                    connection.ask("put", blocks, index=index, start=start, count=count, **where)
                with lock:
                    left[file.place] -= index != SEAL
                    last = not left[file.place]
                if last and not connection.ask("seal", place=file.place, digest=file.digest):
                    what, fix = (
                        f"{file.source} is not what arrived on {host}",
                        "start the same command again",
                    )
                    raise MachineError(what, where=file.place, fix=fix)

    streams = min(STREAMS, work.qsize(), max(2, available_cores()))
    if not streams:
        return 0
    with (
        progress.transfer(f"files to {host}", total, 0, "sending") as advance,
        ThreadPoolExecutor(streams) as pool,
    ):
        jobs = [pool.submit(carry) for _ in range(streams)]
        try:
            for job in as_completed(jobs):
                job.result()
        finally:
            stop.set()
    return total


def _bounds(file: ShippedFile, index: int) -> tuple[int, int]:
    """Where a piece begins, and its length."""
    return index * PIECE, min(PIECE, file.size - index * PIECE)


def _blocks(
    file: ShippedFile,
    start: int,
    count: int,
    stop: threading.Event,
    advance: Callable[[int], object],
) -> Iterator[bytes]:
    """A piece's bytes; it breaks off where another stream has failed, or the file is shorter than it was."""
    with file.source.open("rb") as opened:
        opened.seek(start)
        while count:
            block = opened.read(min(BLOCK, count))
            if stop.is_set() or not block:
                raise BrokenPipeError
            count -= len(block)
            yield block
            advance(len(block))


IMAGE_ID = ("docker", "image", "inspect", "--format", "{{.Id}}")


def require_image(image: str) -> str:
    """The id of a docker image of this node; MachineError, with the command that builds it, if it is not here."""
    with Connection("") as here:
        code, image_id, complaint = here.ask("run", words=[*IMAGE_ID, image])
    if code:
        build = shell_command(["docker", "build", "-f", "docker/Dockerfile", "-t", image, "."])
        what, why = f"there is no image {image} here", complaint.strip()[-300:]
        raise MachineError(
            what, where="--image", why=why, fix=f"{build}, in a clone; or --image NAME"
        )
    return str(image_id).strip()


def ship_image(image: str, host: str) -> str:
    """Bring a docker image to a host unless it has it -> its id, the same on both; MachineError if it is not here."""
    image_id = require_image(image)
    if host:
        with Connection(host) as there:
            lacks = there.ask("run", words=[*IMAGE_ID, image_id])[0]
        if lacks:
            _pump(["docker", "save", image], [*SSH, "--", host, "docker load"], host)
        with Connection(host) as there:
            # Fails where what was loaded has another id
            there.run("docker", "tag", image_id, image)
    return image_id


def _pump(giver: Sequence[str], taker: Sequence[str], host: str) -> None:
    """Run both, what one prints being the other's input, by way of this process: neither outlives it."""
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(giver, stdout=pipe) as source,
        subprocess.Popen(taker, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe) as target,
    ):
        assert source.stdout is not None
        assert target.stdin is not None
        with suppress(OSError):
            shutil.copyfileobj(source.stdout, target.stdin, BLOCK)
        source.stdout.close()
        complaint = target.communicate()[1].decode(errors="replace").strip()
    if source.returncode or target.returncode:
        fix = f"ssh {shell_word(host)} docker ps: you must be in the docker group there"
        raise MachineError(
            f"the image cannot be brought to {host}",
            where="docker load",
            why=complaint[-300:],
            fix=fix,
        )
