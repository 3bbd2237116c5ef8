"""Upload of model files to the Hugging Face Hub with huggingface_hub. Tokens are never printed."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import logging as hf_logging
from rich.filesize import decimal as size_text

from tunesmith.answers.load_run import locate_run, raise_if_deleted
from tunesmith.checkpoint.manifest import CARD, MANIFEST, check_sums
from tunesmith.checkpoint.model_card import is_hub_id
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_path
from tunesmith.hub.hub_calls import LOGIN, TRANSPORT, clean, http_status, repo_page
from tunesmith.tools.export.record import gguf_to_push, make_card
from tunesmith.units import count_of

log = logging.getLogger(__name__)


def push_files(
    files: Mapping[str, Path | bytes], to: str, *, public: bool, revision: str | None, message: str
) -> str:
    """Commit files to a repository on the Hub, and return the URL of its page.

    The repository is created if it does not exist.

    Args:
        files: path in the repository -> local file or contents. Files that are already in the
            repository with the same contents are not uploaded again.
        to: `owner/name`, or only a name for a repository of the token's account.
        public: whether a new repository is public. If False, an existing public repository is
            refused.
        revision: the branch, which is created if it does not exist; None: main.
        message: the commit message.

    Raise UsageError if the upload fails. The files in the repository are then unchanged.
    """
    if get_token() is None:
        raise UsageError("no token for the Hub was found", where="HF_TOKEN", fix=LOGIN)
    hf_logging.set_verbosity_error()
    api = HfApi()
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]
    try:
        # If `to` has no owner, the repository belongs to the account of the token.
        repo = to if "/" in to else f"{api.whoami()['name']}/{to}"
        api.create_repo(repo, private=not public, exist_ok=True)
        # `create_repo` does not change the visibility of an existing repository, so query it.
        private = api.repo_info(repo).private
        if not private and not public:
            raise UsageError(
                f"the repository {repo} is public",
                where=repo_page(repo),
                why="without --public, `tunesmith push` uploads only to private repositories",
                fix="add --public, or choose another repository: --to NAME",
            )
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        size = size_text(sum(addition.upload_info.size for addition in additions))
        visibility = "private" if private else "public"
        count = count_of(len(files), "file")
        log.info(f"pushing {count} ({size}) to the {visibility} repository {repo}")
        commit = api.create_commit(repo, additions, commit_message=message, revision=revision)
    except (TRANSPORT, HFValidationError, OSError) as error:
        raise _push_error(error, to) from error
    # If no file has changed, `commit` is the newest existing commit.
    log.info(f"commit {commit.oid[:12]}")
    return repo_page(repo) + (f"/tree/{revision}" if revision else "")


def _push_error(error: Exception, to: str) -> UsageError:
    """Build the error for a failed upload. The message has the reason and a fix."""
    status = http_status(error)
    answers = {
        0: ("the Hub cannot be reached", "check the network (HTTPS_PROXY, HF_ENDPOINT)"),
        401: ("the Hub rejected the token", LOGIN),
        403: (
            f"the token may not write to {to}",
            f"create a token with write access: {constants.ENDPOINT}/settings/tokens",
        ),
    }
    # The Hub's message gives the reason, such as a change of the repository during the push.
    other = (
        f"the Hub answered the push to {to} with status {status}",
        "fix the reported problem, or run the command again later",
    )
    what, fix = answers.get(status, other)
    if isinstance(error, OfflineModeIsEnabled):
        what, fix = "HF_HUB_OFFLINE forbids uploads", "run HF_HUB_OFFLINE=0 tunesmith push ..."
    elif isinstance(error, HFValidationError):
        what = f"{to!r} is not a valid repository name"
        fix = "use --to owner/name with only letters, digits, -, _ and ."
    return UsageError(what, where=constants.ENDPOINT, why=clean(error), fix=fix)


def push(run: str, *, to: str | None, public: bool, revision: str | None) -> str:
    """Upload a run, a model folder or an exported file. Return the URL of the repository page.

    Raise UsageError if there is nothing to upload, or if the upload fails.
    """
    path = Path(run)
    send = partial(push_files, public=public, revision=revision)
    exported = gguf_to_push(path)
    if exported is not None:
        name = path.resolve().name.removesuffix(".gguf")
        return send(exported, to or name, message=f"Push {name}")
    # trust_remote_code is safe here: `push` uploads the model's files without running their code.
    location = locate_run(run, trust_remote_code=True)
    folder = location.folder
    if folder is None:
        raise UsageError(
            f"{run} has no files to push",
            where=run,
            fix="use a run directory, or a folder with model files",
        )
    # To use an adapter, other users must download its base model, so the base model must be on the
    # Hub.
    if location.holds == "adapter" and not is_hub_id(location.base.name):
        raise UsageError(
            "the adapter's base model is a local folder, not a model on the Hub",
            where=folder,
            why=f"other users could not download the base model {location.base.name}",
            fix=f"run `tunesmith merge {shell_path(run)} --output DIR`, then `tunesmith push DIR`, "
            "or train with the Hub id of the base model as model.name",
        )
    if location.run:
        # Use the name of the run directory, because the folder itself is called final or
        # checkpoint-N.
        name = folder.parent.resolve().name
        message = f"Push {name}/{folder.name}"
    else:
        name = folder.resolve().name
        message = f"Push {name}"
    with raise_if_deleted(location):
        # Compare the checksums before the upload, so that no damaged file is published.
        check_sums(folder)
        files: dict[str, Path | bytes] = {}
        for path in sorted(folder.rglob("*")):
            file = path.relative_to(folder).as_posix()
            # Skip hidden files, which the system or an editor creates. Also skip state/, because
            # only a resumed run needs the optimizer state.
            is_hidden = file.startswith(".") or "/." in file
            if path.is_file() and not (is_hidden or file.startswith("state/") or file == MANIFEST):
                files[file] = path
        # Do not add a model card to an untrained base model.
        if CARD not in files and location.holds != "base":
            files[CARD] = make_card(location).encode()
        return send(files, to or name, message=message)
