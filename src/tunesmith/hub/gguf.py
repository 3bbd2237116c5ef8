"""Convert a .gguf file to a Transformers folder, once, in a cache.

Transformers reads the format and dequantizes it (`gguf_file=`), which takes minutes and a full copy
in memory. The folder is written beside its place and renamed, so that a stopped conversion leaves
nothing incomplete.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import tempfile
from pathlib import Path

from tunesmith.errors import MachineError, ModelError
from tunesmith.host.files import cache_folder, follow_umask, remove_abandoned
from tunesmith.host.memory import open_uncached
from tunesmith.host.packages import require
from tunesmith.model.safetensors_files import unreadable_file

log = logging.getLogger(__name__)

MAGIC = b"GGUF"
LAYOUT = 1  # goes up when what is written changes, so that older conversions are repeated


def convert_gguf(file: Path, dtype: str) -> Path:
    """The Transformers folder of a .gguf file, its weights in `dtype` (`bf16`, ...), converted now
    or earlier.

    ModelError where Transformers cannot read the file, MachineError where the package or the cache
    is missing.
    """
    file = file.resolve()
    try:
        stat = file.stat()
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
    identity = json.dumps([str(file), stat.st_size, stat.st_mtime_ns, dtype, LAYOUT])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    cache = cache_folder("models")
    target = cache / f"{file.stem}-{dtype}-{digest}"
    if target.is_dir():
        return target
    require("gguf", where=str(file), fix="use the safetensors version of this model on the Hub")
    log.info(f"converting {file.name} to {dtype} safetensors, once, in {target}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        remove_abandoned(cache)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".converting-") as scratch:
            folder = Path(scratch) / "model"
            _convert(file, dtype, folder)
            follow_umask(folder)
            for read_file in (file, folder / "model.safetensors"):
                with open_uncached(read_file) as stream:
                    # What is not on the disk yet would stay in the page cache.
                    os.fsync(stream.fileno())
            try:
                folder.rename(target)
            except OSError:
                # Else another process finished the same conversion first.
                if not target.is_dir():
                    raise
    except OSError as error:
        raise MachineError(
            "the converted model cannot be written",
            where=str(cache),
            why=str(error),
            fix="free disk space, or set TUNESMITH_CACHE to another folder",
        ) from error
    return target


def _convert(file: Path, dtype: str, folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    from tunesmith.model.dtypes import DTYPES
    from tunesmith.model.load import one_line

    torch_dtype = DTYPES[dtype]
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        # Hides the bars that tqdm draws.
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch_dtype
            )
    # gguf and Transformers raise many kinds for a file that is cut off or unknown to them.
    except Exception as error:
        raise ModelError(
            f"{file.name} cannot be read as a model",
            where=str(file),
            why=one_line(error),
            fix="download it again, or use the model's safetensors on the Hub",
        ) from error
    finally:
        hf_logging.set_verbosity(level)
    # Written file by file, not by save_pretrained: it refuses a model that was loaded from a
    # quantized file.
    config = model.config.to_dict()
    # The weights are plain now, and the path is of this machine.
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    config["dtype"] = str(torch_dtype).removeprefix("torch.")
    config["architectures"] = [type(model).__name__]
    # named_parameters names a shared tensor once, and no buffer of these families is in a
    # checkpoint.
    state = {
        name: tensor.detach().to(torch_dtype).contiguous()
        for name, tensor in model.named_parameters()
    }
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    type(model.config).from_dict(config).save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
