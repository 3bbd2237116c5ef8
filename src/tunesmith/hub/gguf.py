"""Convert a .gguf file to a Transformers folder, once, in a cache.

Transformers reads the weights and dequantizes them (`gguf_file=`), which takes minutes and a full
copy in memory; tokens are counted by a folder without weights, which takes seconds. The tokenizer
is the file's own (gguf_tokenizer.py). A folder is written beside its place and renamed, so that a
stopped conversion leaves nothing incomplete.
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
from tunesmith.model.safetensors_files import SINGLE, unreadable_file

log = logging.getLogger(__name__)

MAGIC = b"GGUF"
# Goes up when what is written changes, so that older conversions are repeated.
CONVERSION_VERSION = 2
WITHOUT_WEIGHTS = "without-weights"  # in the name of such a folder


def convert_gguf(file: Path, dtype: str | None) -> Path:
    """The Transformers folder of a .gguf file, converted now or earlier.

    Args:
        dtype: of its weights (`bf16`, ...). None: any folder that is there will do, else one with
            configuration and tokenizer alone: to count tokens takes no more, and no minutes.

    ModelError where Transformers cannot read the file, MachineError where the package or the cache
    is missing.
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
            where=str(file),
            why=f"it begins with {start!r}, not {MAGIC!r}",
            fix="download it again; a small file is often a saved web page or a Git LFS pointer",
        )
    for content in (dtype,) if dtype else (*get_args(Dtype), WITHOUT_WEIGHTS):
        target = _cached_folder(file, content)
        if target.is_dir():
            return target
    _write_once(file, target, dtype)
    return target


def _cached_folder(file: Path, content: str) -> Path:
    """Locate the cache's folder of this version of a file; `content` is part of its name."""
    stat = file.stat()
    identity = json.dumps([str(file), stat.st_size, stat.st_mtime_ns, content, CONVERSION_VERSION])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return cache_folder("models") / f"{file.stem}-{content}-{digest}"


def _write_once(file: Path, target: Path, dtype: str | None) -> None:
    """Write a folder, without weights where there is no `dtype` for them, and move it to `target`
    when it is complete.
    """
    require("gguf", where=str(file), fix="use the safetensors version of this model on the Hub")
    from tunesmith.hub.gguf_folder import write_folder

    what = f"to {dtype} safetensors" if dtype else "without its weights"
    log.info(f"converting {file.name} {what}, once, in {target}")
    with cached_once(target, what="the converted model") as folder:
        write_folder(file, dtype, folder)
        follow_umask(folder)
        for read_file in (file, *folder.glob(SINGLE)):
            with open_uncached(read_file) as stream:
                # What is not on the disk yet would stay in the page cache.
                os.fsync(stream.fileno())
