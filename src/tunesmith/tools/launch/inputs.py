"""Files and variables of this machine that a run needs in a container or on another machine."""

import json
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from tunesmith.checkpoint.manifest import digest_of_file
from tunesmith.config.paths import inputs_of, is_pattern, pattern_folder
from tunesmith.config.schema import Run, Source
from tunesmith.errors import UsageError, is_secret_name, mask
from tunesmith.host.files import cache_folder, in_home

# Folder of the files with access tokens in a container. docker/entrypoint.sh exports the tokens of
# experiment trackers as variables.
SECRETS = "/run/secrets"
# Maximum size of a file that is copied. For a larger file, a hard link is created if possible.
MAX_COPIED_BYTES = 64 << 20
TRACKER_KEYS = ("WANDB_API_KEY", "COMET_API_KEY", "SWANLAB_API_KEY", "MLFLOW_TRACKING_TOKEN")

SYSTEM_FOLDERS = (
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/lib64",
    "/proc",
    "/run",
    "/sbin",
    "/sys",
    "/usr",
    "/var/run",
    "/var/lib/docker",
)
# Names in the home folder that no container may see.
PRIVATE_NAMES = (".ssh", ".docker", ".gnupg", ".netrc")


def recipe_inputs(run: Run) -> list[Path]:
    """Return the absolute paths of the local files and folders that a recipe reads.

    The result has data files, chat template, model, tokenizer and the adapter to continue from, in
    the order of the recipe schema and without duplicates. Ids of the Hub are not included. Raise
    UsageError if a path does not exist, because a container or another machine would report this
    only after its start.
    """
    paths: dict[Path, None] = {}
    for key, text in inputs_of(run).items():
        # Loading a recipe makes its paths absolute, so any other value is an id of the Hub.
        if not os.path.isabs(text):
            continue
        path = pattern_folder(Path(text)) if is_pattern(text) else Path(text)
        if not os.path.exists(path):
            raise UsageError(
                f"{path} does not exist", where=key, fix=f"correct the path: {key}=PATH"
            )
        paths[path] = None
    return list(paths)


def check_exposed(path: Path, *, system: Iterable[str] = SYSTEM_FOLDERS) -> None:
    """Raise UsageError if a mount of `path` would show a container a private folder.

    Args:
        path: the path to mount.
        system: system folders that the container may not see. The user's keys and tokens are always
            private.
    """
    from huggingface_hub import constants

    home = in_home("~")
    private = [*map(Path, system), *(home / name for name in PRIVATE_NAMES), home]
    private.append(Path(constants.HF_TOKEN_PATH))
    for folder in [*private, *(folder.resolve() for folder in private)]:
        # Check a symbolic link by its own path and by its target.
        for place in (path, path.resolve()):
            # A path inside the home folder is allowed, but the home folder itself is not.
            is_inside = place.is_relative_to(folder) and folder not in (home, home.resolve())
            if is_inside or folder.is_relative_to(place):
                raise UsageError(
                    f"{path} cannot be mounted in a container",
                    where=path,
                    why=f"a container must not see the private folder {folder}",
                    fix="use a separate folder, and copy the needed files there",
                )


def place_by_content(path: Path) -> Path:
    """Return the path at which every node stores an input of the recipe.

    The path is in tunesmith's cache and contains a hash of the content. Hidden files are ignored.
    """
    digests = []
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            # Include the file names in the hash, because they are part of the content of a folder.
            digests.append((str(name), digest_of_file(file)))
    digest = sha256(json.dumps(digests).encode()).hexdigest()
    folder = cache_folder("shipped").absolute() / f"{path.name[:100]}--{digest[:32]}"
    # Keep the original file name, because its suffix gives the format of a data file.
    return folder / path.name


def copy_input(path: Path, place: Path) -> None:
    """Copy an input of the recipe to the path of `place_by_content` on this node.

    Do nothing if the path exists. Small files are copied, so that later changes of the source do
    not affect the run.
    """
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    # Copy to a temporary name and rename it, because another launch may read the path concurrently.
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    if path.is_dir():
        hidden = shutil.ignore_patterns(".*")
        shutil.copytree(path, partial, ignore=hidden, copy_function=_copy_or_link)
    else:
        _copy_or_link(str(path), str(partial))
    os.replace(partial, place)


def _copy_or_link(source: str, target: str) -> None:
    # Copy the file if the hard link fails: the paths may be on different disks, or the file system
    # may not support links.
    with suppress(OSError):
        if os.path.getsize(source) > MAX_COPIED_BYTES:
            os.link(os.path.realpath(source), target)
            return
    shutil.copyfile(source, target)


def hub_sources(run: Run) -> list[Source]:
    """Return the data sources of a recipe that are on the Hub."""
    sources = [*run.data.train, *run.data.validation]
    return [source for source in sources if not os.path.isabs(source.source)]


def caches() -> dict[str, Path]:
    """Return a dict from environment variables to the cache folders that they set.

    The paths are absolute. The folders do not contain the Hub's token, which is stored next to
    them.
    """
    from huggingface_hub import constants

    datasets = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    folders = {
        "HF_HUB_CACHE": Path(constants.HF_HUB_CACHE),
        "HF_DATASETS_CACHE": Path(datasets),
        "TUNESMITH_CACHE": cache_folder(),
    }
    return {name: folder.expanduser().absolute() for name, folder in folders.items()}


def passed_variables(names: re.Pattern[str]) -> dict[str, str]:
    """Return the environment variables whose names match a pattern, without secrets.

    Names and values are both checked, because a variable with a harmless name may hold a secret.
    """
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if names.fullmatch(name) and not is_secret_name(name) and mask(value) == value
    }


def find_secrets() -> dict[str, str]:
    """Return the Hub's token as HF_TOKEN and the keys of experiment trackers, if they exist."""
    from huggingface_hub import get_token

    secrets = {"HF_TOKEN": get_token(), **{key: os.environ.get(key) for key in TRACKER_KEYS}}
    return {name: value for name, value in secrets.items() if value}
