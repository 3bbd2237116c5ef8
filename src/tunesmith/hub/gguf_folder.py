"""Writer of a Transformers folder with the contents of a .gguf file.

The packages gguf and Transformers read the file.
"""

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
from tunesmith.model.arch.spec import one_line
from tunesmith.model.known.dtypes import DTYPES
from tunesmith.model.weights.safetensors_files import SINGLE


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Suppress the output of gguf and Transformers, and convert their errors to ModelError."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        # Hide the progress bars of tqdm, which are written to stderr.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except TunesmithError:
        raise
    # Catch any exception: gguf and Transformers raise many types for truncated or unknown files.
    except Exception as error:
        raise ModelError(
            f"{file.name} cannot be read as a model",
            where=file,
            why=one_line(error),
            fix="download the file again, or use the model's safetensors on the Hub",
        ) from error
    finally:
        hf_logging.set_verbosity(level)


def write_folder(file: Path, dtype: str | None, folder: Path) -> None:
    """Write the config, the tokenizer and the weights of a .gguf file to a folder.

    The weights are written in `dtype`. If `dtype` is None, they are not written.
    """
    with _reading(file):
        tokenizer = _read_tokenizer(file)
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
    # Write each file separately. `model.save_pretrained` refuses a model that was loaded from a
    # quantized file.
    model.generation_config.save_pretrained(folder)
    name = str(DTYPES[dtype]).removeprefix("torch.")
    _save_config(model.config, folder, dtype=name, architectures=[type(model).__name__])
    _save_tokenizer(tokenizer, folder, file)
    # Use named_parameters, which yields a tied tensor only once. It yields no buffers, but
    # checkpoints of these model families contain none.
    state = {
        name: tensor.detach().to(DTYPES[dtype]).contiguous()
        for name, tensor in model.named_parameters()
    }
    save_file(state, folder / SINGLE, metadata={"format": "pt"})


def _read_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    header = {key: field.contents() for key, field in GGUFReader(file).fields.items()}
    if header.get("general.type") == "adapter":
        base = header.get("general.base_model.0.name", "BASE.gguf")
        raise ModelError(
            f"{file.name} holds an adapter, not a model",
            where=file,
            why=f"the adapter's base is {base}",
            fix="use the file of the base model; to serve both files, run "
            f"`llama-server -m {shell_path(base)} --lora {shell_path(file)}`",
        )
    return read_file_tokenizer(header, str(file))


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, file: Path) -> None:
    """Save the tokenizer in `folder`, which already contains config.json.

    Raise ModelError if Transformers loads the saved files as a tokenizer that splits text
    differently.
    """
    tokenizer.save_pretrained(folder)
    # Load the saved files to check them. For some model types, such as qwen2, AutoTokenizer uses a
    # class that ignores the saved pre-tokenizer.
    read = AutoTokenizer.from_pretrained(folder)
    if split_text(read) != split_text(tokenizer):
        raise unknown_tokenizer(
            str(file),
            f"Transformers loads the tokenizer as a {type(read).__name__}, which splits text "
            "differently",
        )


def _save_config(config: PretrainedConfig, folder: Path, **values: object) -> None:
    values = {**config.to_dict(), **values}
    # Remove the quantization config, because the weights are dequantized. Also remove
    # `_name_or_path`, which is a path on this machine.
    for key in ("quantization_config", "_name_or_path"):
        values.pop(key, None)
    type(config).from_dict(values).save_pretrained(folder)
