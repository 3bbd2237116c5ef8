"""The files of this machine that a recipe reads, and that another machine or a container needs."""

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
from tunesmith.host.files import cache_folder

# In a container: the files with tokens; docker/entrypoint.sh exports the trackers' from there.
SECRETS = "/run/secrets"
# A copy of a larger file is a second name of it (a hard link), where the disk has such.
MAX_COPIED_BYTES = 64 << 20
TRACKER_KEYS = ("WANDB_API_KEY", "COMET_API_KEY", "SWANLAB_API_KEY", "MLFLOW_TRACKING_TOKEN")

SYSTEM_FOLDERS = (
    *("/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/run", "/sbin", "/sys", "/usr"),
    *("/var/run", "/var/lib/docker"),
)
PRIVATE_NAMES = (".ssh", ".docker", ".gnupg", ".netrc")  # in the home folder


def recipe_inputs(run: Run) -> list[Path]:
    """The files and folders that a recipe reads here, absolute, each once, in the schema's order.

    They are the data files, the template, the model, its tokenizer and the adapter to go on from;
    no Hub ids. UsageError where one is not there: a container or another machine would report it
    only after it was started.
    """
    # A recipe's paths became absolute when it was loaded: any other word is an id of the Hub.
    files = {key: text for key, text in inputs_of(run).items() if os.path.isabs(text)}
    patterns = {key: Path(text) for key, text in files.items() if is_pattern(text)}
    files |= {key: str(pattern_folder(pattern)) for key, pattern in patterns.items()}
    for key, text in files.items():
        if not os.path.exists(text):
            raise UsageError(f"{text} does not exist", where=key, fix=f"correct it: {key}=PATH")
    return [Path(text) for text in dict.fromkeys(files.values())]


def check_exposed(path: Path, *, system: Iterable[str] = SYSTEM_FOLDERS) -> None:
    """UsageError for what no container may have: keys, tokens and, of the system, `system`."""
    from huggingface_hub import constants

    home = Path.home()
    private = [Path(folder) for folder in system]
    private += [home / name for name in PRIVATE_NAMES]
    private += [Path(constants.HF_TOKEN_PATH), home]
    private += [folder.resolve() for folder in private]
    # A link is checked by its own name too.
    for place in (path, path.resolve()):
        for folder in private:
            is_above = folder.is_relative_to(place)
            # A run's folder may be in the home folder.
            is_inside = folder not in (home, home.resolve()) and place.is_relative_to(folder)
            if is_above or is_inside:
                raise UsageError(
                    f"{path} cannot be mounted in a container",
                    where=str(path),
                    why=f"{folder} is private",
                    fix="use a separate folder, and copy the needed files there",
                )


def place_by_content(path: Path) -> Path:
    """The place of an input on every node, in our cache: it is named by what is in the input.

    Hidden files are no part of it.
    """
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    digests = []
    for file in files:
        name = file.relative_to(path)
        if not any(part.startswith(".") for part in name.parts):
            # Names count: a folder whose files changed places is another input.
            digests.append((str(name), digest_of_file(file)))
    digest = sha256(json.dumps(digests).encode()).hexdigest()
    folder = cache_folder("shipped").absolute() / f"{path.name[:100]}--{digest[:32]}"
    # Below the digest stands the input's own name: its suffix tells the format of data.
    return folder / path.name


def copy_input(path: Path, place: Path) -> None:
    """Give this node an input at its place too, which does not change with a small source."""
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    # Copied beside its place and renamed: another launch may look for it at the same time.
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    if path.is_dir():
        hidden = shutil.ignore_patterns(".*")
        shutil.copytree(path, partial, ignore=hidden, copy_function=_copy_or_link)
    else:
        _copy_or_link(str(path), str(partial))
    os.replace(partial, place)


def _copy_or_link(source: str, target: str) -> None:
    # No link where both are on different disks, or where the file system has no links.
    with suppress(OSError):
        if os.path.getsize(source) > MAX_COPIED_BYTES:
            os.link(os.path.realpath(source), target)
            return
    shutil.copyfile(source, target)


def hub_sources(run: Run) -> list[Source]:
    """The sources of rows that are on the Hub."""
    sources = [*run.data.train, *run.data.validation]
    return [source for source in sources if not os.path.isabs(source.source)]


def caches() -> dict[str, Path]:
    """The variable that names each cache -> its folder here, absolute.

    The Hub's token lies beside the folders of its cache, and in none of them.
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
    """The variables of this environment with such names, but for secrets.

    A secret may hide in a variable with a harmless name: its value is looked at too.
    """
    passed = {}
    for name, value in sorted(os.environ.items()):
        if names.fullmatch(name) and not is_secret_name(name) and mask(value) == value:
            passed[name] = value
    return passed


def find_secrets() -> dict[str, str]:
    """The Hub's token, as HF_TOKEN, and the keys of trackers, as far as the user has them."""
    from huggingface_hub import get_token

    secrets = {"HF_TOKEN": get_token()}
    for key in TRACKER_KEYS:
        secrets[key] = os.environ.get(key)
    return {name: value for name, value in secrets.items() if value}
