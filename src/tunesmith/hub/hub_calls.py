"""Calls of huggingface_hub: without its bars, tried again while the network fails, and with errors in a user's terms."""

import errno
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants, errors, get_token
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    logging,
)

from tunesmith.errors import MachineError, ModelError, TunesmithError, disk_fault, mask
from tunesmith.host.shell import shell_word

TRIES = 5  # in a row without progress
PAUSE = 1.0  # seconds before the second try; doubles
TRANSIENT = (408, 429, 500, 502, 503, 504)
DISK_FIX = "make room (tunesmith fetch --list), or put the Hub's cache on another disk: export HF_HOME=/path"

# The root of the HTTP library's errors: httpx's up to huggingface_hub 1.x, httpx2's from 2.x on.
TRANSPORT: type[Exception] = errors.HfHubHTTPError.__mro__[1]

T = TypeVar("T")


def repo_page(repo: str, kind: str = "model") -> str:
    """The address of a repository's page."""
    return f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"


def retry(call: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """Call until it succeeds, pausing longer after each busy or failing server and each broken connection.

    When a failed call got further, by the figure that `progress` gives, the count of tries starts anew.
    """
    failures, before = 0, progress()
    while True:
        try:
            return call()
        except (TRANSPORT, ConnectionResetError) as error:
            if (
                isinstance(error, errors.HfHubHTTPError)
                and error.response.status_code not in TRANSIENT
            ):
                raise
            failures, before = 1 if (reached := progress()) > before else failures + 1, reached
            if failures >= TRIES:
                raise
        time.sleep(PAUSE * 2 ** (failures - 1))


@contextmanager
def hub_calls(repo: str, revision: str | None = None, kind: str = "model") -> Iterator[None]:
    """Silence huggingface_hub's bars and warnings inside, and raise its errors as ours; see `hub_error`."""
    level, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity(logging.ERROR)
    if bars:
        disable_progress_bars()
    try:
        yield
    except (TRANSPORT, errors.HFValidationError, OSError) as error:
        raise hub_error(error, repo, revision, kind) from error
    finally:
        logging.set_verbosity(level)
        if bars:
            enable_progress_bars()


def hub_error(
    error: Exception, repo: str, revision: str | None, kind: str = "model"
) -> TunesmithError:
    """The error for a user: what the Hub, the network or the disk refused, and what to do."""
    page, store, why, cause = repo_page(repo, kind), str(Path(constants.HF_HUB_CACHE)), "", ""
    token, login = _token() is not None, "log in: hf auth login (or set HF_TOKEN)"
    where, status = (
        page,
        error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0,
    )
    if isinstance(error, errors.GatedRepoError):  # before RepositoryNotFoundError, which it is too
        whom = "the account of your token" if token else "you: there is no token"
        what = f"{repo} is gated, and access has not been granted to {whom}"
        fix, cause = f"ask for access on {page}" + ("" if token else f", then {login}"), "licence"
    elif isinstance(error, errors.RevisionNotFoundError):
        what, fix = f"{repo} has no revision {revision!r}", f"take one from {page}/tree/main"
    elif isinstance(error, errors.DisabledRepoError):
        what, fix = f"{repo} was disabled on the Hub", "take another model"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what, fix = (
            f"no {kind} {repo} is visible to you on the Hub",
            f"check the name; for a private one {login}",
        )
        why = "it does not exist, or it is private" + ("" if token else " and there is no token")
    elif status in (401, 403):
        what = f"the Hub refuses access to {repo} ({status})"
        why = (
            "the token is not valid, or has no right to read this repository"
            if token
            else "there is no token"
        )
        fix, cause = (
            f"{login}; a fine-grained token needs read access to gated repositories",
            "licence",
        )
    elif status:
        what, why, fix = (
            f"the Hub answers {status}",
            clean(error),
            "start again later; what has arrived is kept",
        )
    elif isinstance(error, errors.HFValidationError):
        what, where = f"{repo!r} is neither a folder, a .gguf file, nor a Hub id", "model.name"
        fix = "give an existing path, or owner/name as on the Hub"
    elif isinstance(error, errors.OfflineModeIsEnabled) or _is_missing_offline(error):
        what, where = (
            f"{repo} is not complete in the Hub's cache, and HF_HUB_OFFLINE forbids downloads",
            store,
        )
        fix = f"HF_HUB_OFFLINE=0 tunesmith fetch {shell_word(repo)}"
    elif fault := disk_fault(error):
        return MachineError(
            f"{repo} cannot be stored: {fault}",
            where=store,
            why=clean(error),
            fix=DISK_FIX,
            cause="disk",
        )
    elif isinstance(error, OSError) and error.errno in (
        errno.EACCES,
        errno.EROFS,
        errno.EPERM,
        errno.ENOTDIR,
    ):
        fix = "point HF_HOME at a folder of yours: export HF_HOME=/path"
        return MachineError(
            "the Hub's cache cannot be written", where=store, why=clean(error), fix=fix
        )
    else:
        what, why = (
            f"the Hub cannot be reached for {repo}",
            f"{type(error).__name__}: {clean(error)}",
        )
        fix = (
            "check the network (HTTPS_PROXY, HF_ENDPOINT) and start again; what has arrived is kept"
        )
    if kind == "model" and "/" not in repo:
        what, where = f"{repo!r} is neither a folder, a .gguf file, nor a Hub id", "model.name"
        fix = "give an existing path, or owner/name as on the Hub"
    return ModelError(what, where=where, why=why, fix=fix, cause=cause)


def _is_missing_offline(error: Exception) -> bool:
    """Whether a download of several files found nothing in the cache and was not allowed to ask the Hub."""
    return constants.HF_HUB_OFFLINE and isinstance(error, errors.LocalEntryNotFoundError)


def _token() -> str | None:
    try:
        return get_token()
    except OSError:  # HF_HOME is a file, or may not be read; writing to the cache reports the same
        return None


def clean(error: BaseException | str) -> str:
    """An error in one line, without tokens and without the query of an address, which may carry a signature."""
    text = mask(re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", " ".join(str(error).split())))
    token = _token()
    return (text.replace(token, "***") if token else text)[:300]
