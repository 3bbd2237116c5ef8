"""Calls of huggingface_hub, with errors in a user's terms."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, errors, get_token
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    logging,
)

from tunesmith.config.names import nearest
from tunesmith.errors import MachineError, ModelError, TunesmithError, disk_fault, mask
from tunesmith.host import demo_model
from tunesmith.host.shell import shell_word
from tunesmith.model.shapes import SHAPES

DISK_FIX = (
    "free disk space (tunesmith fetch --list), or move the Hub cache to another disk: "
    "export HF_HOME=/path"
)
LOGIN = "hf auth login (or set HF_TOKEN)"
# Error numbers of a cache folder that cannot be written
UNWRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR)

# The root of the HTTP library's errors: httpx's up to huggingface_hub 1.x, httpx2's from 2.x on.
TRANSPORT: type[Exception] = errors.HfHubHTTPError.__mro__[1]


def repo_page(repo: str, repo_type: str = "model") -> str:
    """The address of a repository's page."""
    folder = "datasets/" if repo_type == "dataset" else ""
    return f"{constants.ENDPOINT}/{folder}{repo}"


def http_status(error: Exception) -> int:
    """Return the status of the Hub's answer, or 0 if there was none."""
    return error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0


@contextmanager
def hub_calls(
    repo: str, revision: str | None = None, repo_type: str = "model", *, bars: bool = False
) -> Iterator[None]:
    """Run calls of huggingface_hub without its warnings, and raise their errors as `hub_error`.

    Args:
        bars: whether huggingface_hub draws its progress bars if stderr is a terminal.
    """
    level = logging.get_verbosity()
    hides_bars = not bars and not are_progress_bars_disabled()
    logging.set_verbosity(logging.ERROR)
    if hides_bars:
        disable_progress_bars()
    try:
        yield
    # hf_xet raises RuntimeError, HFValidationError is a ValueError.
    except (TRANSPORT, OSError, RuntimeError, ValueError) as error:
        raise hub_error(error, repo, revision, repo_type) from error
    finally:
        logging.set_verbosity(level)
        if hides_bars:
            enable_progress_bars()


def hub_error(
    error: Exception, repo: str, revision: str | None, repo_type: str = "model"
) -> TunesmithError:
    """Return the error for a user: what the Hub, the network or the disk refused, and the fix."""
    if isinstance(error, errors.HFValidationError):
        return names_no_model(repo)
    page = repo_page(repo, repo_type)
    status = http_status(error)
    why = clean(error)
    if not status:
        return _local_error(error, repo, page)
    what = f"the Hub answers {status}"
    fix = "try again later; finished downloads are kept"
    cause = ""
    # A GatedRepoError is a RepositoryNotFoundError too.
    is_missing = isinstance(error, errors.RepositoryNotFoundError)
    is_missing = is_missing and not isinstance(error, errors.GatedRepoError)
    if isinstance(error, errors.RevisionNotFoundError):
        what = f"{repo} has no revision {revision!r}"
        fix = f"use one from {page}/tree/main"
    elif is_missing:
        what = f"no {repo_type} {repo} is visible to you on the Hub"
        fix = f"check the name; for a private one log in: {LOGIN}"
        why = "it does not exist, or it is private and your token has no access"
    elif status in (401, 403) and not isinstance(error, errors.DisabledRepoError):
        account = "your token's account" if _token() else "you (no token found)"
        what = f"{repo} is gated, and access has not been granted to {account}"
        fix = (
            f"ask for access on {page}, then {LOGIN}; a fine-grained token needs read access to "
            "gated repositories"
        )
        cause = "licence"
    return ModelError(what, where=page, why=why, fix=fix, cause=cause)


def _local_error(error: Exception, repo: str, page: str) -> TunesmithError:
    """Return the error of a call that got no answer from the Hub."""
    full_disk = disk_fault(error)
    if full_disk or (isinstance(error, OSError) and error.errno in UNWRITABLE):
        return MachineError(
            f"the Hub's cache cannot be written: {full_disk or 'no access'}",
            where=constants.HF_HUB_CACHE,
            why=clean(error),
            fix=DISK_FIX,
            cause="disk" if full_disk else "",
        )
    if constants.HF_HUB_OFFLINE:
        return ModelError(
            f"{repo} is not complete in the Hub's cache, and HF_HUB_OFFLINE forbids downloads",
            where=constants.HF_HUB_CACHE,
            fix=f"HF_HUB_OFFLINE=0 tunesmith fetch {shell_word(repo)}",
        )
    return ModelError(
        f"the Hub cannot be reached for {repo}",
        where=page,
        why=f"{type(error).__name__}: {clean(error)}",
        fix="check the network (HTTPS_PROXY, HF_ENDPOINT) and start again; "
        "finished downloads are kept",
    )


def names_no_model(name: str) -> ModelError:
    """Return the error for a name that is no folder and no Hub id; it proposes a similar name."""
    models = {repo.partition("/")[2]: repo for shape in SHAPES.values() for repo in shape.models}
    near = nearest(name, [demo_model.DEMO_NAME, *models])
    fix = "use an existing path, or owner/name as on the Hub"
    if near == demo_model.DEMO_NAME:
        fix = "tunesmith train --model demo --data FILE: it needs no download"
    elif near:
        fix = f"did you mean {models[near]}? Or {fix}"
    return ModelError(
        f"{name!r} is neither a folder, a .gguf file, nor a Hub id", where="model.name", fix=fix
    )


def _token() -> str | None:
    try:
        return get_token()
    # HF_HOME is a file or cannot be read. Writing to the cache reports the same.
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
