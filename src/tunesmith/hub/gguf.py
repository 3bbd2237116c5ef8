"""Convert a .gguf file to a Transformers folder, once, in a cache.

Transformers reads the format and dequantises it (`gguf_file=`), which takes minutes and a full copy in memory. The
folder is written beside its place and renamed, so that a stopped conversion leaves nothing incomplete.
"""

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from tunesmith.errors import MachineError, ModelError
from tunesmith.host.files import cache_folder, follow_umask, remove_abandoned
from tunesmith.host.memory import open_uncached
from tunesmith.host.packages import require
from tunesmith.model.safetensors_files import unreadable_file

MAGIC = b"GGUF"
LAYOUT = 1  # goes up when what is written changes, so that older conversions are made again


def convert_gguf(file: Path, dtype: str, say: Callable[[str], None]) -> Path:
    """The Transformers folder of a .gguf file, its weights in `dtype` (`bf16`, ...), converted now or before.

    ModelError where Transformers cannot read the file, MachineError where the package or the cache is missing.
    """
    file = file.resolve()
    try:
        stat = file.stat()
        with file.open("rb") as f:
            start = f.read(len(MAGIC))
    except OSError as error:
        raise unreadable_file(file, error) from error
    if start != MAGIC:
        why = f"it begins with {start!r}, not {MAGIC!r}"
        fix = "download it again; a small file is often a saved web page or a Git LFS pointer"
        raise ModelError(f"{file.name} is not a GGUF file", where=str(file), why=why, fix=fix)
    identity = json.dumps([str(file), stat.st_size, stat.st_mtime_ns, dtype, LAYOUT])
    target = (
        cache_folder("models")
        / f"{file.stem}-{dtype}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    )
    if target.is_dir():
        return target
    require("gguf", where=str(file), fix="take the Hub's safetensors of this model")
    say(f"converting {file.name} to {dtype} safetensors, once, in {target}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as scratch:
            made = Path(scratch) / "model"
            _convert(file, dtype, made)
            follow_umask(made)
            for read in (file, made / "model.safetensors"):
                with open_uncached(read) as pages:
                    os.fsync(pages.fileno())  # what is not on the disk yet would stay
            try:
                made.rename(target)
            except OSError:
                if not target.is_dir():  # else another process finished the same conversion first
                    raise
    except OSError as error:
        what, fix = (
            "the converted model cannot be written",
            "make room, or point TUNESMITH_CACHE at another folder",
        )
        raise MachineError(what, where=str(target.parent), why=str(error), fix=fix) from error
    return target


def _convert(file: Path, dtype: str, made: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from tunesmith.model.dtypes import DTYPES
    from tunesmith.model.load import one_line

    kept, level = DTYPES[dtype], logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the bars that tqdm draws
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=kept
            )
    except Exception as error:  # gguf and Transformers raise many kinds for a file that is cut off or unknown to them
        what, fix = (
            f"{file.name} cannot be read as a model",
            "download it again, or take the Hub's safetensors",
        )
        raise ModelError(what, where=str(file), why=one_line(error), fix=fix) from error
    finally:
        logging.set_verbosity(level)
    # Written file by file rather than by save_pretrained, which refuses a model that was loaded from a quantised file.
    config = model.config.to_dict()
    # The weights are plain now, and the path is of this machine
    for key in (
        "quantization_config",
        "_name_or_path",
    ):
        config.pop(key, None)
    config |= {"dtype": str(kept).removeprefix("torch."), "architectures": [type(model).__name__]}
    # named_parameters and named_buffers name a shared tensor once, and no buffer of these families is in a checkpoint
    state = {
        name: tensor.detach().to(kept).contiguous() for name, tensor in model.named_parameters()
    }
    made.mkdir()
    tokenizer.save_pretrained(made)
    model.generation_config.save_pretrained(made)
    type(model.config).from_dict(config).save_pretrained(made)
    save_file(state, made / "model.safetensors", metadata={"format": "pt"})
