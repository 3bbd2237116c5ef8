"""Upload files to a model repository, with the Hub's own client. A token is never shown."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import logging as hf_logging
from rich.filesize import decimal as size_text

from tunesmith.checkpoint.manifest import CARD, MANIFEST, check_sums
from tunesmith.checkpoint.model_card import is_hub_id
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_path
from tunesmith.hub.hub_calls import LOGIN, TRANSPORT, clean, http_status, repo_page
from tunesmith.inference.load_run import locate_run, undeleted
from tunesmith.tools.export.record import card_of, gguf_to_push
from tunesmith.units import count_of

log = logging.getLogger(__name__)


def push_files(
    files: Mapping[str, Path | bytes], to: str, *, public: bool, revision: str | None, message: str
) -> str:
    """Commit files to a repository, new if there is none; return the address of its page.

    Args:
        files: path in the repository -> the file or its contents. What is there unchanged is not
            sent again.
        to: `owner/name`, or a name of the token's own account.
        public: whether a new repository is public; an existing public one is refused
            without it.
        revision: the branch, new if there is none; None: main.

    UsageError where that is not possible: the files there are then as they were before.
    """
    if get_token() is None:
        raise UsageError("no Hub token found", where="HF_TOKEN", fix=LOGIN)
    hf_logging.set_verbosity_error()
    api = HfApi()
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]
    try:
        # A name without an owner is the user's own.
        repo = to if "/" in to else f"{api.whoami()['name']}/{to}"
        api.create_repo(repo, private=not public, exist_ok=True)
        # A repository that is there already keeps its visibility.
        private = api.repo_info(repo).private
        if not private and not public:
            raise UsageError(
                f"{repo} is public, but pushes are private by default",
                where=repo_page(repo),
                fix="add --public, or choose another repository: --to NAME",
            )
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        size = size_text(sum(addition.upload_info.size for addition in additions))
        visibility = "private" if private else "public"
        log.info(f"pushing {count_of(len(files), 'file')} ({size}) to {repo}, {visibility}")
        commit = api.create_commit(repo, additions, commit_message=message, revision=revision)
    except (TRANSPORT, HFValidationError, OSError) as error:
        raise _push_error(error, to) from error
    # The newest there is where nothing has changed.
    log.info(f"commit {commit.oid[:12]}")
    return repo_page(repo) + (f"/tree/{revision}" if revision else "")


def _push_error(error: Exception, to: str) -> UsageError:
    """Return an error that says what the Hub or the network refused, and what to do."""
    status = http_status(error)
    changed_meanwhile = (f"{to} was changed by someone else in the meantime", "start again")
    answers = {
        0: ("the Hub cannot be reached", "check the network (HTTPS_PROXY, HF_ENDPOINT)"),
        401: ("the Hub rejected the token", LOGIN),
        403: (
            f"the token may not write to {to}",
            f"create one with write access: {constants.ENDPOINT}/settings/tokens",
        ),
        409: changed_meanwhile,
        412: changed_meanwhile,
        429: ("too many requests to the Hub", "start again in a few minutes"),
    }
    what, fix = answers.get(
        status, (f"the Hub answers {status}", "fix the reported problem, or start again later")
    )
    if isinstance(error, OfflineModeIsEnabled):
        what, fix = "HF_HUB_OFFLINE forbids uploads", "HF_HUB_OFFLINE=0 tunesmith push ..."
    elif isinstance(error, HFValidationError):
        what = f"{to!r} is not a valid repository name"
        fix = "--to owner/name, of letters, digits, -, _ and ."
    return UsageError(what, where=constants.ENDPOINT, why=clean(error), fix=fix)


def push(run: str, *, to: str | None, public: bool, revision: str | None) -> str:
    """Upload a run, a model's folder or an exported file -> the address of its page."""
    path = Path(run)
    send = partial(push_files, public=public, revision=revision)
    exported = gguf_to_push(path)
    if exported is not None:
        name = path.resolve().name.removesuffix(".gguf")
        return send(exported, to or name, message=f"Push {name}")
    # No code of the model runs: its files are uploaded as they are.
    location = locate_run(run, trust_remote_code=True)
    folder = location.folder
    if folder is None:
        fix = "use a run directory, or a folder with model files"
        raise UsageError(f"{run} has no files to push", where=run, fix=fix)
    # Others load an adapter by the name of its base, which must then be one that they can fetch.
    if location.holds == "adapter" and not is_hub_id(location.base.name):
        what = "the adapter's base is a local folder"
        why = f"its files name {location.base.name}"
        merge = f"tunesmith merge {shell_path(run)} --output DIR, then tunesmith push DIR"
        fix = f"{merge}; or train with the base's Hub id"
        raise UsageError(what, where=str(folder), why=why, fix=fix)
    if location.run:
        # A checkpoint or final/ is named after its run.
        name = folder.parent.resolve().name
        message = f"Push {name}/{folder.name}"
    else:
        name = folder.resolve().name
        message = f"Push {name}"
    with undeleted(location):
        # A damaged file would spread: sums are compared before the first byte goes.
        check_sums(folder)
        files: dict[str, Path | bytes] = {}
        for path in sorted(folder.rglob("*")):
            file = path.relative_to(folder).as_posix()
            # Hidden files are the system's or an editor's; state/ holds the optimizer, which only a
            # resumed run reads.
            is_hidden = file.startswith(".") or "/." in file
            if path.is_file() and not (is_hidden or file.startswith("state/") or file == MANIFEST):
                files[file] = path
        # A plain model has the card of its makers, or none.
        if CARD not in files and location.holds != "base":
            files[CARD] = card_of(location).encode()
        return send(files, to or name, message=message)
