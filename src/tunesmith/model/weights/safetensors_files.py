"""Reading of safetensors files: headers are checked, and tensors are read by their position.

Files are not memory-mapped: a mapping would keep the entire checkpoint in the page cache, and
advising the kernel to drop the pages has no effect on mapped files. The format is: 8 bytes with the
header's length (little-endian), the JSON header, and the tensors
(https://huggingface.co/docs/safetensors). This module does not import torch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tunesmith.config.paths import gguf_fix
from tunesmith.errors import ModelError
from tunesmith.host.files import check_regular_files
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.units import count_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
Config = Mapping[str, Any]  # a parsed config.json, or a section of one
# Files of an adapter in PEFT's format.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Parameters of `weights_digest` and `sampled_digest`: the maximum number of sampled tensors, the
# bytes per sample, and the relative positions of the samples in a tensor.
SAMPLED_TENSORS = 4096
SAMPLE_BYTES = 64
MIDDLE = (0.5,)
ENDS_AND_MIDDLE = (0.0, 0.5, 1.0)
# Values of `quant_method` for which weights can be stored as bytes (U8). `shipped.py` decides which
# formats are supported.
FOUR_BITS = ("mxfp4", "compressed-tensors", "modelopt")
# File of ModelOpt that describes the quantization if config.json does not.
MODELOPT_CONFIG = "hf_quant_config.json"


@dataclass(frozen=True)
class Entry:
    """One tensor in a file. Its bytes are at [start, start + size) of the file.

    `dtype` is the name that safetensors uses, for example "BF16".
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int


def _damaged(file: Path, why: str) -> ModelError:
    return ModelError(
        f"{file.name} is damaged or not a safetensors file",
        where=file,
        why=why,
        fix="copy the file again; in the Hub's cache: hf cache rm model/MODEL, then "
        "tunesmith fetch MODEL",
    )


def unreadable_file(file: Path, error: OSError) -> ModelError:
    """Build the error for a file that the operating system cannot read."""
    why = error.strerror or str(error)
    return ModelError(
        f"{file.name} cannot be read",
        where=file,
        why=why,
        fix=f"check its permissions: ls -l {shell_path(file)}",
    )


def read_header(file: Path) -> list[Entry]:
    """Return the entries of the tensors of a file.

    The safetensors library checks the header against the file's size. It rejects gaps, overlaps and
    duplicate names.
    """
    check_regular_files(file)
    try:
        # The library checks the header, but does not return the offsets. Read these below.
        with safe_open(file, framework="np"):
            pass
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
    except OSError as error:
        raise unreadable_file(file, error) from error
    except SafetensorError as error:
        raise _damaged(file, f"{error}; it has {file.stat().st_size} bytes") from error
    header.pop("__metadata__", None)
    entries = []
    for name, values in header.items():
        begin, end = values["data_offsets"]
        # Offsets in the header start at the end of the header.
        start = 8 + length + begin
        shape = tuple(values["shape"])
        entries.append(Entry(name, values["dtype"], shape, file, start, end - begin))
    return entries


def _check_no_integers(entries: list[Entry], folder: Path) -> None:
    """Raise ModelError if the weights are stored as integers in an unsupported format.

    The supported formats are bitsandbytes nf4, and the bytes of mxfp4, nvfp4 and similar formats.
    I64 is not checked, because it is used for counters and indices, not for weights.
    """
    integers = [entry for entry in entries if entry.dtype in ("I8", "I16", "I32", "U8")]
    if not integers or any("bitsandbytes__" in entry.name for entry in entries):
        return
    why = "GPTQ, AWQ and compressed-tensors store weights as integers"
    if (folder / "config.json").exists():
        quantization = read_model_config(folder).get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method in FOUR_BITS and all(entry.dtype == "U8" for entry in integers):
            return
        if method:
            why = f"config.json calls them {method}"
    first = integers[0]
    shown = f"{first.name} ({first.dtype})"
    raise ModelError(
        f"the weights are quantized: {count_of(len(integers), 'tensor')} with integers, "
        f"such as {shown}",
        where=first.file,
        why=why,
        fix="use the unquantized model; model.quantize: nf4 then quantizes it as it is loaded",
    )


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return config.json, with the quantization from ModelOpt's separate file if there is one.

    Raise the errors of `read_json`.
    """
    config = read_json(folder / "config.json")
    file = folder / MODELOPT_CONFIG
    if "quantization_config" in config or not file.is_file():
        return config
    stated = read_json(file).get("quantization")
    if not isinstance(stated, dict):
        raise ModelError(
            f"the value of `quantization` is {stated!r:.100}: it must be a mapping",
            where=file,
            fix="fetch the model again: tunesmith fetch MODEL",
        )
    return config | {"quantization_config": {"quant_method": "modelopt", **stated}}


def read_json(
    file: Path, *, again: str = "fetch the model again: tunesmith fetch MODEL"
) -> dict[str, Any]:
    """Return the JSON object of a file. Raise ModelError with the file and line if it is invalid.

    Args:
        again: text that says how to get the file again, for the error message.
    """
    where = str(file)
    why = ""
    fix = f"correct the file, or {again}"
    check_regular_files(file)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        what = f"{file.name} has no JSON object"
    except FileNotFoundError:
        what = f"{file.name} is missing"
        where = str(file.parent)
        fix = f"put {file.name} into this folder, or {again}"
    except OSError as error:
        raise unreadable_file(file, error) from error
    except json.JSONDecodeError as error:
        what = f"{file.name} is not JSON: {error.msg}"
        where = f"{file}:{error.lineno}"
    except UnicodeDecodeError as error:
        what = f"{file.name} is not UTF-8 text"
        why = str(error)
    # The parser raises these errors, for example, for a number with 5,000 digits or for deeply
    # nested brackets.
    except (ValueError, RecursionError) as error:
        what = f"{file.name} cannot be read"
        why = str(error)
    raise ModelError(what, where=where, why=why, fix=fix)


def weight_files(folder: Path) -> list[str]:
    """Return the names of a model's safetensors files. Raise ModelError if the index is invalid."""
    index = folder / INDEX
    return indexed_files(index) if index.exists() else [SINGLE]


def indexed_files(index: Path) -> list[str]:
    """Return the weight files of an index as sorted paths relative to its folder.

    Raise ModelError if the index has no files, or if a path leads out of the folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        what = "the index has no weight_map of file names"
        raise ModelError(what, where=index, fix="fetch the model again: tunesmith fetch MODEL")
    files = sorted({str(name) for name in weight_map.values()})
    for name in files:
        parts = Path(name).parts  # () for the folder itself
        if not parts or Path(name).is_absolute() or ".." in parts or not name.isprintable():
            raise ModelError(
                f"the index names {name!r}, which is not in its folder",
                where=f"{index}: weight_map",
                fix="put the file into the folder, or fetch the model again: tunesmith fetch MODEL",
            )
    return files


def read_headers(folder: Path) -> dict[Path, list[Entry]]:
    """Return the safetensors files of a folder and the tensors of each file.

    Raise ModelError if a file is missing, truncated or unreadable.
    """
    if not (folder / INDEX).exists() and not (folder / SINGLE).exists():
        names = [path.name for path in folder.iterdir()]
        raise no_safetensors(names, name=str(folder), where=str(folder))
    files = [folder / name for name in weight_files(folder)]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ModelError(
            f"the folder lacks {len(missing)} of {count_of(len(files), 'weight file')}: "
            f"{', '.join(missing[:3])}",
            where=folder,
            why=f"{INDEX} lists these files",
            fix="finish the download: tunesmith fetch MODEL",
        )
    headers = {file: read_header(file) for file in files}
    _check_no_integers(list(chain.from_iterable(headers.values())), folder)
    return headers


def read_all_entries(folder: Path) -> list[Entry]:
    """Return the tensors of all safetensors files of a folder."""
    return list(chain.from_iterable(read_headers(folder).values()))


def has_weights(folder: Path) -> bool:
    """Return whether a folder contains a model's safetensors files."""
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def weights_digest(folder: Path) -> str:
    """Return a sha256 (hex) of a model's tensors from their names, dtypes, shapes and some bytes.

    Bytes are sampled from the middle of the tensors. This takes milliseconds for any size, but does
    not detect a change of single rows. The digest does not depend on the folder's name or on how
    the tensors are distributed over files.
    """
    return sampled_digest(read_all_entries(folder), MIDDLE)


def sampled_digest(entries: Sequence[Entry], places: Sequence[float]) -> str:
    """Return a sha256 (hex) of the tensors' names, dtypes and shapes, and of sampled bytes.

    If there are more than SAMPLED_TENSORS tensors, only every n-th one is sampled. A change outside
    of the sampled bytes is not detected.

    Args:
        places: relative positions in a tensor at which SAMPLE_BYTES are read. 0 is its start, and 1
            its end.
    """
    # Sort by name, so that the distribution over files does not affect the digest.
    entries = sorted(entries, key=lambda entry: entry.name)
    described = [(entry.name, entry.dtype, entry.shape) for entry in entries]
    total = hashlib.sha256(json.dumps(described).encode())
    # Take every n-th tensor of the sorted names, at most SAMPLED_TENSORS.
    sampled = entries[:: 1 + len(entries) // SAMPLED_TENSORS]
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(path.open("rb", buffering=0))
            for path in {entry.file for entry in entries}
        }
        for entry in sampled:
            file = files[entry.file]
            size = min(SAMPLE_BYTES, entry.size)
            for place in places:
                # For place 1, read the last SAMPLE_BYTES of the tensor.
                offset = int((entry.size - size) * place)
                file.seek(entry.start + offset)
                total.update(file.read(size))
    return total.hexdigest()


def no_safetensors(names: list[str], *, name: str, where: str) -> ModelError:
    """Build the error for a folder without model.safetensors.

    The message says which other weight files were found.
    """
    gguf = sorted(file for file in names if file.endswith(".gguf"))
    what = "there are no weights"
    why = f"there is neither {SINGLE} nor {INDEX}"
    fix = "use another model"
    if ADAPTER_CONFIG in names:
        what = "this is a PEFT adapter, not a model"
        why = ""
        fix = f"set model.name to its base model, and adapter.from: {name}"
    elif gguf:
        what = f"the weights are in GGUF: {', '.join(gguf[:3])}"
        why = ""
        fix = gguf_fix(name, gguf[0])
    elif any(file.endswith((".bin", ".pth", ".pt")) for file in names):
        what = "the weights are pickled files (.bin, .pth)"
        why = "loading a pickle can execute arbitrary code"
        convert = (
            "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
            "name = sys.argv[1]; "
            'M.from_pretrained(name, dtype="auto").save_pretrained("converted"); '
            'T.from_pretrained(name).save_pretrained("converted")'
        )
        command = f"python -c {shell_word(convert)} {shell_path(name)}"
        fix = f"convert it once, then use that folder: {command}"
    return ModelError(what, where=where, why=why, fix=fix)


def read_into(file: BufferedReader, entry: Entry, memory: memoryview, offset: int) -> None:
    """Fill `memory` (writable bytes) with bytes of the entry, starting at `offset`.

    Raise ModelError if the file cannot be read or is too short.
    """
    try:
        file.seek(entry.start + offset)
        count = file.readinto(memory)
    except OSError as error:
        raise unreadable_file(entry.file, error) from error
    # The file was truncated after its header was read.
    if count < len(memory):
        raise _damaged(entry.file, f"it ends inside {entry.name}; it was changed while it was read")
