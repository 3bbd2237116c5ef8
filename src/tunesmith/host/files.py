"""Files and folders of this machine: the cache, writes that are whole, room on the disk."""

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
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tunesmith.errors import MachineError, ModelError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Measured = TypeVar("Measured", bound="DataclassInstance")

ABANDONED = 3 * 24 * 3600  # seconds; nothing is tokenized or converted for so long
PARTIAL_WRITE_S = 600.0  # seconds without a change: no atomic write takes so long
SPECIAL_FILES = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def cache_folder(*parts: str) -> Path:
    """`parts` below our cache folder; not created.

    That is `$TUNESMITH_CACHE`, else `$XDG_CACHE_HOME/tunesmith`, else `~/.cache/tunesmith`.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tunesmith"
    if os.environ.get("TUNESMITH_CACHE"):
        root = Path(os.environ["TUNESMITH_CACHE"])
    return root.expanduser().joinpath(*parts)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one move: after a crash or on a full disk it is the old one or the new.

    Text is written as UTF-8, first to `.NAME.PID.partial`, so several processes may write at once.
    An error leaves the old file and no temporary one, and names the file itself; the next write
    removes those of kills.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        # A process that is at work, here or on another machine, writes for moments.
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime > PARTIAL_WRITE_S:
                partial.unlink()
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # a stop signal's too
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
    """Read from the cache what `measure` returned with this key before, else call it.

    A cached file that is torn, or holds no `form`, is measured again.

    Args:
        folder: below the cache folder.
        key: all that the result depends on, as JSON; other values by their text.
        form: the dataclass that is cached, as JSON.
    """
    from pydantic import TypeAdapter

    text = json.dumps(key, sort_keys=True, default=str)
    file = cache_folder(folder) / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    # Not there, not JSON, without one of the fields, or a field of another kind.
    with suppress(OSError, ValueError):
        return TypeAdapter(form).validate_json(file.read_bytes())
    measured = measure()
    with suppress(OSError):  # a cache that cannot be written costs seconds
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(asdict(measured)))
    return measured


def check_regular_files(
    path: Path, *, fix: str = "put the file itself there, or use another path"
) -> None:
    """ModelError where `path`, or a file of that folder, is a pipe, a socket or a device.

    Opening or reading one may never end. Links, such as those of the Hub's cache, are followed.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if not file.exists():
            continue
        kind = SPECIAL_FILES.get(stat.S_IFMT(file.stat().st_mode))
        if kind is not None:
            raise ModelError(f"{file.name} is {kind}, not a file", where=str(file), fix=fix)


def follow_umask(folder: Path) -> None:
    """Give every file below `folder` the mode that a new file gets there.

    safetensors writes its own with 600.
    """
    probe = folder / ".mode"  # the umask cannot be read without setting it, for all threads
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def from_here(path: str | Path) -> str:
    """A path below the working directory as a user there writes it.

    Any other, and a Hub id, as it is.
    """
    if Path(path).is_relative_to(Path.cwd()):
        return os.path.relpath(path)
    return str(path)


def near_path(path: Path) -> Path | None:
    """Find what is there in place of a path whose folders exist up to one, which is misspelt."""
    misspelt = path
    while not misspelt.parent.is_dir():
        misspelt = misspelt.parent
    try:
        names = {each.name.lower(): each.name for each in sorted(misspelt.parent.iterdir())}
    except OSError:
        return None
    # A common suffix of two unlike names is less than this.
    for name in difflib.get_close_matches(misspelt.name.lower(), names, n=3, cutoff=0.7):
        near = misspelt.with_name(names[name]) / path.relative_to(misspelt)
        if near.exists():
            return near
    return None


def remove_abandoned(cache: Path) -> None:
    """Delete the hidden folders of a cache that killed processes left behind ABANDONED ago."""
    for folder in cache.glob(".*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > ABANDONED:
                shutil.rmtree(folder)


@contextmanager
def cached_once(target: Path, *, what: str) -> Iterator[Path]:
    """Yield a new folder that becomes `target`, in a cache, at the end of the block.

    If another process has made `target` first, its folder is kept.

    MachineError if the cache cannot be written.
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
            where=str(cache),
            why=str(error),
            fix="free disk space, or set TUNESMITH_CACHE to another folder",
        ) from error


def existing_folder(path: Path) -> Path:
    """The path itself or its nearest parent that is a folder.

    What does not exist yet would be created there.
    """
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def require_disk_space(path: Path, needed: int, *, what: str, fix: str, why: str = "") -> None:
    """MachineError unless the disk of `path` has `needed` bytes free for `what`.

    The path need not exist yet.
    """
    from rich.filesize import decimal as size_text

    free = shutil.disk_usage(existing_folder(path)).free
    if needed <= free:
        return
    raise MachineError(
        f"no room on the disk for {what}: {size_text(needed)} needed, {size_text(free)} free, "
        f"{size_text(needed - free)} short",
        where=str(path),
        why=why,
        fix=fix,
        cause="disk",
    )
