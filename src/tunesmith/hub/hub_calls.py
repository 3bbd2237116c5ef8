"""Context manager for calls of huggingface_hub. It converts the errors to messages for the user."""

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
from tunesmith.model.arch.shapes import SHAPE_OF_MODEL

DISK_FIX = (
    "free disk space (`hf cache ls` shows the models), or move the Hub cache to another "
    "disk with `export HF_HOME=/path`"
)
LOGIN = "run `hf auth login` (or set HF_TOKEN)"
# Values of errno that mean that the cache folder is not writable.
UNWRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR)

# Base class of all errors of the HTTP library. huggingface_hub 1.x uses httpx, and 2.x uses httpx2.
TRANSPORT: type[Exception] = errors.HfHubHTTPError.__mro__[1]


def repo_page(repo: str, repo_type: str = "model") -> str:
    """Return the URL of a repository's page."""
    folder = "datasets/" if repo_type == "dataset" else ""
    return f"{constants.ENDPOINT}/{folder}{repo}"


@contextmanager
def hub_calls(
    repo: str, revision: str | None = None, repo_type: str = "model", *, bars: bool = False
) -> Iterator[None]:
    """Run calls of huggingface_hub without its warnings, and convert its errors with `hub_error`.

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
    # RuntimeError is raised by hf_xet. ValueError is the base class of HFValidationError.
    except (TRANSPORT, OSError, RuntimeError, ValueError) as error:
        raise hub_error(error, repo, revision, repo_type) from error
    finally:
        logging.set_verbosity(level)
        if hides_bars:
            enable_progress_bars()


def hub_error(
    error: Exception, repo: str, revision: str | None, repo_type: str = "model"
) -> TunesmithError:
    """Convert an error of huggingface_hub to a message with the Hub's reason and a fix."""
    if isinstance(error, errors.HFValidationError):
        return unknown_model_name(repo)
    # `snapshot_download` looks for a copy in the cache if the Hub answers with an error.
    if isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__
    full_disk = disk_fault(error)
    if full_disk or (isinstance(error, OSError) and error.errno in UNWRITABLE):
        return MachineError(
            f"the Hub's cache cannot be written: {full_disk or 'no access'}",
            where=constants.HF_HUB_CACHE,
            why=clean(error),
            fix=DISK_FIX,
            cause="disk" if full_disk else "",
        )
    page = repo_page(repo, repo_type)
    what = f"{repo} cannot be read from the Hub"
    fix = "check the network (HTTPS_PROXY, HF_ENDPOINT), or try again later"
    cause = ""
    if isinstance(error, errors.RevisionNotFoundError):
        what = f"{repo} has no revision {revision!r}"
        fix = f"use a revision that is listed on {page}/tree/main"
    elif isinstance(error, errors.GatedRepoError):
        fix = f"ask for access on {page}, then {LOGIN}"
        cause = "licence"
    elif isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403, 404):
        fix = f"check the name; if the repository is private, {LOGIN}"
    elif constants.HF_HUB_OFFLINE:
        fix = f"run `HF_HUB_OFFLINE=0 tunesmith fetch {shell_word(repo)}`"
    return ModelError(what, where=page, why=clean(error), fix=fix, cause=cause)


def unknown_model_name(name: str) -> ModelError:
    """Build the error for a name that is neither a folder nor a Hub id.

    The fix proposes a known model with a similar name.
    """
    models = {repo.partition("/")[2]: repo for repo in SHAPE_OF_MODEL}
    near = nearest(name, [demo_model.DEMO_NAME, *models])
    fix = "use an existing path, or owner/name as on the Hub"
    if near == demo_model.DEMO_NAME:
        fix = "run `tunesmith train --model demo --data FILE`, which needs no download"
    elif near:
        fix = f"did you mean {models[near]}? If not, {fix}"
    return ModelError(f"{name!r} is neither a folder nor a Hub id", where="model.name", fix=fix)


def _token() -> str | None:
    try:
        return get_token()
    # HF_HOME may be a file or not readable. Ignore the error now: the later write to the cache
    # reports it.
    except OSError:
        return None


def clean(error: BaseException | str) -> str:
    """Return an error message in one line, without secrets.

    Access tokens are masked. The query parts of URLs are removed, because they can contain a
    signature.
    """
    one_line = " ".join(str(error).split())
    text = mask(re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", one_line))
    token = _token()
    if token:
        text = text.replace(token, "***")
    return text[:300]
