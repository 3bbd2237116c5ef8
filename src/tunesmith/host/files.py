"""Helpers for files and folders: the cache, atomic writes and checks of the free disk space."""

import difflib
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tunesmith.errors import MachineError, ModelError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Measured = TypeVar("Measured", bound="DataclassInstance")

# Age in seconds after which a hidden folder of the cache is deleted. Such a folder was left by a
# killed process, because tokenizing a data set or converting a model never takes so long.
ABANDONED = 3 * 24 * 3600
# Age in seconds after which a partial file is deleted. No atomic write takes so long.
PARTIAL_WRITE_S = 600.0
# Descriptions of file types that are not regular files.
SPECIAL_FILES = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def cache_folder(*parts: str) -> Path:
    """Return the path `parts` inside the cache folder. The path is not created.

    The cache folder is `$TUNESMITH_CACHE`, else `$XDG_CACHE_HOME/tunesmith`, else
    `~/.cache/tunesmith`.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tunesmith"
    return in_home(os.environ.get("TUNESMITH_CACHE") or default).joinpath(*parts)


def in_home(path: str | Path) -> Path:
    """Replace `~` at the start of a path of this user's files. Raise MachineError if the user has
    no home folder, as in a container with `--user`.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise MachineError(
            "this user has no home folder",
            where="environment: HOME",
            why="HOME is not set, and /etc/passwd does not list the user",
            fix="export HOME=/tmp",
        )
    return Path(expanded)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically.

    After a crash or on a full disk, the file has its old or its new content.

    The content is first written to `.NAME.PID.partial`, so several processes can write at the same
    time. Text is encoded as UTF-8. If an error occurs, the old file is kept, the partial file is
    removed, and the error names `path`. The next write removes partial files of killed processes.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        # A partial file that is older than PARTIAL_WRITE_S belongs to a process that was killed.
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime > PARTIAL_WRITE_S:
                partial.unlink()
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # includes the KeyboardInterrupt of a stop signal
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
            error.filename2 = None
        raise


def measure_once(
    folder: str,
    key: list[Any],
    measure: Callable[[], Measured],
    form: type[Measured],
) -> Measured:
    """Return the cached result of `measure` for this key. Call `measure` if nothing is cached.

    If the cache file is incomplete or does not have the fields of `form`, it is ignored and written
    again.

    Args:
        folder: a folder inside the cache folder.
        key: everything that the result depends on. Values that are not JSON are converted with
            `str`.
        form: the dataclass of the result. It is stored as JSON.
    """
    from pydantic import TypeAdapter

    text = json.dumps(key, sort_keys=True, default=str)
    file = cache_folder(folder) / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    # Measure again if the file does not exist or is not a regular file, or if its content is not a
    # valid `form`. The first line is a checksum, because a changed number is valid, too. Also
    # compare the names of the fields: if an earlier version stored a field under another name,
    # pydantic would silently use the field's default.
    with suppress(OSError, ValueError):
        written = file.read_text("utf-8") if file.is_file() else ""
        checksum, _, content = written.partition("\n")
        stored = TypeAdapter(dict[str, Any]).validate_json(content)
        is_form = stored.keys() == {field.name for field in fields(form)}
        if is_form and checksum == hashlib.sha256(content.encode()).hexdigest():
            return TypeAdapter(form).validate_python(stored)
    measured = measure()
    with suppress(OSError):  # if the cache is not writable, the next call measures again
        file.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(asdict(measured))
        checksum = hashlib.sha256(content.encode()).hexdigest()
        write_atomically(file, f"{checksum}\n{content}")
    return measured


def check_regular_files(
    path: Path, *, fix: str = "replace it by a regular file, or use another path"
) -> None:
    """Raise ModelError if `path`, or a file in the folder `path`, is a pipe, a socket or a device.

    Opening or reading such a file may block forever. Symbolic links are followed, because the Hub's
    cache consists of links.
    """
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        kind = file.exists() and SPECIAL_FILES.get(stat.S_IFMT(file.stat().st_mode))
        if kind:
            raise ModelError(f"{file.name} is {kind}, not a file", where=file, fix=fix)


def follow_umask(folder: Path) -> None:
    """Set the mode of every file below `folder` to the mode of a new file.

    This is needed because safetensors creates its files with mode 600.
    """
    # Create a file and use its mode. os.umask would change the umask of all threads for a moment.
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def relative_to_cwd(path: str | Path) -> str:
    """Return a path in the working directory as a relative path.

    Any other path and a Hub id are returned unchanged.
    """
    if Path(path).is_relative_to(Path.cwd()):
        return os.path.relpath(path)
    return str(path)


def find_similar_path(path: Path) -> Path | None:
    """Return an existing path that differs from a missing path in one misspelled name.

    Return None if there is no similar path.
    """
    misspelled = path
    while not misspelled.parent.is_dir():
        misspelled = misspelled.parent
    try:
        names = {each.name.lower(): each.name for each in sorted(misspelled.parent.iterdir())}
    except OSError:
        return None
    # The cutoff 0.7 excludes different names that have only their suffix, such as ".jsonl", in
    # common.
    for name in difflib.get_close_matches(misspelled.name.lower(), names, n=3, cutoff=0.7):
        near = misspelled.with_name(names[name]) / path.relative_to(misspelled)
        if near.exists():
            return near
    return None


def remove_abandoned(cache: Path) -> None:
    """Delete hidden folders of a cache that are older than ABANDONED.

    Processes that were killed leave them behind.
    """
    for folder in cache.glob(".*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > ABANDONED:
                shutil.rmtree(folder)


@contextmanager
def cached_once(target: Path, *, what: str) -> Iterator[Path]:
    """Yield a new folder. At the end of the block it is renamed to `target`, a path in a cache.

    If another process has created `target` first, the folder of that process is kept.

    Args:
        what: the content of the folder, for the error message.

    Raises:
        MachineError: if the cache cannot be written.
    """
    cache = target.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        remove_abandoned(cache)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".writing-") as scratch:
            folder = Path(scratch) / "folder"
            folder.mkdir()
            yield folder
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
    except OSError as error:
        raise MachineError(
            f"{what} cannot be written",
            where=cache,
            why=str(error),
            fix="free disk space, or set TUNESMITH_CACHE to another folder",
        ) from error


def existing_folder(path: Path) -> Path:
    """Return the path if it is an existing folder, else its nearest existing parent folder."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def require_disk_space(path: Path, needed: int, *, what: str, fix: str, why: str = "") -> None:
    """Raise MachineError if the disk of `path` has less than `needed` bytes free for `what`.

    `path` does not need to exist.
    """
    from rich.filesize import decimal as size_text

    free = shutil.disk_usage(existing_folder(path)).free
    if needed <= free:
        return
    raise MachineError(
        f"not enough disk space for {what}: {size_text(needed)} needed, {size_text(free)} free, "
        f"{size_text(needed - free)} missing",
        where=path,
        why=why,
        fix=fix,
        cause="disk",
    )
