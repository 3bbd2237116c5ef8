"""Find the files of one data set, in a folder or by a pattern.

A folder that `datasets` saved, and a clone of a data set of the Hub, list their files. In any other
folder, all files are taken.
"""

import glob
import itertools
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.config.paths import pattern_folder
from tunesmith.errors import DataError
from tunesmith.host.shell import shell_word

# The results of `map` and `filter`, which `datasets` keeps next to the rows of a data set.
_CACHE_FILE = re.compile(r"cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow")
# The head of a README.md with the key `configs`.
_CONFIGS = re.compile(rb"\s*---\s*\n(?:(?!---).*\n)*?configs:")


class Listing(NamedTuple):
    """The files of a data set.

    Attributes:
        folder: the folder that contains all of them.
        splits: the files of each split; None if only their names tell the splits.
        layout: the configuration that is read, for the user.
    """

    folder: Path
    files: list[Path]
    splits: dict[str, list[Path]] | None
    layout: str = ""


def list_files(path: Path, config: str | None) -> Listing:
    """List the files of a folder or a pattern.

    Args:
        config: the configuration to read, for a clone that has several.

    Raises:
        DataError: a listed file is missing, or the folder has several configurations.
    """
    if not path.is_dir():
        matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
        walks = [_walk(match) if match.is_dir() else [match] for match in matches]
        files = list(dict.fromkeys(itertools.chain(*walks)))
        return Listing(pattern_folder(path), files, None)
    layout = ""
    readme = path / "README.md"
    saved_splits = _read_list(path / "dataset_dict.json", "splits")
    splits = {name: _walk(path / name) for name in saved_splits}
    if readme.is_file() and _CONFIGS.match(readme.read_bytes()):
        splits, layout = _files_of_config(path, config)
    for name, files in splits.items():
        if not files:
            what = f"the data set has no file of the split {name}"
            raise DataError(what, where=str(path), fix="copy or download the entire folder again")
    if not splits:
        return Listing(path, _walk(path), None)
    return Listing(path, list(itertools.chain(*splits.values())), splits, layout)


def _files_of_config(folder: Path, config: str | None) -> tuple[dict[str, list[Path]], str]:
    """Return the files of each split of a configuration, and a line about it. Without a name, the
    default configuration is taken.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(folder), config)
    except Exception as error:
        # `datasets` raises errors of many classes for a broken head.
        raise config_error(str(folder), error) from error
    splits = {str(name): [*map(Path, files)] for name, files in builder.config.data_files.items()}
    others = ", ".join(name for name in builder.builder_configs if name != builder.config.name)
    return splits, f"configuration {builder.config.name}, not read: {others or 'none'}"


def config_error(name: str, error: Exception) -> DataError:
    """Return the error for a data set that needs the name of a configuration.

    error: the error of `datasets`, which lists the names.
    """
    names = re.findall(r"'([^']+)'", str(error).partition("[")[2].partition("]")[0])
    why = f"it has {', '.join(names)}"
    fix = f"choose one: data.train.name={shell_word(names[0])}" if names else ""
    if not names:
        why = f"they cannot be read: {' '.join(str(error).split())}"
        fix = "fix the YAML at the top of its README.md, or name its files: FOLDER/*.parquet"
    what = f"the dataset {name} needs one of its configurations"
    return DataError(what, where=name, why=why, fix=fix)


def _walk(folder: Path) -> list[Path]:
    """List all files below a folder, each once, sorted by their paths, without hidden ones.

    Links to folders are followed, except those to a folder that contains this one.
    """
    files = []
    seen = set(map(str, Path(os.path.realpath(folder)).parents))
    for name, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(name)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # Sorted: of a folder and a link to it, always the first by name is walked.
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        for file in sorted(_without_caches(Path(name), names)):
            target = os.path.join(real, file)
            if os.path.islink(target):
                target = os.path.realpath(target)
            if target not in seen and not file.startswith("."):
                seen.add(target)
                files.append(Path(name, file))
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _without_caches(folder: Path, names: list[str]) -> list[str]:
    """Return the names of the files in a folder without the cache files of `datasets`.

    If `save_to_disk` wrote the folder, these are all Arrow files that its `state.json` does not
    list.
    """
    listed = [str(file["filename"]) for file in _read_list(folder / "state.json", "_data_files")]
    if listed:
        return [*listed, *(name for name in names if not name.endswith(".arrow"))]
    return [name for name in names if not _CACHE_FILE.fullmatch(name)]


def _read_list(path: Path, key: str) -> list[Any]:
    """Return the list that a JSON file has under a key; empty if there is none."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return list(json.loads(path.read_bytes())[key])
    return []
