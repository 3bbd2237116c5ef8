"""A run as a GGUF file, written with the model classes of llama.cpp's own converter.

    parent: convert  ->  child: run_child  ->  plan: names, keys, types  ->  one tensor at a time

The converter has a package `gguf` of its own, so it runs in a child process, which has its folder
first on PYTHONPATH. No merged model is written: the converter reads the weights of the run through
lazy tensors, under the names that the base stores them by. Its classes decide on the names, the
keys and what is always in F32. The types of quantized tensors and their bytes are those of all
exports (`types.py`, `quantize.py`).

The methods that are replaced here are internal to the converter, and are tested with the pinned
version.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.checkpoint.contents import weights_of
from tunesmith.errors import CheckpointError, ModelError, TunesmithError
from tunesmith.host.child_output import exit_text, last_line
from tunesmith.host.files import require_disk_space
from tunesmith.inference.load_run import RunLocation, read_run_files
from tunesmith.model.safetensors_files import Entry, read_json
from tunesmith.model.save_tensors import JoinedRows, TensorPart
from tunesmith.model.stored_form import MODEL_CONFIG, in_stored_form, updated_config
from tunesmith.tools.export.gguf.converter import Converter
from tunesmith.tools.export.gguf.ollama import guard_template
from tunesmith.tools.export.gguf.plan import header_bytes, padded
from tunesmith.tools.export.gguf.quantize import ggml, needs_ggml
from tunesmith.tools.export.gguf.tokenizer import add_tokenizer, model_name, read_gguf_tokenizer
from tunesmith.tools.export.gguf.types import PlainTensor, tensor_bytes, tensor_types
from tunesmith.tools.export.gguf.write import BandThreads, tensor_jobs
from tunesmith.tools.export.merge import SENTENCEPIECE, write_generation_config
from tunesmith.tools.export.output import OTHER_DISK
from tunesmith.tools.export.tuned_weights import (
    TunedModel,
    TunedWeight,
    open_tuned_model,
    row_bands,
)

# Transformers 5 has one name for the layers of all hybrids, and the converter has the older ones.
_GRANITE_LAYERS = {"linear_attention": "mamba", "full_attention": "attention"}


@dataclass(frozen=True)
class Conversion:
    """The job of the child process.

    Attributes:
        name: the model's name in the file.
        for_ollama: the chat template is guarded as `guard_template` does.
    """

    location: RunLocation
    quant: str
    name: str
    threads: int
    for_ollama: bool


@dataclass(frozen=True)
class WrittenFile:
    """A GGUF file that was written.

    Attributes:
        size: in bytes.
        notes: for the user: what llama.cpp computes in another way.
    """

    size: int
    notes: tuple[str, ...]


def convert(
    conversion: Conversion,
    converter: Converter,
    progress: Callable[[int, int], None],
    file: Path,
) -> WrittenFile:
    """Write the file in a child process; `progress` gets the bytes written and those of the file.

    Raises:
        ModelError: the converter cannot convert this model.
        MachineError: the disk has no room.
        CheckpointError: the child process ended without an answer.
    """
    # -P: a folder `gguf` in the working directory is not the converter's.
    command = [sys.executable, "-P", "-c", f"from {__name__} import run_child; run_child()"]
    # A file rather than a pipe: the child would wait at a full pipe that nobody reads.
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
                if isinstance(answer, WrittenFile):
                    return answer
                progress(*answer)
        except (EOFError, BrokenPipeError) as error:
            process.wait()
            messages.seek(0)
            last = last_line(messages.read().decode(errors="replace"))
            raise CheckpointError(
                "llama.cpp's converter ended without an answer",
                where=str(converter.folder),
                why=f"{exit_text(process.returncode)}: {last}".removesuffix(": "),
                fix="free memory, and run the same command again",
            ) from error
        finally:
            process.kill()


def run_child() -> None:
    """Convert what the parent process sends, and send it the progress and the result."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # The converter prints its own progress.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(answer: object) -> None:
        # An error here means that the parent is gone, and ends this process too.
        pickle.dump(answer, answers)
        answers.flush()

    conversion, converter, path = pickle.load(sys.stdin.buffer)
    try:
        written = _convert(conversion, converter, path, lambda done, total: send((done, total)))
    except (TunesmithError, OSError) as error:
        send(error)
    else:
        send(written)


def _convert(
    conversion: Conversion,
    converter: Converter,
    path: Path,
    progress: Callable[[int, int], None],
) -> WrittenFile:
    """Plan the file with the converter's classes, then write tensor by tensor."""
    import gguf  # the converter's

    tuned = open_tuned_model(read_run_files(conversion.location))
    if conversion.for_ollama:
        guard_template(tuned.files.tokenizer)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
        try:
            writer, notes = _plan_with_converter(tuned, conversion, Path(scratch))
        except TunesmithError:
            raise
        except Exception as error:
            raise _refusal(tuned, converter, error) from error
        (infos,) = writer.tensors
        plain = {name: PlainTensor(info.shape, info.dtype.name) for name, info in infos.items()}
        header = {key: value.value for key, value in writer.kv_data[0].items()}
        types = tensor_types(plain, conversion.quant, header)
        # A missing package shows now, not after the first gigabytes.
        if any(map(needs_ggml, types.values())):
            ggml()
        for name, info in infos.items():
            info.dtype = gguf.GGMLQuantizationType[types[name]]
            info.nbytes = tensor_bytes(types[name], info.shape)
        head = header_bytes(writer, [])
        size = len(head) + sum(padded(info.nbytes) for info in infos.values())
        require_disk_space(path, size, what=path.name, fix=OTHER_DISK)
        with BandThreads(conversion.threads) as workers, path.open("wb") as file:
            file.write(head)
            for name, info in infos.items():
                # Nothing else refers to the values, so that one tensor at a time is in memory.
                lazy, info.tensor = info.tensor, None
                values = torch.from_numpy(gguf.LazyNumpyTensor.to_eager(lazy))
                del lazy
                for data in workers.run(tensor_jobs(values, types[name], name)):
                    file.write(data)
                del values
                file.write(bytes(padded(info.nbytes) - info.nbytes))
                progress(file.tell(), size)
            file.flush()
            os.fsync(file.fileno())
    return WrittenFile(size, notes)


def _refusal(tuned: TunedModel, converter: Converter, error: Exception) -> ModelError:
    """Return the error for a model that the converter's classes do not convert."""
    model_type = tuned.model.config.get_text_config().model_type
    why = str(error).strip().split("\n")[-1]
    if not converter.is_pinned:
        why += "; the tested version is that in llama-cpp-python 0.3.36"
    return ModelError(
        f"llama.cpp's converter does not convert this {model_type} model",
        where=str(converter.folder),
        why=f"{type(error).__name__}: {why}",
        fix="tunesmith merge RUN --output FOLDER, then serve FOLDER, or convert it with another "
        "llama.cpp: python convert_hf_to_gguf.py FOLDER",
    )


def _plan_with_converter(
    tuned: TunedModel, conversion: Conversion, scratch: Path
) -> tuple[Any, tuple[str, ...]]:
    """Return the converter's writer, with all keys and lazy fp32 tensors of the file, and notes."""
    import gguf  # the converter's

    config = updated_config(read_json(tuned.files.folder / MODEL_CONFIG), tuned.model)
    if config.get("model_type") == "granitemoehybrid":
        config["layer_types"] = [_GRANITE_LAYERS.get(kind, kind) for kind in config["layer_types"]]
    if config.get("model_type") == "gemma4_unified":
        # Its class asks for the width of experts, which this model does not have.
        config["text_config"].setdefault("moe_intermediate_size", None)
    # The converter reads the small files of a model's folder: those that a merge would write.
    folder = scratch / conversion.name
    tuned.files.tokenizer.save_pretrained(folder)
    write_generation_config(tuned, folder)
    (folder / MODEL_CONFIG).write_text(json.dumps(config), encoding="utf-8")

    base = import_module("conversion.base")
    architecture = base.get_model_architecture(config, base.ModelType.TEXT)
    model_class = import_module("conversion").get_model_class(architecture)
    # Draft heads are not trained, and would no longer fit.
    model_class.no_mtp = bool(model_class.supports_mtp_export)
    tensors = _lazy_tensors(tuned)

    def index_tensors(self: Any, remote_hf_model_id: str | None = None) -> dict[str, Any]:
        return dict(filter(None, map(self.filter_tensors, tensors.items())))

    base.ModelBase.index_tensors = index_tensors
    gguf.quants.quantize = lambda data, ggml_type: data
    prefix = "ALL" if conversion.quant == "f32" else "MOSTLY"
    file_type = gguf.LlamaFileType[f"{prefix}_{conversion.quant.upper()}"]
    # A quantization starts from a file in bf16.
    is_quantized = conversion.quant not in ("f32", "f16", "bf16")
    plain_type = gguf.LlamaFileType.MOSTLY_BF16 if is_quantized else file_type
    model = model_class(folder, plain_type, folder / "model.gguf", hparams=config)
    # Some classes only choose another one.
    model = getattr(model, "impl", model)
    model.model_name = conversion.name
    model.prepare_tensors()
    model.ftype = file_type
    notes = _choose_tokenizer(model, tuned)
    model.prepare_metadata(vocab_only=False)
    return model.gguf_writer, notes


def _choose_tokenizer(model: Any, tuned: TunedModel) -> tuple[str, ...]:
    """Let a converter's class write tunesmith's tokenizer part; return its notes.

    The class writes its own if tunesmith refuses the tokenizer. The check in llama.cpp compares the
    ids of both.
    """
    files = tuned.files
    infos = model.gguf_writer.tensors[0]
    for name, info in infos.items():
        if info.tensor.dtype != "float32":
            raise TypeError(f"{name} is {info.tensor.dtype}: the converter has other internals")
    rows = infos["token_embd.weight"].shape[0]
    config = tuned.model.config.get_text_config().to_dict()
    ends = tuned.template.end_ids - {files.tokenizer.eos_token_id}
    turn_end = min(ends, default=None)
    try:
        tokenizer = read_gguf_tokenizer(files.tokenizer, rows, config, turn_end)
    except ModelError:
        # Some classes would run Python code that comes with a base.
        auto_tokenizer: Any = import_module("transformers").AutoTokenizer
        auto_tokenizer.from_pretrained = lambda *args, **options: files.tokenizer
        # A `tokenizer.model` knows no added tokens.
        pieces = files.folder / SENTENCEPIECE
        if pieces.is_file() and not files.model.added_tokens:
            shutil.copyfile(pieces, model.dir_model / SENTENCEPIECE)
        if turn_end is not None:
            model.gguf_writer.add_eot_token_id(turn_end)
        return ()
    model.set_vocab = partial(add_tokenizer, model.gguf_writer, tokenizer)
    model.model_name = model_name(model.model_name, tokenizer.strips_space)
    return tokenizer.notes


def _lazy_tensors(tuned: TunedModel) -> dict[str, Callable[[], Any]]:
    """Return functions that make the lazy tensors of the text model, by the base's names."""
    shapes = {name: tensor.to("meta") for name, tensor in weights_of(tuned.model).items()}
    weights = {id(tensor): tuned.weights[name] for name, tensor in shapes.items()}
    makers: dict[str, Callable[[], Any]] = {}
    for name, source in in_stored_form(tuned.model, shapes).items():
        # Copied from the base's files: parts that are not in the text model.
        if isinstance(source, Entry):
            continue
        sources = source.tensors if isinstance(source, JoinedRows) else (source,)
        pieces = []
        for piece in sources:
            tensor = piece.tensor if isinstance(piece, TensorPart) else piece
            pieces.append((weights[id(tensor)], piece))
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        makers[name] = partial(
            import_module("conversion.base").LazyTorchTensor,
            meta=torch.empty(source.shape, dtype=dtype, device="meta"),
            args=(pieces, dtype),
            func=_read_stored,
        )
    return makers


def _read_stored(
    pieces: list[tuple[TunedWeight, Tensor | TensorPart]], dtype: torch.dtype
) -> Tensor:
    """Read what the base stores as one tensor: the rows of one or more pieces."""
    if len(pieces) == 1:
        return _read_piece(*pieces[0], dtype)
    return torch.cat([_read_piece(weight, piece, dtype) for weight, piece in pieces])


def _read_piece(weight: TunedWeight, source: Tensor | TensorPart, dtype: torch.dtype) -> Tensor:
    """Read a tensor, or a part of it."""
    if not weight.shape:
        return weight.rows(0, 1)
    region = tuple(slice(0, size) for size in weight.shape)
    if isinstance(source, TensorPart):
        region = source.region
    first = region[0].start
    values = torch.empty([span.stop - span.start for span in region], dtype=dtype)
    for band in row_bands(weight.shape, region[0]):
        rows = weight.rows(band.start, band.stop)
        values[band.start - first : band.stop - first] = rows[(slice(None), *region[1:])]
    return values[0] if isinstance(source, TensorPart) and source.stacked else values
