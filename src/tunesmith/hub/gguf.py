"""Convert a .gguf file to a Transformers folder, once, in a cache.

Transformers reads the weights and dequantizes them (`gguf_file=`), which takes minutes and a full
copy in memory; tokens are counted by a folder without weights, which takes seconds. The tokenizer
is the file's own (gguf_tokenizer.py). A folder is written beside its place and renamed, so that a
stopped conversion leaves nothing incomplete.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import MachineError, ModelError, TunesmithError
from tunesmith.host.files import cache_folder, follow_umask, remove_abandoned
from tunesmith.host.memory import open_uncached
from tunesmith.host.packages import require
from tunesmith.host.shell import shell_path
from tunesmith.model.safetensors_files import SINGLE, unreadable_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

MAGIC = b"GGUF"
# Goes up when what is written changes, so that older conversions are repeated.
CONVERSION_VERSION = 2


def convert_gguf(file: Path, dtype: str) -> Path:
    """The Transformers folder of a .gguf file, its weights in `dtype` (`bf16`, ...), converted now
    or earlier.

    ModelError where Transformers cannot read the file, MachineError where the package or the cache
    is missing.
    """
    file = _check_gguf(file)
    target = _cached_folder(file, dtype)
    if not target.is_dir():
        what = f"converting {file.name} to {dtype} safetensors, once, in {target}"
        _write_once(file, target, what, partial(_convert, file, dtype))
    return target


def convert_gguf_without_weights(file: Path) -> Path:
    """A folder of `convert_gguf` if one is there, else one with configuration and tokenizer alone.

    To count tokens takes no more, and no minutes. Raises as `convert_gguf`.
    """
    from tunesmith.model.dtypes import DTYPES

    file = _check_gguf(file)
    for dtype in DTYPES:
        complete = _cached_folder(file, dtype)
        if complete.is_dir():
            return complete
    target = _cached_folder(file, "without-weights")
    if not target.is_dir():
        what = f"reading configuration and tokenizer of {file.name}, once, into {target}"
        _write_once(file, target, what, partial(_convert_without_weights, file))
    return target


def _check_gguf(file: Path) -> Path:
    """The file's absolute path; ModelError where it is no .gguf file."""
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
    return file


def _cached_folder(file: Path, content: str) -> Path:
    """Locate the cache's folder of this version of a file; `content` is part of its name."""
    try:
        stat = file.stat()
    except OSError as error:
        raise unreadable_file(file, error) from error
    identity = json.dumps([str(file), stat.st_size, stat.st_mtime_ns, content, CONVERSION_VERSION])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return cache_folder("models") / f"{file.stem}-{content}-{digest}"


def _write_once(file: Path, target: Path, what: str, write: Callable[[Path], None]) -> None:
    """Let `write` make a folder, and move it to `target` when it is complete; `what` is logged."""
    require("gguf", where=str(file), fix="use the safetensors version of this model on the Hub")
    log.info(what)
    cache = target.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        remove_abandoned(cache)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".converting-") as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            write(folder)
            follow_umask(folder)
            for read_file in (file, *folder.glob(SINGLE)):
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


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Let the libraries read a file silently; ModelError where they cannot."""
    from transformers.utils import logging as hf_logging

    from tunesmith.model.load import one_line

    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        # Hides the bars that tqdm draws.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except TunesmithError:
        raise
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


def _convert(file: Path, dtype: str, folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from tunesmith.model.dtypes import DTYPES

    torch_dtype = DTYPES[dtype]
    with _reading(file):
        tokenizer = _tokenizer_of(file)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch_dtype
        )
    # Written file by file, not by save_pretrained: it refuses a model that was loaded from a
    # quantized file.
    model.generation_config.save_pretrained(folder)
    _save_config(
        model.config,
        folder,
        dtype=str(torch_dtype).removeprefix("torch."),
        architectures=[type(model).__name__],
    )
    _save_tokenizer(tokenizer, folder, file)
    # named_parameters names a shared tensor once, and no buffer of these families is in a
    # checkpoint.
    state = {
        name: tensor.detach().to(torch_dtype).contiguous()
        for name, tensor in model.named_parameters()
    }
    save_file(state, folder / SINGLE, metadata={"format": "pt"})


def _convert_without_weights(file: Path, folder: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    with _reading(file):
        tokenizer = _tokenizer_of(file)
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    _save_config(config, folder)
    _save_tokenizer(tokenizer, folder, file)


def _tokenizer_of(file: Path) -> "PreTrainedTokenizerFast":
    from gguf import GGUFReader

    from tunesmith.hub.gguf_tokenizer import read_file_tokenizer

    header = {key: field.contents() for key, field in GGUFReader(file).fields.items()}
    if header.get("general.type") == "adapter":
        base = header.get("general.base_model.0.name")
        file_of_base = shell_path(base) if base else "BASE.gguf"
        raise ModelError(
            f"{file.name} holds an adapter, not a model",
            where=str(file),
            why=f"general.type is 'adapter'; its base is {base or 'not named in the file'}",
            fix=f"name the base's file: {file_of_base}; or to serve both: llama-server -m "
            f"{file_of_base} --lora {shell_path(file)}",
        )
    return read_file_tokenizer(header, str(file))


def _save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path, file: Path) -> None:
    """Save it beside config.json; ModelError where the two are read back as another tokenizer."""
    from transformers import AutoTokenizer

    from tunesmith.hub.gguf_tokenizer import split_text, unknown_tokenizer

    tokenizer.save_pretrained(folder)
    # Transformers has classes that split text in their own way for some model types, as qwen2.
    read = AutoTokenizer.from_pretrained(folder)
    if split_text(read) != split_text(tokenizer):
        why = f"Transformers reads it as a {type(read).__name__}, which splits text in another way"
        raise unknown_tokenizer(str(file), why)


def _save_config(config: "PretrainedConfig", folder: Path, **values: object) -> None:
    values = {**config.to_dict(), **values}
    # The weights are plain now, and the path is of this machine.
    for key in ("quantization_config", "_name_or_path"):
        values.pop(key, None)
    type(config).from_dict(values).save_pretrained(folder)
