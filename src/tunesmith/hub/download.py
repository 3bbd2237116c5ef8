"""Bring files from the Hub into its cache, so that a cut download goes on where it stopped.

Bytes arrive over plain HTTP in a part file beside the cache's blobs and move into place when their hash is the one that
the Hub states. huggingface_hub's own download (2.x) writes to a file of its process and deletes it when the process
fails, so that a 5 GB shard cut at 4.9 GB starts over; the safety that bought, on file systems whose locks do nothing, is
here given by the hash. The cache's layout is the documented one: `blobs/<etag>`, then huggingface_hub makes the snapshot.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from huggingface_hub import constants, get_session, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from tunesmith.errors import MachineError, ModelError, TunesmithError

CHUNK = 1 << 20
TRIES = 5  # in a row that bring no byte
PAUSE = 1.0  # seconds before the second try; doubles
WORKERS = 4
AGAIN = (408, 429, 500, 502, 503, 504)

# The root of the HTTP library's errors: httpx's up to huggingface_hub 1.x, httpx2's from 2.x on.
TRANSPORT: type[Exception] = HfHubHTTPError.__mro__[1]

T = TypeVar("T")


@dataclass(frozen=True)
class Remote:
    """A file on the Hub: where it is, its size in bytes, and its etag, which names its blob in the cache."""

    name: str
    url: str
    size: int
    etag: str


def page(repo: str, kind: str = "model") -> str:
    """The address of a repository's page."""
    return f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"


def _token() -> str | None:
    try:
        return get_token()
    except OSError:  # HF_HOME is a file, or may not be read; the same error names it where it is written to
        return None


def clean(error: BaseException | str) -> str:
    """An error in one line, without tokens and without the query of an address, which may carry a signature."""
    text = " ".join(str(error).split())
    text = re.sub(r"hf_[A-Za-z0-9]{4,}", "hf_***", re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", text))
    token = _token()
    return (text.replace(token, "***") if token else text)[:300]


def refused(error: Exception, repo: str, revision: str | None, kind: str = "model") -> TunesmithError:
    """Say in a user's terms why the Hub did not give what was asked for."""
    if isinstance(error, HfHubHTTPError):
        return _denied(error, repo, revision, kind)
    cache = Path(constants.HF_HUB_CACHE)
    if isinstance(error, HFValidationError):
        return ModelError(
            f"{repo!r} is neither a folder, a .gguf file, nor a Hub id",
            where="model.name",
            fix="give an existing path, or owner/name as on the Hub",
        )
    if isinstance(error, OfflineModeIsEnabled):
        return ModelError(
            f"{repo} is not whole in the Hub's cache, and HF_HUB_OFFLINE forbids to fetch it",
            where=str(cache),
            fix=f"HF_HUB_OFFLINE=0 tunesmith fetch {repo}",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_room(repo, cache)
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
        return MachineError(
            "the Hub's cache cannot be written",
            where=str(cache),
            why=clean(error),
            fix="point HF_HOME at a folder of yours: export HF_HOME=/path",
        )
    return ModelError(
        f"the Hub cannot be reached for {repo}",
        where=page(repo, kind),
        why=f"{type(error).__name__}: {clean(error)}",
        fix="check the network (HTTPS_PROXY, HF_ENDPOINT) and start again; what has arrived is kept",
    )


def _denied(error: HfHubHTTPError, repo: str, revision: str | None, kind: str) -> ModelError:
    """The same for an answer of the Hub that is an error, most special first (a gated repository is a missing one too)."""
    address, login = page(repo, kind), "log in: hf auth login (or set HF_TOKEN)"
    known, status = _token() is not None, error.response.status_code
    ask = f"ask for access on {address}"
    if isinstance(error, GatedRepoError):
        whom = "the account of your token" if known else "you: there is no token"
        what, why, fix = (
            f"{repo} is gated, and access has not been granted to {whom}", "", ask if known else f"{ask}, then {login}"
        )  # fmt: skip
    elif isinstance(error, RevisionNotFoundError):
        what, why, fix = f"{repo} has no revision {revision!r}", "", f"take one from {address}/tree/main"
    elif isinstance(error, DisabledRepoError):
        what, why, fix = f"{repo} was disabled on the Hub", "", "take another model"
    elif isinstance(error, RepositoryNotFoundError):
        what = f"there is no {kind} {repo} on the Hub that you can see"
        why = "it does not exist, or it is private" + ("" if known else " and there is no token")
        fix = f"check the name; for a private one {login}"
    elif status in (401, 403):
        what = f"the Hub refuses access to {repo} ({status})"
        why = "the token is not valid, or has no right to read this repository" if known else "there is no token"
        fix = f"{login}; a fine-grained token needs read access to gated repositories"
    else:
        what, why, fix = f"the Hub answers {status}", clean(error), "start again later; what has arrived is kept"
    return ModelError(what, where=address, why=why, fix=fix)


def no_room(name: str, folder: Path, needed: int = 0, free: int = 0) -> MachineError:
    """The error for a full disk; sizes in bytes, 0 where they are not known."""
    gib = 1 << 30
    figures = f": {needed / gib:.2f} GiB to come, {free / gib:.2f} GiB free, {(needed - free) / gib:.2f} GiB short"
    return MachineError(
        f"no room on the disk for {name}{figures if needed else ''}",
        where=str(folder),
        fix="make room (tunesmith fetch --list shows what the cache holds), or put the cache on another disk: "
        "export HF_HOME=/path",
    )


def patiently(call: Callable[[], T]) -> T:
    """Call until it answers: busy and failing servers and broken connections are tried again, with longer pauses."""
    for attempt in range(TRIES):
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in AGAIN or attempt == TRIES - 1:
                raise
        except TRANSPORT:
            if attempt == TRIES - 1:
                raise
        time.sleep(PAUSE * 2**attempt)
    raise AssertionError("unreachable")


def part_of(blob: Path) -> Path:
    """Where the bytes of an unfinished blob are kept; the ending is the one that tools for the cache know."""
    return blob.with_name(f"{blob.name}.tunesmith.incomplete")


def download(files: Sequence[Remote], storage: Path, advance: Callable[[int], None]) -> None:
    """Bring files into `storage/blobs`, several at a time.

    Args:
        files: what to bring; those whose blob is there are passed over.
        storage: the repository's folder in the cache.
        advance: told of bytes as they arrive (negative: thrown away), from several threads.

    Raises:
        the first error of any file; the parts of all stay.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(WORKERS) as pool:
        jobs = [pool.submit(_bring, file, storage, advance, stop) for file in files]
        try:
            wait(jobs, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # ctrl-C or an error: the others end at their next chunk and keep their parts
            for job in jobs:
                job.cancel()
    for job in jobs:
        if not job.cancelled():
            job.result()


def _bring(file: Remote, storage: Path, advance: Callable[[int], None], stop: threading.Event) -> None:
    blob = storage / "blobs" / file.etag
    lock = storage.parent / ".locks" / storage.name / f"{file.etag}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    part = part_of(blob)
    with FileLock(lock):
        idle = 0
        while not blob.exists():
            before = part.stat().st_size if part.exists() else 0
            try:
                if _receive(file, part, advance, stop):
                    part.replace(blob)
                    return
                if stop.is_set():
                    return
            except HfHubHTTPError as error:
                if error.response.status_code not in AGAIN:
                    raise
                failure: Exception = error
            except TRANSPORT as error:
                failure = error
            else:
                failure = ConnectionError(f"{file.name} ended early")
            came = part.exists() and part.stat().st_size > before
            idle = 0 if came else idle + 1
            if idle >= TRIES:
                raise failure
            time.sleep(PAUSE * 2 ** max(0, idle - 1))


def _receive(file: Remote, part: Path, advance: Callable[[int], None], stop: threading.Event) -> bool:
    """Take bytes from where the part ends; True when the file is whole and its hash is the Hub's."""
    digest = _digest(file)
    have = 0
    if part.exists():
        with part.open("rb") as f:
            while chunk := f.read(CHUNK):
                digest.update(chunk)
                have += len(chunk)
    if have < file.size:
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with (
            get_session().stream(
                "GET", file.url, headers=headers, follow_redirects=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            ) as response,
            part.open("ab") as f,
        ):
            hf_raise_for_status(response)
            if have and response.status_code != 206:  # the server gives the whole file: begin it again
                f.truncate(0)
                advance(-have)
                have, digest = 0, _digest(file)
            for (
                chunk
            ) in response.iter_bytes():  # as they come: what is collected to a size is lost when the line breaks
                if stop.is_set():
                    return False
                f.write(chunk)
                digest.update(chunk)
                have += len(chunk)
                advance(len(chunk))
    if have < file.size:
        return False
    if have > file.size or (len(file.etag) in (40, 64) and digest.hexdigest() != file.etag):
        part.unlink()
        raise ModelError(
            f"{file.name} arrived damaged: its hash is not the one that the Hub states",
            where=file.url,
            why="a proxy or a failing disk changed it",
            fix="start again; the damaged part was deleted",
        )
    return True


def _digest(file: Remote) -> hashlib._Hash:
    """The hash that an etag is: sha256 for large files; git's blob hash (sha1 of a header and the bytes) for small."""
    if len(file.etag) == 40:
        return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    return hashlib.sha256()


def arrived(file: Remote, storage: Path) -> int:
    """Bytes of a file that the cache holds already: all of them, those of its part, or 0."""
    blob = storage / "blobs" / file.etag
    if blob.exists():
        return file.size
    try:
        return os.stat(part_of(blob)).st_size
    except FileNotFoundError:
        return 0
