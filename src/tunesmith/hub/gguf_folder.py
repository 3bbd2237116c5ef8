"""Write the Transformers folder of a .gguf file from what the libraries read of it."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

from gguf import GGUFReader
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as hf_logging

from tunesmith.errors import ModelError, TunesmithError
from tunesmith.host.shell import shell_path
from tunesmith.hub.gguf_tokenizer import read_file_tokenizer, split_text, unknown_tokenizer
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.load import one_line
from tunesmith.model.safetensors_files import SINGLE


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Let the libraries read a file silently; ModelError where they cannot."""
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


def write_folder(file: Path, dtype: str | None, folder: Path) -> None:
    """Write configuration and tokenizer of a .gguf file into a folder, and its weights in `dtype`
    unless it is None.
    """
    with _reading(file):
        tokenizer = _tokenizer_of(file)
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        if dtype is not None:
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=DTYPES[dtype]
            )
    if dtype is None:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        _save_config(config, folder)
        _save_tokenizer(tokenizer, folder, file)
        return
    # Written file by file, not by save_pretrained: it refuses a model that was loaded from a
    # quantized file.
    model.generation_config.save_pretrained(folder)
    name = str(DTYPES[dtype]).removeprefix("torch.")
    _save_config(model.config, folder, dtype=name, architectures=[type(model).__name__])
    _save_tokenizer(tokenizer, folder, file)
    # named_parameters names a shared tensor once, and no buffer of these families is in a
    # checkpoint.
    state = {
        name: tensor.detach().to(DTYPES[dtype]).contiguous()
        for name, tensor in model.named_parameters()
    }
    save_file(state, folder / SINGLE, metadata={"format": "pt"})


def _tokenizer_of(file: Path) -> PreTrainedTokenizerFast:
    header = {key: field.contents() for key, field in GGUFReader(file).fields.items()}
    if header.get("general.type") == "adapter":
        base = header.get("general.base_model.0.name", "BASE.gguf")
        raise ModelError(
            f"{file.name} holds an adapter, not a model",
            where=str(file),
            why=f"its base is {base}",
            fix=f"name the base's file; or to serve both: llama-server -m {shell_path(base)} "
            f"--lora {shell_path(file)}",
        )
    return read_file_tokenizer(header, str(file))


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, file: Path) -> None:
    """Save the tokenizer in `folder`, whose config.json is written already.

    ModelError where the two are read back as another tokenizer.
    """
    tokenizer.save_pretrained(folder)
    # Transformers has classes that split text in their own way for some model types, as qwen2.
    read = AutoTokenizer.from_pretrained(folder)
    if split_text(read) != split_text(tokenizer):
        why = f"Transformers reads it as a {type(read).__name__}, which splits text in another way"
        raise unknown_tokenizer(str(file), why)


def _save_config(config: PretrainedConfig, folder: Path, **values: object) -> None:
    values = {**config.to_dict(), **values}
    # The weights are plain now, and the path is of this machine.
    for key in ("quantization_config", "_name_or_path"):
        values.pop(key, None)
    type(config).from_dict(values).save_pretrained(folder)
