"""Cached conversion of a .gguf file to a Transformers folder.

Transformers reads the weights and dequantizes them (`gguf_file=`), which takes minutes and needs
memory for the entire model. A conversion without weights takes seconds, and its folder is
sufficient to count tokens. The tokenizer is built from the .gguf file (gguf_tokenizer.py). A folder
is first written under a temporary name and renamed at the end, so that an interrupted conversion
leaves no incomplete folder.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import get_args

from tunesmith.config.schema import Dtype
from tunesmith.errors import ModelError
from tunesmith.host.files import cache_folder, cached_once, follow_umask
from tunesmith.host.memory import open_uncached
from tunesmith.host.packages import require
from tunesmith.model.weights.safetensors_files import SINGLE, unreadable_file

log = logging.getLogger(__name__)

MAGIC = b"GGUF"
# Increase this version if the written files change, so that conversions by earlier versions are not
# used.
CONVERSION_VERSION = 2
WITHOUT_WEIGHTS = "without-weights"  # part of the name of a folder that has no weights


def convert_gguf(file: Path, dtype: str | None) -> Path:
    """Return the Transformers folder of a .gguf file. Convert the file if it is not in the cache.

    Args:
        dtype: dtype of the weights, such as `bf16`. None means that the weights are not needed:
            return any existing folder of this file, or write only the config and the tokenizer.

    Raises:
        ModelError: Transformers cannot read the file.
        MachineError: the package gguf is missing, or the cache is not writable.
    """
    file = file.resolve()
    try:
        with file.open("rb") as stream:
            start = stream.read(len(MAGIC))
    except OSError as error:
        raise unreadable_file(file, error) from error
    if start != MAGIC:
        raise ModelError(
            f"{file.name} is not a GGUF file",
            where=file,
            why=f"the file begins with {start!r} instead of {MAGIC!r}",
            fix="download the file again; a small file is often a saved web page or a Git LFS "
            "pointer",
        )
    for content in (dtype,) if dtype else (*get_args(Dtype), WITHOUT_WEIGHTS):
        target = _cached_folder(file, content)
        if target.is_dir():
            return target
    _write_once(file, target, dtype)
    return target


def _cached_folder(file: Path, content: str) -> Path:
    """Return the cache folder for a file.

    The name depends on path, size and modification time of the file, and on `content`, which is a
    dtype or WITHOUT_WEIGHTS.
    """
    stat = file.stat()
    identity = json.dumps([str(file), stat.st_size, stat.st_mtime_ns, content, CONVERSION_VERSION])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return cache_folder("models") / f"{file.stem}-{content}-{digest}"


def _write_once(file: Path, target: Path, dtype: str | None) -> None:
    """Convert the file to a new folder, and rename the folder to `target` when it is complete.

    If `dtype` is None, the folder gets no weights.
    """
    require("gguf", where=str(file), fix="use the safetensors version of this model on the Hub")
    from tunesmith.hub.gguf_folder import write_folder

    what = f"to {dtype} safetensors" if dtype else "without its weights"
    log.info(f"converting {file.name} {what} in the folder {target}, which later commands reuse")
    with cached_once(target, what="the converted model") as folder:
        write_folder(file, dtype, folder)
        follow_umask(folder)
        for read_file in (file, *folder.glob(SINGLE)):
            with open_uncached(read_file) as stream:
                # Flush the file to the disk, because only pages that are on disk can be dropped
                # from the page cache.
                os.fsync(stream.fileno())
