"""Download files into the Hub's cache so that an interrupted download resumes where it stopped.

Bytes arrive in a part file beside the cache's blobs, which becomes the blob `blobs/<etag>` when its hash is the one that
the Hub states; huggingface_hub then makes the snapshot. Its own download (2.4) compares no hashes and starts anew:
killed at 90 % of a 500 MB file, it fetched 500 MB again and left 440 MB behind; this module fetched 49 MB.
"""

import hashlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import constants, get_session
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status
from rich.filesize import decimal as size_text

from tunesmith.errors import ModelError
from tunesmith.host.streams import is_terminal
from tunesmith.hub.hub_calls import retry

WORKERS = 4
SECONDS_BETWEEN_LINES = 10.0

# So many bytes arrived (negative: thrown away); called from several threads
Advance = Callable[[int], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub. `size` in bytes; `etag` names its blob in the cache: sha256, or git's blob hash where small."""

    name: str
    url: str
    size: int
    etag: str

    def part(self, storage: Path) -> Path:
        """The file of its bytes until all have arrived; tools for the cache know the ending."""
        return storage / "blobs" / f"{self.etag}.tunesmith.incomplete"

    def arrived(self, storage: Path) -> int:
        """Bytes of it that a repository's folder in the cache holds."""
        if (storage / "blobs" / self.etag).exists():
            return self.size
        part = self.part(storage)
        return part.stat().st_size if part.exists() else 0


class FetchProgress:
    """Tells what a fetch does, by `say` or on stderr: with a bar if that is a terminal, else a line in ten seconds."""

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self._bar = say is None and is_terminal(sys.stderr)

    @contextmanager
    def transfer(
        self, what: str, total: int, done: int, doing: str = "fetching"
    ) -> Iterator[Advance]:
        """While bytes of `what` arrive: `total` of them, of which `done` are there already."""
        if self._bar:
            from rich.console import Console
            from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

            columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
            with Progress(*columns, console=Console(stderr=True)) as bar:
                task = bar.add_task(what, total=total, completed=done)
                yield lambda count: bar.advance(task, count)
            return
        told = time.monotonic()

        def advance(count: int) -> None:
            nonlocal done, told
            done += count
            if time.monotonic() - told >= SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                self.say(f"  {size_text(done)} of {size_text(total)}")

        self.say(
            f"{doing} {what}: {size_text(total)}"
            + (f", {size_text(done)} there already" if done else "")
        )
        yield advance


def download(files: Sequence[RemoteFile], storage: Path, advance: Advance) -> None:
    """Download files to the blobs of `storage`, a repository's folder in the cache; those that are there are skipped.

    Raises the first error of any file; the parts of all stay.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(WORKERS) as pool:
        jobs = [pool.submit(_download_blob, file, storage, advance, stop) for file in files]
        try:
            for job in as_completed(jobs):
                job.result()
        finally:
            stop.set()  # ctrl-C or an error: the others end at their next chunk and keep their parts
            pool.shutdown(cancel_futures=True)


def _download_blob(
    file: RemoteFile, storage: Path, advance: Advance, stop: threading.Event
) -> None:
    blob, part = storage / "blobs" / file.etag, file.part(storage)
    lock = storage.parent / ".locks" / storage.name / f"{file.etag}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if blob.exists():
            return
        retry(lambda: _receive(file, part, advance, stop), lambda: file.arrived(storage))
        if stop.is_set():
            return
        # Git's blob hash is the sha1 of a header and the bytes.
        git = len(file.etag) == 40
        empty = (
            hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
            if git
            else hashlib.sha256()
        )
        with part.open("rb") as bytes_:
            digest = hashlib.file_digest(bytes_, lambda: empty).hexdigest()
        if digest != file.etag:
            part.unlink()
            what, why = (
                "its hash is not the one that the Hub states",
                "a proxy or a failing disk changed it",
            )
            fix = "start again; the damaged part was deleted"
            raise ModelError(
                f"{file.name} arrived damaged: {what}", where=file.url, why=why, fix=fix
            )
        part.replace(blob)


def _receive(file: RemoteFile, part: Path, advance: Advance, stop: threading.Event) -> None:
    """Append to the part until it has the file's size; ConnectionResetError where the server ends early."""
    with part.open("ab") as out:
        have = out.tell()
        if have >= file.size:
            return
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"} | (
            {"Range": f"bytes={have}-"} if have else {}
        )
        how: dict[str, Any] = {
            "follow_redirects": True,
            "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT,
        }
        with get_session().stream("GET", file.url, headers=headers, **how) as response:
            hf_raise_for_status(response)
            if have and response.status_code != 206:  # the server sends the whole file: start over
                out.truncate(0)
                advance(-have)
            # As they come: what is collected to a larger chunk is lost when the connection breaks.
            for chunk in response.iter_bytes():
                if stop.is_set():
                    return
                out.write(chunk)
                advance(len(chunk))
        if out.seek(0, 2) < file.size:
            raise ConnectionResetError(f"{file.name} ended early")
