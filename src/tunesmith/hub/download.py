"""Download large files into the Hub's cache so that an interrupted download resumes.

`snapshot_download` of huggingface_hub brings the small files and links the snapshot. It does not
bring the large ones, because it (2.4) neither goes on with a file that an earlier process began nor
compares hashes: killed at 90 % of a 500 MB file, it fetched 500 MB again and left 440 MB behind;
this module fetched 49 MB. Here the bytes arrive in a part file beside the cache's blobs, which
becomes the blob `blobs/<sha256>` when its hash is the one that the Hub states.
"""

import hashlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants, get_session
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, tqdm
from rich.filesize import decimal as size_text

from tunesmith.errors import ModelError
from tunesmith.host.streams import is_terminal
from tunesmith.hub.hub_calls import retry

log = logging.getLogger(__name__)

WORKERS = 4
SECONDS_BETWEEN_LINES = 10.0

# So many bytes arrived (negative: thrown away); called from several threads
Advance = Callable[[int], object]


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub.

    Attributes:
        size: in bytes.
        etag: names its blob in the cache: the SHA-256 of a large file, git's hash of a small one.
    """

    name: str
    url: str
    size: int
    etag: str

    @property
    def is_large(self) -> bool:
        """Tell whether the Hub keeps it outside git."""
        return len(self.etag) == hashlib.sha256().digest_size * 2

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
    """Shows the bytes of a fetch: a bar if stderr is a terminal, else a line every ten seconds.

    draws_bar: False: lines on a terminal too.
    """

    def __init__(self, *, draws_bar: bool = True) -> None:
        self._has_bar = draws_bar and is_terminal(sys.stderr)

    @contextmanager
    def transfer(self, what: str, total: int, received: int) -> Iterator[Advance]:
        """While bytes of `what` arrive: `total` of them, of which `received` are there already."""
        if self._has_bar:
            with tqdm(
                desc=what, total=total, initial=received, unit="B", unit_scale=True, file=sys.stderr
            ) as bar:
                yield bar.update
            return
        last_line = time.monotonic()

        def advance(count: int) -> None:
            nonlocal received, last_line
            received += count
            if time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                log.info(f"  {size_text(received)} of {size_text(total)}")

        there = f", {size_text(received)} already downloaded" if received else ""
        log.info(f"fetching {what}: {size_text(total)}{there}")
        yield advance


def download_large_files(files: Sequence[RemoteFile], storage: Path, advance: Advance) -> None:
    """Download the large ones of `files` to the blobs of `storage`, a repository's folder in the
    cache; those that are there are skipped.

    Raises the first error of any file; the parts of all stay.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(WORKERS) as pool:
        jobs = [
            pool.submit(_download_blob, file, storage, advance, stop)
            for file in files
            if file.is_large
        ]
        try:
            for job in as_completed(jobs):
                job.result()
        finally:
            # Ctrl-C or an error: the others end at their next chunk and keep their parts.
            stop.set()
            pool.shutdown(cancel_futures=True)


def _download_blob(
    file: RemoteFile, storage: Path, advance: Advance, stop: threading.Event
) -> None:
    blob = storage / "blobs" / file.etag
    part = file.part(storage)
    # The lock of huggingface_hub, whose other processes may download the same file.
    lock = storage.parent / ".locks" / storage.name / f"{file.etag}.lock"
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if blob.exists():
            return
        retry(lambda: _receive(file, part, advance, stop), lambda: file.arrived(storage))
        if stop.is_set():
            return
        with part.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != file.etag:
            part.unlink()
            raise ModelError(
                f"{file.name} is damaged: its hash differs from the Hub's",
                where=file.url,
                why="a proxy or a failing disk may have changed it",
                fix="start again; the damaged part was deleted",
            )
        part.replace(blob)


def _receive(file: RemoteFile, part: Path, advance: Advance, stop: threading.Event) -> None:
    """Append to the part until it has the file's size.

    ConnectionResetError where the server ends early.
    """
    with part.open("ab") as stream:
        offset = stream.tell()
        if offset >= file.size:
            return
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with get_session().stream(
            "GET",
            file.url,
            headers=headers,
            follow_redirects=True,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        ) as response:
            hf_raise_for_status(response)
            # Without 206 the server ignores the range and sends the whole file.
            if offset and response.status_code != 206:
                stream.truncate(0)
                advance(-offset)
            # Chunks as they come: one that is still being collected to a fixed size is lost when
            # the connection breaks.
            for chunk in response.iter_bytes():
                if stop.is_set():
                    return
                stream.write(chunk)
                advance(len(chunk))
        if stream.seek(0, 2) < file.size:
            raise ConnectionResetError(f"{file.name} is incomplete")
