"""Listing of the files of a data set, which is given as a folder or a glob pattern.

A folder that `datasets` saved, and a clone of a data set from the Hub, contain a list of their
files. In other folders, all files belong to the data set.
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
from tunesmith.config.row_settings import row_fix
from tunesmith.errors import DataError

# Name of a file with cached results of `map` and `filter`, which `datasets` stores next to the
# rows.
_CACHE_FILE = re.compile(r"cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow")
# YAML header of a README.md that has the key `configs`.
_CONFIGS = re.compile(rb"\s*---\s*\n(?:(?!---).*\n)*?configs:")


class Listing(NamedTuple):
    """The files of a data set.

    Attributes:
        folder: the folder that contains all files.
        files: all files.
        splits: the files of each split. None if the data set does not list its splits. In this case
            the splits must be derived from the file names.
        layout: text for the user about the configuration that is read, or "".
    """

    folder: Path
    files: list[Path]
    splits: dict[str, list[Path]] | None
    layout: str = ""


def list_files(path: Path, config: str | None) -> Listing:
    """List the files of a folder or a glob pattern.

    Args:
        path: the folder or the pattern.
        config: the name of the configuration, for a clone with several configurations.

    Raises:
        DataError: a split has no files, or `config` is missing and the folder has several
            configurations.
    """
    if not path.is_dir():
        matches = []
        for match in map(Path, sorted(glob.glob(str(path), recursive=True))):
            matches += _walk(match) if match.is_dir() else [match]
        return Listing(pattern_folder(path), list(dict.fromkeys(matches)), None)
    layout = ""
    readme = path / "README.md"
    splits = {name: _walk(path / name) for name in _read_list(path / "dataset_dict.json", "splits")}
    if readme.is_file() and _CONFIGS.match(readme.read_bytes()):
        splits, layout = _files_of_config(path, config)
    for name, files in splits.items():
        if not files:
            raise DataError(
                f"the split {name} of the data set has no files",
                where=path,
                fix="copy or download the entire folder again",
            )
    if not splits:
        return Listing(path, _walk(path), None)
    return Listing(path, list(itertools.chain(*splits.values())), splits, layout)


def _files_of_config(folder: Path, config: str | None) -> tuple[dict[str, list[Path]], str]:
    """Return the files of each split of a configuration, and a line that tells the user which
    configuration is read.

    If `config` is None, use the default configuration.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(folder), config)
    except Exception as error:
        # `datasets` raises many types of exceptions for a broken YAML header.
        raise config_error(str(folder), error) from error
    selected = builder.config
    splits = {str(name): list(map(Path, files)) for name, files in selected.data_files.items()}
    others = [name for name in builder.builder_configs if name != selected.name]
    return splits, f"configuration {selected.name}, not read: {', '.join(others) or 'none'}"


def config_error(name: str, error: Exception) -> DataError:
    """Build the error for a data set that has several configurations, if the recipe chooses none of
    them.

    Args:
        name: the folder or the Hub id of the data set.
        error: the error that `datasets` raised. Its text lists the configurations.
    """
    text = str(error)
    _, _, listed = text.partition("[")
    listed, _, _ = listed.partition("]")
    names = re.findall(r"'([^']+)'", listed)
    if names:
        why = f"the configurations are {', '.join(names)}"
        fix = f"choose one, such as {row_fix(name, name=names[0])}"
    else:
        why = f"the configurations cannot be read: {' '.join(text.split())}"
        fix = "correct the YAML header of its README.md, or use the data files: FOLDER/*.parquet"
    return DataError(
        f"the data set {name} needs the name of a configuration", where=name, why=why, fix=fix
    )


def _walk(folder: Path) -> list[Path]:
    """List all files below a folder, sorted by path. Hidden files and folders are omitted.

    Symbolic links are followed, except links to a parent of the folder. A file to which several
    links point is listed only once.
    """
    files = []
    seen = set(map(str, Path(os.path.realpath(folder)).parents))
    for name, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(name)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        visible = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        # Sort the folders, so that the result is deterministic if a link points to another listed
        # folder.
        folders[:] = sorted(visible)
        for file in sorted(_without_caches(Path(name), names)):
            target = os.path.join(real, file)
            if os.path.islink(target):
                target = os.path.realpath(target)
            if target not in seen and not file.startswith("."):
                seen.add(target)
                files.append(Path(name, file))
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _without_caches(folder: Path, names: list[str]) -> list[str]:
    """Return the file names of a folder without the cache files of `datasets`.

    If `save_to_disk` wrote the folder, its `state.json` lists the files with rows, and all other
    Arrow files are cache files.
    """
    listed = [str(file["filename"]) for file in _read_list(folder / "state.json", "_data_files")]
    if listed:
        return [*listed, *(name for name in names if not name.endswith(".arrow"))]
    return [name for name in names if not _CACHE_FILE.fullmatch(name)]


def _read_list(path: Path, key: str) -> list[Any]:
    """Return the list that a JSON file stores under `key`, or an empty list if there is no such
    list.
    """
    with suppress(OSError, ValueError, LookupError, TypeError):
        return list(json.loads(path.read_bytes())[key])
    return []
