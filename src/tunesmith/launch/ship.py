"""Bring files to other nodes over ssh: by content, in several streams, resumed, and checked.

The other node needs sshd and python3, nothing of ours: `receiver.py` travels along. A single ssh
connection encrypts on one core and reaches a small part of a fast cable, so each file is cut into
pieces that several connections carry. The other side notes which pieces it has, and a later attempt
sends the rest. A file gets its name there once its SHA-256 is right. When the launcher ends,
however it ends, the connections do, and so do their programs on the other side.
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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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
from tunesmith.units import ceil_div

SSH = [
    "ssh",
    "-T",
    "-oBatchMode=yes",
    "-oConnectTimeout=10",
    # No connection is shared or left open, and no agent or port goes along.
    "-oControlPath=none",
    "-oForwardAgent=no",
    "-oForwardX11=no",
    "-oClearAllForwardings=yes",
    # A dead link is closed after 15 seconds.
    "-oServerAliveInterval=5",
    "-oServerAliveCountMax=3",
    "-oCompression=no",
    # Processors have instructions for it: with ssh's own choice large files took a quarter more
    # CPU time (benchmarks/speed/send_files.py).
    "-oCiphers=^aes128-gcm@openssh.com",
]
IMAGE_ID = ("docker", "image", "inspect", "--format", "{{.Id}}")
PIECE = 64 << 20  # bytes
BLOCK = 1 << 20  # bytes
MAX_STREAMS = 8
COMMIT = -1  # in place of a piece: all are there
_HOST = re.compile(r"(?!-)[\w.@:%\[\]-]+", re.ASCII)
_LFS = re.compile(r"[0-9a-f]{64}")  # the name of a blob in the Hub's cache: its SHA-256


@dataclass(frozen=True)
class ShippedFile:
    """A file here, and its place on another node.

    Attributes:
        named: the place's name tells the content, so the size is enough to know that it is there.
    """

    source: Path
    place: str
    size: int
    digest: str
    named: bool


class Connection:
    """`Receiver` at work on a host, or without ssh on this node ("").

    MachineError where it is not reached or fails.
    """

    def __init__(self, host: str) -> None:
        # What begins with - would be an option of ssh.
        if host and not _HOST.fullmatch(host):
            fix = "--hosts spark-b, or an address, as for ssh"
            raise UsageError(f"{host!r} is not a host", where="--hosts", fix=fix)
        self.host = host
        self.name = host or "this node"
        program = Path(__file__).with_name("receiver.py").read_bytes()
        program += b"\nReceiver(sys.stdin.buffer).serve()\n"
        # The program comes first on the standard input, and the commands after it.
        boot = f"import sys;exec(sys.stdin.buffer.read({len(program)}))"
        words = [sys.executable, "-c", boot]
        if host:
            # `exec`: the login shell there gives way to python3, and is not left behind.
            words = [*SSH, "--", host, f"exec python3 -c {shlex.quote(boot)}"]
        # ssh prints its own words on stderr: stdout carries the answers alone, a line each.
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe)
        except OSError as error:
            what = f"{words[0]} cannot be started: {error.strerror}"
            raise MachineError(what, fix="apt-get install openssh-client") from None
        self._send([program])

    def ask(self, command: str, data: Iterable[bytes] = (), **arguments: Any) -> Any:
        """The answer to one command of `Receiver`, whose bytes, if it takes any, are `data`."""
        line = json.dumps({"do": command, **arguments}).encode() + b"\n"
        # A generator of blocks: a piece of 64 MiB is never in memory as a whole.
        self._send(chain([line], data))
        answer = json.loads(self._read_line())
        if "error" in answer:
            raise MachineError(
                f"{self.name}: {answer['error']}",
                where=command,
                fix="df -h and ls -ld there: "
                f"{shell_command(['ssh', self.host] if self.host else [])}",
            )
        return answer["ok"]

    def run(self, *words: str, text: str = "") -> str:
        """What a command prints there, with `text` as its input.

        MachineError with its last line of complaint if it fails.
        """
        code, out, errors = self.ask("run", words=words, text=text)
        if code:
            raise MachineError(
                f"{words[0]} failed on {self.name}",
                where=" ".join(words[:3]),
                why=(errors.strip() or f"exit code {code}").splitlines()[-1][:300],
                fix="tunesmith doctor",
            )
        return str(out)

    def _send(self, blocks: Iterable[bytes]) -> None:
        assert self.process.stdin is not None
        try:
            for block in blocks:
                self.process.stdin.write(block)
            self.process.stdin.flush()
        except OSError:
            raise self._broken() from None

    def _read_line(self) -> bytes:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._broken()
        return line

    def _broken(self) -> MachineError:
        """The error of a connection that broke, with what ssh says of it."""
        assert self.process.stderr is not None
        self.process.kill()
        errors = self.process.stderr.read().decode(errors="replace").strip()
        return MachineError(
            f"{self.name} cannot be reached by ssh",
            where=self.name,
            why=errors.rpartition("\n")[2][:300] or "it closed the connection",
            fix=f"ssh {shell_word(self.host)} python3 --version; "
            f"if it asks for a password: ssh-copy-id {shell_word(self.host)}",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Where the input ends so does the other side, and ssh with it; an ssh that is killed leaves
        # the other side behind for a moment.
        for seconds in (2, None):
            with suppress(OSError, ValueError, subprocess.TimeoutExpired):
                self.process.communicate(timeout=seconds)
            self.process.kill()


def by_content(path: Path) -> tuple[str, list[ShippedFile]]:
    """A file's or folder's place on every node, named by its content, and the files below it."""
    inside = [path]
    if path.is_dir():
        inside = sorted(path.rglob("*"))
    files = [file for file in inside if file.is_file() and not _is_hidden(file, path)]
    # Names count beside the contents: a folder whose files changed places is another input.
    digests = [(str(file.relative_to(path)), digest_of_file(file)) for file in files]
    digest_of_all = sha256(json.dumps(digests).encode()).hexdigest()
    folder = f"{path.name[:100]}--{digest_of_all[:32]}"
    # Below the digest stands the input's own name: its suffix tells the format of data.
    place = str(cache_folder("shipped").absolute() / folder / path.name)
    shipped = []
    for file, (name, digest) in zip(files, digests, strict=True):
        # A file that is shipped alone is `.` here.
        place_of_file = os.path.normpath(os.path.join(place, name))
        shipped.append(ShippedFile(file, place_of_file, file.stat().st_size, digest, named=True))
    return place, shipped


def _is_hidden(file: Path, folder: Path) -> bool:
    names = [file.name, *file.relative_to(folder).parts]
    return any(name.startswith(".") for name in names)


def by_place(path: Path) -> ShippedFile:
    """A file that has the same path on every node, and may be another one there."""
    named = bool(_LFS.fullmatch(path.name))
    digest = path.name if named else digest_of_file(path)
    return ShippedFile(path, str(path), path.stat().st_size, digest, named)


def cached_files(
    folder: Path, snapshot: Path | None = None
) -> tuple[list[ShippedFile], list[tuple[str, str]]]:
    """The files and links (place, target) of a repository's folder in the Hub's cache.

    They have the same place on every node. `snapshot`: only those of one snapshot.
    """

    def belongs(path: Path) -> bool:
        if snapshot is None or snapshot in path.parents:
            return True
        is_ref = path.parent.name == "refs" and path.is_file()
        return is_ref and path.read_text() == snapshot.name

    files = set()
    links = []
    for path in filter(belongs, folder.rglob("*")):
        if path.is_symlink():
            # A snapshot is links to ../../blobs/SHA-256.
            target = os.readlink(path)
            links.append((str(path), target))
            files.add(Path(os.path.normpath(path.parent / target)))
        elif path.is_file():
            files.add(path)
    # What is being fetched by another process is no part of the repository yet.
    finished = [file for file in sorted(files) if file.suffix not in (".incomplete", ".lock")]
    return [by_place(file) for file in finished], links


def place_here(files: Iterable[ShippedFile]) -> None:
    """Give this node the files at their places too.

    A small one is copied, so that a later edit does not change it; a large one gets a second name
    (a hard link) where the disk has such.
    """
    for file in files:
        place = Path(file.place)
        if place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        # Written beside its place and renamed: another launch may look for it at the same time.
        partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
        # No link where both are on different disks, or where the file system has no links.
        with suppress(OSError):
            if file.size > PIECE:
                os.link(file.source.resolve(), partial)
        if not partial.exists():
            shutil.copyfile(file.source, partial)
        os.replace(partial, place)


def ship(files: Sequence[ShippedFile], host: str, progress: FetchProgress) -> int:
    """Bring those of the files to a host that it lacks -> how many bytes went.

    MachineError where the host is not reached, its disk is full, or a file is not what was sent.
    """
    # Two keys of a recipe may name one file.
    distinct = list({file.place: file for file in files}.values())
    with Connection(host) as connection:
        rows = [[file.place, file.size, file.digest, file.named] for file in distinct]
        # One question for all files; then only the missing pieces travel.
        states = connection.ask("have", files=rows)
    transfer = _Transfer(host)
    for file, pieces_there in zip(distinct, states, strict=True):
        # None: the file is there.
        if pieces_there is not None:
            transfer.add(file, pieces_there)
    # No more connections than pieces, and no more than cores: each encrypts on one.
    streams = min(MAX_STREAMS, transfer.work.qsize(), max(2, available_cores()))
    if not streams:
        return 0
    with (
        progress.transfer(f"files to {host}", transfer.bytes, 0, "sending") as advance,
        ThreadPoolExecutor(streams) as pool,
    ):
        jobs = [pool.submit(transfer.carry, advance) for _ in range(streams)]
        try:
            for job in as_completed(jobs):
                job.result()
        finally:
            # Where one stream failed the others end too.
            transfer.stop.set()
    return transfer.bytes


class _Transfer:
    """Pieces of files that several threads bring to a host.

    Attributes:
        bytes: of all pieces.
        work: a file and the index of a piece, or COMMIT.
        stop: set where the threads must end.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.bytes = 0
        self.work = queue.SimpleQueue[tuple[ShippedFile, int]]()
        self.stop = threading.Event()
        self._pieces_left = dict[str, int]()
        self._lock = threading.Lock()

    def add(self, file: ShippedFile, pieces_there: Collection[int]) -> None:
        """Have the pieces of a file brought that are not there."""
        # An empty file is one piece without bytes.
        count = max(1, ceil_div(file.size, PIECE))
        missing = [index for index in range(count) if index not in pieces_there]
        self._pieces_left[file.place] = len(missing)
        for index in missing:
            self.bytes += _piece_size(file, index)
            self.work.put((file, index))
        # An earlier attempt ended before the file got its name.
        if not missing:
            self.work.put((file, COMMIT))

    def carry(self, advance: Callable[[int], object]) -> None:
        """Bring pieces until none is left; `advance` takes the bytes as they go."""
        with Connection(self.host) as connection:
            while not self.stop.is_set():
                try:
                    file, index = self.work.get_nowait()
                except queue.Empty:
                    return
                if index == COMMIT:
                    self._commit(connection, file)
                    continue
                connection.ask(
                    "put",
                    self._blocks(file, index, advance),
                    place=file.place,
                    digest=file.digest,
                    index=index,
                    start=index * PIECE,
                    count=_piece_size(file, index),
                )
                # Several threads bring pieces of one file: the last of them gives it its name.
                with self._lock:
                    self._pieces_left[file.place] -= 1
                    is_complete = not self._pieces_left[file.place]
                if is_complete:
                    self._commit(connection, file)

    def _commit(self, connection: Connection, file: ShippedFile) -> None:
        """Give a file its name there; MachineError where its content is another one."""
        if not connection.ask("commit", place=file.place, digest=file.digest):
            raise MachineError(
                f"{file.source} was damaged on its way to {self.host}",
                where=file.place,
                fix="start the same command again",
            )

    def _blocks(
        self, file: ShippedFile, index: int, advance: Callable[[int], object]
    ) -> Iterator[bytes]:
        """A piece's bytes.

        BrokenPipeError where another stream has failed, or the file is shorter than it was.
        """
        left = _piece_size(file, index)
        with file.source.open("rb") as opened:
            opened.seek(index * PIECE)
            while left:
                block = opened.read(min(BLOCK, left))
                # A broken pipe ends `ask` as a lost connection does, so the other side drops the
                # piece.
                if self.stop.is_set() or not block:
                    raise BrokenPipeError
                left -= len(block)
                yield block
                advance(len(block))


def _piece_size(file: ShippedFile, index: int) -> int:
    return min(PIECE, file.size - index * PIECE)


def require_image(image: str) -> str:
    """The id of a docker image of this node.

    MachineError, with the command that builds it, if it is not here.
    """
    with Connection("") as here:
        code, image_id, errors = here.ask("run", words=[*IMAGE_ID, image])
    if code:
        build = shell_command(["docker", "build", "-f", "docker/Dockerfile", "-t", image, "."])
        raise MachineError(
            f"there is no image {image} here",
            where="--image",
            why=errors.strip()[-300:],
            fix=f"{build}, in a clone; or --image NAME",
        )
    return str(image_id).strip()


def ship_image(image: str, host: str) -> str:
    """Bring a docker image to a host unless it has it -> its id, the same on both.

    MachineError if it is not on this node.
    """
    image_id = require_image(image)
    if not host:
        return image_id
    with Connection(host) as there:
        # By id: another image may have the same name there.
        code, _, _ = there.ask("run", words=[*IMAGE_ID, image_id])
    if code:
        _pipe(["docker", "save", image], [*SSH, "--", host, "docker load"], host)
    with Connection(host) as there:
        # It fails where what was loaded has another id.
        there.run("docker", "tag", image_id, image)
    return image_id


def _pipe(sender: Sequence[str], receiver: Sequence[str], host: str) -> None:
    """Run both, with what one prints as the other's input.

    The bytes go through this process: neither command outlives it.
    """
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(sender, stdout=pipe) as source,
        subprocess.Popen(receiver, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe) as target,
    ):
        assert source.stdout is not None
        assert target.stdin is not None
        # A receiver that fails closes its input; its errors are read below.
        with suppress(OSError):
            shutil.copyfileobj(source.stdout, target.stdin, BLOCK)
        # `docker load` ends when its input does.
        source.stdout.close()
        errors = target.communicate()[1].decode(errors="replace").strip()
    if source.returncode or target.returncode:
        raise MachineError(
            f"the image cannot be copied to {host}",
            where="docker load",
            why=errors[-300:],
            fix=f"ssh {shell_word(host)} docker ps: you must be in the docker group there",
        )
