"""Download of a data set from the Hub, whose files are then read like local files."""

import glob
import itertools
from pathlib import Path
from urllib.parse import unquote

from tunesmith.config.row_settings import row_fix
from tunesmith.config.schema import Source
from tunesmith.errors import DataError
from tunesmith.host.files import find_similar_path
from tunesmith.rows.source.listings import files_of_config


def download_rows(source: Source) -> Path:
    """Return the folder in the Hub's cache with the files of a data set.

    Only the files of the configuration `source.name` are downloaded. Without a network
    (HF_HUB_OFFLINE), the files must be in the cache.

    Raises:
        DataError: the data set or the configuration does not exist, or cannot be downloaded.
    """
    from huggingface_hub import constants, snapshot_download

    name = source.source

    def download(*files: str) -> Path:
        # Every repository has one of the first two files.
        patterns = ["README.md", ".gitattributes", *map(glob.escape, files)]
        folder = snapshot_download(
            name, repo_type="dataset", revision=source.revision, allow_patterns=patterns
        )
        return Path(folder)

    try:
        folder = download()
        if not constants.HF_HUB_OFFLINE:
            # The folder is named after the commit.
            base = f"hf://datasets/{name}@{folder.name}/"
            splits, _ = files_of_config(base, folder / "README.md", source.name, name=name)
            urls = itertools.chain.from_iterable(splits.values())
            download(*(unquote(url.removeprefix(base)) for url in urls))
    except DataError:
        raise
    except Exception as error:
        # Catch all exceptions, because the errors of the Hub client have no common base class.
        raise _hub_error(name, error) from error
    return folder


def _hub_error(name: str, error: Exception) -> DataError:
    """Convert an error of the Hub client to a DataError with a cause and a fix."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    error = error.__cause__ if isinstance(error.__cause__, RepositoryNotFoundError) else error
    what = f"the dataset {name} cannot be read"
    why = " ".join(str(error).split())
    # The cause is usually a lost connection, a time-out, or a full disk.
    fix = "check the network and the disk (HF_HOME); finished downloads are kept"
    if constants.HF_HUB_OFFLINE:
        what = f"the dataset {name} is not in the Hub cache"
        why = "HF_HUB_OFFLINE is set, so the dataset is not downloaded"
        local = row_fix(name, source="rows.jsonl")
        fix = f"unset HF_HUB_OFFLINE, or use a local file, such as {local}"
    elif isinstance(error, GatedRepoError):
        what = f"you have no access to the dataset {name}"
        page = f"https://huggingface.co/datasets/{name}"
        fix = f"accept the terms at {page}, then run `hf auth login` (or set HF_TOKEN)"
    elif isinstance(error, RepositoryNotFoundError):
        what = f"there is no dataset {name} on the Hub, or it is private"
        fix = f"correct the name, log in with `hf auth login`, or write ./{name} for a local file"
    near = find_similar_path(Path(name))
    if near is not None:
        fix = f"did you mean the local path {near}? If not, {fix}"
    return DataError(what, where=name, why=f"{why:.300}", fix=fix)
