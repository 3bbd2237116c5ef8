"""Export of a run as a GGUF file with the model classes of llama.cpp's converter.

    parent process: convert  ->  child process: run_child
    ->  plan names, keys and types  ->  write one tensor at a time

The converter includes its own version of the package `gguf`. Therefore it runs in a child process
in which the converter's folders are first on PYTHONPATH. No merged model is written: the converter
reads the weights of the run through lazy tensors, which have the names in the base model's files.
The converter's classes choose the names, the keys and the tensors that are always in F32. tunesmith
chooses the types of quantized tensors, and quantizes them, as in all exports (`types.py`,
`quantize.py`).

This module replaces internal methods of the converter, so it is tested with the pinned version of
the converter.
"""

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.answers.load_run import RunLocation, read_run_files
from tunesmith.errors import CheckpointError, ModelError, TunesmithError
from tunesmith.host.child_output import exit_text, last_line
from tunesmith.host.files import require_disk_space
from tunesmith.model.weights.safetensors_files import Entry, read_json
from tunesmith.model.weights.save_tensors import JoinedRows, Read, TensorPart, written_bands
from tunesmith.model.weights.stored_form import MODEL_CONFIG, updated_config
from tunesmith.tools.export.gguf.converter import PINNED_SHA256, Converter
from tunesmith.tools.export.gguf.ollama import guard_template
from tunesmith.tools.export.gguf.plan import add_keys, header_bytes, header_values, padded
from tunesmith.tools.export.gguf.quantize import load_ggml_if_needed
from tunesmith.tools.export.gguf.tokenizer import model_name, other_end_id, read_gguf_tokenizer
from tunesmith.tools.export.gguf.types import PlainTensor, tensor_bytes, tensor_types
from tunesmith.tools.export.gguf.write import BandThreads, Progress, tensor_jobs, write_tensors
from tunesmith.tools.export.merge import copy_sentencepiece, write_generation_config
from tunesmith.tools.export.output import OTHER_DISK
from tunesmith.tools.export.tuned_weights import TunedModel, open_tuned_model, stored_sources

# Layer types of Transformers 5 -> the older names for Granite, which the converter expects.
_GRANITE_LAYERS = {"linear_attention": "mamba", "full_attention": "attention"}


@dataclass(frozen=True)
class Conversion:
    """Job that the parent process sends to the child process.

    Attributes:
        location: the exported run.
        quant: the quantization, a name of `types.GGUF_QUANT_TYPES`.
        name: the model's name in the file.
        threads: number of threads that quantize.
        for_ollama: apply `guard_template` to the chat template, so that Ollama does not replace it.
    """

    location: RunLocation
    quant: str
    name: str
    threads: int
    for_ollama: bool


def convert(
    conversion: Conversion,
    converter: Converter,
    progress: Progress,
    file: Path,
) -> list[str]:
    """Write a GGUF file with the converter, in a child process.

    Return notes for the user: differences between llama.cpp and Transformers.

    Args:
        progress: function that is called with the number of written bytes and the file size.
        file: path of the GGUF file.

    Raises:
        ModelError: the converter cannot convert this model.
        MachineError: the disk has too little free space.
        CheckpointError: the child process ended without an answer.
    """
    # Remove the working directory from sys.path with -P, because it may contain a folder `gguf`.
    command = [sys.executable, "-P", "-c", f"from {__name__} import run_child; run_child()"]
    # Write the child's stderr to a file. With a pipe that nobody reads, the child would block when
    # the pipe is full.
    with (
        tempfile.TemporaryFile() as messages,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            env=converter.environment,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((conversion, converter, file), process.stdin)
            process.stdin.close()
            while True:
                answer = pickle.load(process.stdout)
                if isinstance(answer, Exception):
                    raise answer
                if isinstance(answer, list):  # the notes, which are the last answer
                    return answer
                progress(*answer)
        except (EOFError, BrokenPipeError) as error:
            process.wait()
            messages.seek(0)
            last = last_line(messages.read().decode(errors="replace"))
            raise CheckpointError(
                "the process of llama.cpp's converter ended without a result",
                where=converter.folder,
                why=f"{exit_text(process.returncode)}: {last}".removesuffix(": "),
                fix="free memory, and run the same command again, or use another --converter",
            ) from error
        finally:
            process.kill()


def run_child() -> None:
    """Run the job that the parent process sends, and send back the progress and the result.

    This is the main function of the child process.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # The converter prints messages to stdout. Redirect stdout to stderr, so that they do not mix
    # with the pickled answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(answer: object) -> None:
        # If the parent process has ended, this raises an error, which ends the child process too.
        pickle.dump(answer, answers)
        answers.flush()

    conversion, converter, path = pickle.load(sys.stdin.buffer)
    try:
        notes = _convert(conversion, converter, path, lambda done, total: send((done, total)))
    except (TunesmithError, OSError) as error:
        send(error)
    else:
        send(notes)


def _convert(
    conversion: Conversion,
    converter: Converter,
    path: Path,
    progress: Progress,
) -> list[str]:
    """Write the GGUF file with the converter's classes, one tensor at a time.

    Return notes for the user.
    """
    import gguf  # the converter's version

    tuned = open_tuned_model(read_run_files(conversion.location))
    if conversion.for_ollama:
        guard_template(tuned.tokenizer)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
        try:
            writer, notes = _plan_with_converter(tuned, conversion, Path(scratch))
        except TunesmithError:
            raise
        except Exception as error:
            raise _refusal(tuned, converter, error) from error
        (infos,) = writer.tensors
        plain = {name: PlainTensor(info.shape, info.dtype.name) for name, info in infos.items()}
        types = tensor_types(plain, conversion.quant, header_values(writer))
        load_ggml_if_needed(types.values())
        for name, info in infos.items():
            info.dtype = gguf.GGMLQuantizationType[types[name]]
            info.nbytes = tensor_bytes(types[name], info.shape)
        header = header_bytes(writer, [])
        size = len(header) + sum(padded(info.nbytes) for info in infos.values())
        require_disk_space(path, size, what=path.name, fix=OTHER_DISK)

        def quantized(workers: BandThreads) -> Iterator[Iterator[memoryview]]:
            for name, info in infos.items():
                # Clear the writer's reference to the tensor, so that only one tensor is in memory
                # at a time.
                lazy, info.tensor = info.tensor, None
                values = torch.from_numpy(gguf.LazyNumpyTensor.to_eager(lazy))
                del lazy
                yield workers.run(tensor_jobs(values, types[name], name))
                del values

        with BandThreads(conversion.threads) as workers:
            write_tensors(path, header, quantized(workers), lambda written: progress(written, size))
    return list(notes)


def _refusal(tuned: TunedModel, converter: Converter, error: Exception) -> ModelError:
    """Build the error for a model that the converter cannot convert."""
    model_type = tuned.model.config.get_text_config().model_type
    why = str(error).strip().split("\n")[-1]
    if converter.sha256 != PINNED_SHA256:
        why += "; the tested version of the converter is in llama-cpp-python 0.3.36"
    return ModelError(
        f"llama.cpp's converter cannot convert this {model_type} model",
        where=converter.folder,
        why=f"{type(error).__name__}: {why}",
        fix="run `tunesmith merge RUN --output FOLDER`, then serve FOLDER, or convert FOLDER with "
        "another version of llama.cpp: python convert_hf_to_gguf.py FOLDER (a full fine-tune needs "
        "no merge: use its folder final/)",
    )


def _plan_with_converter(
    tuned: TunedModel, conversion: Conversion, scratch: Path
) -> tuple[Any, tuple[str, ...]]:
    """Plan a GGUF file with the model classes of llama.cpp's converter.

    Return the converter's writer, which holds all keys and lazy fp32 tensors, and notes for the
    user. The small files that the converter reads are written to the folder `scratch`.
    """
    import gguf  # the converter's version

    config = updated_config(read_json(tuned.files.folder / MODEL_CONFIG), tuned.model)
    if config.get("model_type") == "granitemoehybrid":
        config["layer_types"] = [_GRANITE_LAYERS.get(kind, kind) for kind in config["layer_types"]]
    if config.get("model_type") == "gemma4_unified":
        # The converter's class requires the width of the experts, although this model has no
        # experts.
        config["text_config"].setdefault("moe_intermediate_size", None)
    # Write the config and tokenizer files for the converter, as a merge would write them.
    folder = scratch / conversion.name
    tuned.tokenizer.save_pretrained(folder)
    write_generation_config(tuned, folder)
    (folder / MODEL_CONFIG).write_text(json.dumps(config), encoding="utf-8")

    base = import_module("conversion.base")
    architecture = base.get_model_architecture(config, base.ModelType.TEXT)
    model_class = import_module("conversion").get_model_class(architecture)
    # Leave out the layers for multi-token prediction (MTP). They are not trained, so they would not
    # match the tuned model.
    model_class.no_mtp = bool(model_class.supports_mtp_export)
    tensors = _lazy_tensors(tuned)

    def index_tensors(self: Any, remote_hf_model_id: str | None = None) -> dict[str, Any]:
        return dict(filter(None, map(self.filter_tensors, tensors.items())))

    base.ModelBase.index_tensors = index_tensors
    gguf.quants.quantize = lambda data, ggml_type: data
    prefix = "ALL" if conversion.quant == "f32" else "MOSTLY"
    file_type = gguf.LlamaFileType[f"{prefix}_{conversion.quant.upper()}"]
    # The converter does not quantize. If the file will be quantized, it plans the tensors in bf16.
    is_quantized = conversion.quant not in ("f32", "f16", "bf16")
    plain_type = gguf.LlamaFileType.MOSTLY_BF16 if is_quantized else file_type
    model = model_class(folder, plain_type, folder / "model.gguf", hparams=config)
    # Some classes of the converter are wrappers: the actual model is in `impl`.
    model = getattr(model, "impl", model)
    model.model_name = conversion.name
    model.prepare_tensors()
    model.ftype = file_type
    notes = _choose_tokenizer(model, tuned)
    model.prepare_metadata(vocab_only=False)
    return model.gguf_writer, notes


def _choose_tokenizer(model: Any, tuned: TunedModel) -> tuple[str, ...]:
    """Make the converter's model class write tunesmith's tokenizer keys. Return notes for the user.

    If tunesmith does not support the tokenizer, the converter writes its own keys. In both cases
    the check in llama.cpp compares the token ids.
    """
    infos = model.gguf_writer.tensors[0]
    for name, info in infos.items():
        if info.tensor.dtype != "float32":
            raise TypeError(
                f"the tensor {name} has the dtype {info.tensor.dtype} instead of float32"
            )
    rows = infos["token_embd.weight"].shape[0]
    config = tuned.model.config.get_text_config().to_dict()
    turn_end = other_end_id(tuned)
    try:
        tokenizer = read_gguf_tokenizer(tuned.tokenizer, rows, config, turn_end)
    except ModelError:
        # Some of the converter's classes load the tokenizer with the base model's Python code.
        # Return the loaded tokenizer instead.
        auto_tokenizer: Any = import_module("transformers").AutoTokenizer
        auto_tokenizer.from_pretrained = lambda *args, **options: tuned.tokenizer
        copy_sentencepiece(tuned, model.dir_model)
        if turn_end is not None:
            model.gguf_writer.add_eot_token_id(turn_end)
        return ()
    model.set_vocab = partial(add_keys, model.gguf_writer, tokenizer.keys)
    model.model_name = model_name(model.model_name, tokenizer.strips_space)
    return tokenizer.notes


def _lazy_tensors(tuned: TunedModel) -> dict[str, Callable[[], Any]]:
    """Return a dict from tensor names to functions that build lazy tensors of the text model.

    The names are those in the base model's files.
    """
    sources, read = stored_sources(tuned, torch.float32)
    makers: dict[str, Callable[[], Any]] = {}
    for name, source in sources.items():
        # Skip weights of the base model's files that the text model does not have. They are
        # instances of `Entry`.
        if isinstance(source, Entry):
            continue
        tensor = source.tensors[0] if isinstance(source, JoinedRows) else source
        tensor = tensor.tensor if isinstance(tensor, TensorPart) else tensor
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        makers[name] = partial(
            import_module("conversion.base").LazyTorchTensor,
            meta=torch.empty(source.shape, dtype=dtype, device="meta"),
            args=(source, dtype, read),
            func=_read_stored,
        )
    return makers


def _read_stored(
    source: Tensor | TensorPart | JoinedRows, dtype: torch.dtype, read: Read
) -> Tensor:
    """Read a tensor as the base model's files store it: a parameter, a part, or several joined."""
    values = torch.empty(source.shape, dtype=dtype)
    end = 0
    for band in written_bands(source, dtype, read):
        start, end = end, end + band.numel()
        values.view(-1)[start:end] = band.reshape(-1)
    return values
