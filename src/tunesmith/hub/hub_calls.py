"""Calls of huggingface_hub: quiet, tried again while the network fails, with errors in a user's
terms."""

import difflib
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
from tunesmith.host import demo_model
from tunesmith.host.shell import shell_word
from tunesmith.model.shapes import SHAPES

TRIES = 5  # in a row without progress
PAUSE = 1.0  # seconds before the second try; doubles
TRANSIENT = (408, 429, 500, 502, 503, 504)
DISK_FIX = (
    "free disk space (tunesmith fetch --list), or move the Hub cache to another disk: "
    "export HF_HOME=/path"
)
LOGIN = "hf auth login (or set HF_TOKEN)"

# The root of the HTTP library's errors: httpx's up to huggingface_hub 1.x, httpx2's from 2.x on.
TRANSPORT: type[Exception] = errors.HfHubHTTPError.__mro__[1]

T = TypeVar("T")


def repo_page(repo: str, repo_type: str = "model") -> str:
    """The address of a repository's page."""
    folder = "datasets/" if repo_type == "dataset" else ""
    return f"{constants.ENDPOINT}/{folder}{repo}"


def retry(call: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """Call until it succeeds, with a longer pause after each busy server and broken connection.

    When a failed call got further, by the number that `progress` gives, the tries count anew.
    """
    failures = 0
    reached = progress()
    while True:
        try:
            return call()
        except (TRANSPORT, ConnectionResetError) as error:
            if http_status(error) not in (0, *TRANSIENT):
                raise
            previous = reached
            reached = progress()
            failures = 1 if reached > previous else failures + 1
            if failures >= TRIES:
                raise
        time.sleep(PAUSE * 2 ** (failures - 1))


def http_status(error: Exception) -> int:
    """The status of the Hub's answer; 0 where there was none."""
    return error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0


@contextmanager
def hub_calls(repo: str, revision: str | None = None, repo_type: str = "model") -> Iterator[None]:
    """Silence huggingface_hub's bars and warnings inside, and raise its errors as ours; see
    `hub_error`."""
    level = logging.get_verbosity()
    had_bars = not are_progress_bars_disabled()
    logging.set_verbosity(logging.ERROR)
    if had_bars:
        disable_progress_bars()
    try:
        yield
    except (TRANSPORT, errors.HFValidationError, OSError) as error:
        raise hub_error(error, repo, revision, repo_type) from error
    finally:
        logging.set_verbosity(level)
        if had_bars:
            enable_progress_bars()


def hub_error(
    error: Exception, repo: str, revision: str | None, repo_type: str = "model"
) -> TunesmithError:
    """The error for a user: what the Hub, the network or the disk refused, and what to do."""
    cache_error = _cache_error(error, repo)
    if cache_error is not None:
        return cache_error
    if isinstance(error, errors.HfHubHTTPError):
        refusal = _refusal(error, repo, revision, repo_type)
    elif isinstance(error, errors.OfflineModeIsEnabled) or _is_missing_offline(error):
        refusal = ModelError(
            f"{repo} is not complete in the Hub's cache, and HF_HUB_OFFLINE forbids downloads",
            where=constants.HF_HUB_CACHE,
            fix=f"HF_HUB_OFFLINE=0 tunesmith fetch {shell_word(repo)}",
        )
    elif isinstance(error, errors.HFValidationError):
        return names_no_model(repo)
    else:
        refusal = ModelError(
            f"the Hub cannot be reached for {repo}",
            where=repo_page(repo, repo_type),
            why=f"{type(error).__name__}: {clean(error)}",
            fix="check the network (HTTPS_PROXY, HF_ENDPOINT) and start again; "
            "finished downloads are kept",
        )
    # A name without an owner counts as a mistyped path.
    if repo_type == "model" and "/" not in repo:
        return names_no_model(repo, refusal.why, refusal.cause)
    return refusal


def names_no_model(name: str, why: str = "", cause: str = "") -> ModelError:
    """Return the error for a name that is no folder and no Hub id; it proposes similar names."""
    models = {repo.partition("/")[2]: repo for shape in SHAPES.values() for repo in shape.models}
    folders = [path.parent.name for path in Path().glob("*/config.json")]
    known = {word.lower(): word for word in (*folders, *map(str, Path().glob("*.gguf")))}
    known |= {word.lower(): repo for word, repo in models.items()}
    near = [known[word] for word in difflib.get_close_matches(name.lower(), known)]
    fix = "use an existing path, or owner/name as on the Hub"
    if near:
        fix = f"did you mean {' or '.join(near)}? Or {fix}"
    if difflib.get_close_matches(name.lower(), [demo_model.DEMO_NAME]):
        fix = "tunesmith train --model demo --data FILE: it needs no download"
    return ModelError(
        f"{name!r} is neither a folder, a .gguf file, nor a Hub id",
        where="model.name",
        why=why,
        fix=fix,
        cause=cause,
    )


def _refusal(
    error: errors.HfHubHTTPError, repo: str, revision: str | None, repo_type: str
) -> ModelError:
    """The error where the Hub answered that it does not hand out the repository."""
    page = repo_page(repo, repo_type)
    login = f"log in: {LOGIN}"
    has_token = _token() is not None
    why = ""
    cause = ""
    # Before RepositoryNotFoundError, which a GatedRepoError is too.
    if isinstance(error, errors.GatedRepoError):
        account = "your token's account" if has_token else "you (no token found)"
        what = f"{repo} is gated, and access has not been granted to {account}"
        fix = f"ask for access on {page}"
        if not has_token:
            fix += f", then {login}"
        cause = "licence"
    elif isinstance(error, errors.RevisionNotFoundError):
        what = f"{repo} has no revision {revision!r}"
        fix = f"use one from {page}/tree/main"
    elif isinstance(error, errors.DisabledRepoError):
        what = f"{repo} was disabled on the Hub"
        fix = "use another model"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = f"no {repo_type} {repo} is visible to you on the Hub"
        why = "it does not exist, or it is private"
        if not has_token:
            why += " and there is no token"
        fix = f"check the name; for a private one {login}"
    elif http_status(error) in (401, 403):
        what = f"the Hub denies access to {repo} ({http_status(error)})"
        why = "there is no token"
        if has_token:
            why = "the token is invalid, or has no permission to read this repository"
        fix = f"{login}; a fine-grained token needs read access to gated repositories"
        cause = "licence"
    else:
        what = f"the Hub answers {http_status(error)}"
        why = clean(error)
        fix = "try again later; finished downloads are kept"
    return ModelError(what, where=page, why=why, fix=fix, cause=cause)


def _cache_error(error: Exception, repo: str) -> MachineError | None:
    """The error where the cache's disk is full or may not be written; None for other errors."""
    if isinstance(error, errors.HfHubHTTPError):
        return None
    fault = disk_fault(error)
    if fault:
        return MachineError(
            f"{repo} cannot be stored: {fault}",
            where=constants.HF_HUB_CACHE,
            why=clean(error),
            fix=DISK_FIX,
            cause="disk",
        )
    denied = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR)
    if isinstance(error, OSError) and error.errno in denied:
        return MachineError(
            "the Hub's cache cannot be written",
            where=constants.HF_HUB_CACHE,
            why=clean(error),
            fix="set HF_HOME to a writable folder: export HF_HOME=/path",
        )
    return None


def _is_missing_offline(error: Exception) -> bool:
    """Tell whether a download of several files found no cache and was not allowed to the Hub."""
    return constants.HF_HUB_OFFLINE and isinstance(error, errors.LocalEntryNotFoundError)


def _token() -> str | None:
    try:
        return get_token()
    # HF_HOME is a file, or may not be read; writing to the cache reports the same.
    except OSError:
        return None


def clean(error: BaseException | str) -> str:
    """An error in one line, without tokens and without the query of an address, which may carry a
    signature."""
    one_line = " ".join(str(error).split())
    text = mask(re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", one_line))
    token = _token()
    if token:
        text = text.replace(token, "***")
    return text[:300]
