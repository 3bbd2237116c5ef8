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

from tunesmith.config.paths import DATA_SUFFIXES, PICTURE_SUFFIXES, pattern_folder
from tunesmith.config.row_settings import row_fix
from tunesmith.errors import DataError

# Name of a file with cached results of `map` and `filter`, which `datasets` stores next to the
# rows.
_CACHE_FILE = re.compile(r"cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow")
# YAML header of a README.md that has the key `configs`.
_CONFIGS = re.compile(rb"\s*---\s*\n(?:(?!---).*\n)*?configs:")


_PACKED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
# Suffixes of the files that are downloaded from the Hub. Rows can refer to pictures.
_SUFFIXES = [*DATA_SUFFIXES, *_PACKED_SUFFIXES, *PICTURE_SUFFIXES]


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
    # The Hub's cache, in which `datasets` finds the splits of every data set.
    is_cached = path.parent.name == "snapshots"
    if is_cached or (readme.is_file() and _CONFIGS.match(readme.read_bytes())):
        listed, layout = files_of_config(str(path), readme, config)
        splits = {split: list(map(_unpack, names)) for split, names in listed.items()}
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


def files_of_config(
    base: str, readme: Path, config: str | None, *, name: str = ""
) -> tuple[dict[str, list[str]], str]:
    """List the files of each split of a data set from the Hub, by the rules of `datasets`.

    Return the files by split, and a text for the user about the configuration that is read.

    Args:
        base: the address of the data set on the Hub (`hf://datasets/NAME@COMMIT/`), or its folder.
        readme: the README.md of the data set, whose YAML header can list configurations.
        config: the name of the configuration. If None, use the default one.
        name: the name of the data set for error messages. If "", it is `base`.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
    from huggingface_hub import metadata_load

    name = name or base
    try:
        header = (metadata_load(readme) if readme.is_file() else None) or {}
        configs = {str(each["config_name"]): dict(each) for each in header.get("configs", ())}
    # A broken header raises errors of the YAML library, or of a value with another type.
    except Exception as error:
        raise _unlisted(name, error) from error
    defaults = [own for own in configs if configs[own].get("default") or own == "default"]
    names = [config] if config else defaults or list(configs)
    if configs and (len(names) > 1 or names[0] not in configs):
        raise DataError(
            f"the data set {name} needs the name of a configuration",
            where=name,
            why=f"the configurations are {', '.join(configs)}",
            fix=f"choose one, such as {row_fix(name, name=next(iter(configs)))}",
        )
    selected = configs[names[0]] if configs else {}
    base = os.path.join(base, str(selected.get("data_dir", "")))
    given = selected.get("data_files")
    try:
        patterns = sanitize_patterns(given) if given else get_data_patterns(base)
        files = DataFilesDict.from_patterns(patterns, base_path=base, allowed_extensions=_SUFFIXES)
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise _unlisted(name, error) from error
    others = ", ".join(own for own in configs if own not in names)
    layout = f"configuration {names[0]}, not read: {others or 'none'}" if configs else ""
    return {str(split): list(map(str, found)) for split, found in files.items()}, layout


def _unlisted(name: str, error: Exception) -> DataError:
    return DataError(
        f"the files of the data set {name} cannot be listed",
        where=name,
        why=" ".join(str(error).split()),
        fix="correct the YAML header of its README.md, or use the data files: FOLDER/*.parquet",
    )


def _unpack(file: str) -> Path:
    """Return the path of a file, which is unpacked if it is compressed, such as rows.jsonl.gz."""
    from datasets import DownloadManager

    path = Path(file)
    if path.suffix not in _PACKED_SUFFIXES:
        return path
    # `datasets` unpacks the file into its cache, without a suffix.
    unpacked = Path(DownloadManager().extract(file))
    named = unpacked.with_name(f"{unpacked.name}-{path.stem}")
    with suppress(FileExistsError):
        named.symlink_to(unpacked)
    return named


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
