"""Safetensors files: their headers read and checked, their tensors read by position.

No torch is imported here.

Files are never mapped: while a mapping lives, a whole checkpoint stays in the page cache, and
advising the kernel to drop its pages has no effect. Format: 8 bytes of length (little-endian), a
JSON header of that length, then the tensors (https://huggingface.co/docs/safetensors).
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

from tunesmith.errors import ModelError
from tunesmith.host.files import check_regular_files
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.units import count_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
Config = Mapping[str, object]  # a parsed config.json, or a section of one
# Of an adapter in PEFT's format.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Of `weights_digest`.
SAMPLED_TENSORS = 4096
SAMPLE_BYTES = 64
MIDDLE = (0.5,)
ENDS_AND_MIDDLE = (0.0, 0.5, 1.0)
# Values of `quant_method` that have weights in bytes: `shipped.py` says which it reads.
FOUR_BITS = ("mxfp4", "compressed-tensors", "modelopt")
# Where ModelOpt says how weights are quantized, if config.json does not.
MODELOPT_CONFIG = "hf_quant_config.json"


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: its name, dtype (as safetensors writes it), shape, and bytes [start,
    start + size).
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
        where=str(file),
        why=why,
        fix="copy the file again; in the Hub's cache: tunesmith fetch --remove MODEL, then "
        "tunesmith fetch MODEL",
    )


def unreadable_file(file: Path, error: OSError) -> ModelError:
    """The error for a file that the system does not let us read."""
    why = error.strerror or str(error)
    return ModelError(
        f"{file.name} cannot be read",
        where=str(file),
        why=why,
        fix=f"check its permissions: ls -l {shell_path(file)}",
    )


def read_header(file: Path) -> list[Entry]:
    """A file's tensors.

    The library checks its header (no gaps, overlaps or names twice) against the file's size.
    """
    check_regular_files(file)
    try:
        # The library checks; the offsets, which it does not hand out, are read below.
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
        # Offsets count from the end of the header.
        start = 8 + length + begin
        shape = tuple(values["shape"])
        entries.append(Entry(name, values["dtype"], shape, file, start, end - begin))
    return entries


def _check_no_integers(entries: list[Entry], folder: Path) -> None:
    """ModelError where weights are stored as integers, unless they are bitsandbytes' nf4, or bytes
    of mxfp4 or nvfp4.

    Scales belong to those. Int64 is the type of counters and indices, not of weights.
    """
    integers = [entry for entry in entries if entry.dtype in ("I8", "I16", "I32", "U8")]
    if not integers or any("bitsandbytes__" in entry.name for entry in entries):
        return
    why = "GPTQ, AWQ and compressed-tensors store weights so"
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
        f"the weights are quantized: {count_of(len(integers), 'tensor')} of integers: {shown}",
        where=str(first.file),
        why=why,
        fix="take the unquantized model; model.quantize: nf4 then quantizes it as it is loaded",
    )


def read_model_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json, in which `quantization_config` is also what ModelOpt says in a file
    of its own. ModelError as of `read_json`.
    """
    config = read_json(folder / "config.json")
    file = folder / MODELOPT_CONFIG
    if "quantization_config" in config or not file.is_file():
        return config
    stated = read_json(file).get("quantization")
    if not isinstance(stated, dict):
        raise ModelError(
            f"its quantization is {stated!r:.100}: it must be a mapping",
            where=str(file),
            fix="fetch the model again: tunesmith fetch MODEL",
        )
    return config | {"quantization_config": {"quant_method": "modelopt", **stated}}


def read_json(
    file: Path, *, again: str = "fetch the model again: tunesmith fetch MODEL"
) -> dict[str, Any]:
    """Parse a JSON object, or raise ModelError naming the file and line.

    `again` is how to get a whole file.
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
        fix = f"put {file.name} there, or {again}"
    except OSError as error:
        raise unreadable_file(file, error) from error
    except json.JSONDecodeError as error:
        what = f"{file.name} is not JSON: {error.msg}"
        where = f"{file}:{error.lineno}"
    except UnicodeDecodeError as error:
        what = f"{file.name} is not UTF-8 text"
        why = str(error)
    # A number of 5,000 digits, brackets in brackets.
    except (ValueError, RecursionError) as error:
        what = f"{file.name} cannot be read"
        why = str(error)
    raise ModelError(what, where=where, why=why, fix=fix)


def indexed_files(index: Path) -> list[str]:
    """The weight files that an index lists, as paths below its folder, sorted.

    ModelError where it lists none, or one that cannot lie in its folder.
    """
    weight_map = read_json(index).get("weight_map")
    files = []
    if isinstance(weight_map, dict):
        files = sorted({str(name) for name in weight_map.values()})
    if not files:
        what = "the index has no weight_map of file names"
        raise ModelError(what, where=str(index), fix="fetch the model again")
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts or not name.isprintable():
            what = f"the index names {name!r}, which is not in its folder"
            fix = "put the file there, or fetch the model again: tunesmith fetch MODEL"
            raise ModelError(what, where=f"{index}: weight_map", fix=fix)
    return files


def read_headers(folder: Path) -> dict[Path, list[Entry]]:
    """The safetensors files of a folder and the tensors of each.

    ModelError where one is missing, cut off or unreadable.
    """
    if (folder / INDEX).exists():
        files = [folder / name for name in indexed_files(folder / INDEX)]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            shown = ", ".join(missing[:3])
            raise ModelError(
                f"{len(missing)} of {count_of(len(files), 'weight file')} missing: {shown}",
                where=str(folder),
                why=f"{INDEX} names them",
                fix="finish the download: tunesmith fetch MODEL",
            )
    elif (folder / SINGLE).exists():
        files = [folder / SINGLE]
    else:
        raise no_safetensors(
            [p.name for p in folder.iterdir()], name=str(folder), where=str(folder)
        )
    headers = {file: read_header(file) for file in files}
    _check_no_integers(list(chain.from_iterable(headers.values())), folder)
    return headers


def has_weights(folder: Path) -> bool:
    """Tell whether a folder has safetensors files of a model."""
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


def weights_digest(folder: Path) -> str:
    """sha256 (hex) of a model's tensors: the name, dtype and shape of each, and bytes from the
    middle of most.

    It takes milliseconds whatever the size, and misses a change of single rows. The folder's name
    and how the tensors are spread over files do not enter.
    """
    return sampled_digest(list(chain.from_iterable(read_headers(folder).values())), MIDDLE)


def sampled_digest(entries: Sequence[Entry], places: Sequence[float]) -> str:
    """sha256 (hex) of the name, dtype and shape of each tensor, and of some bytes of those that are
    sampled: all of up to SAMPLED_TENSORS, else every n-th.

    SAMPLE_BYTES are read at each of `places`: 0 is a tensor's beginning, 1 its end. What changes no
    sampled byte is missed.
    """
    # By name: how tensors are spread over files does not enter.
    entries = sorted(entries, key=lambda entry: entry.name)
    described = [(entry.name, entry.dtype, entry.shape) for entry in entries]
    total = hashlib.sha256(json.dumps(described).encode())
    with ExitStack() as stack:
        files = {}
        for path in {entry.file for entry in entries}:
            files[path] = stack.enter_context(path.open("rb", buffering=0))
        # Evenly spread over the names, so that at most SAMPLED_TENSORS are read.
        for entry in entries[:: 1 + len(entries) // SAMPLED_TENSORS]:
            file = files[entry.file]
            size = min(SAMPLE_BYTES, entry.size)
            for place in places:
                # The last place is the last SAMPLE_BYTES, not past the end.
                file.seek(entry.start + int((entry.size - size) * place))
                total.update(file.read(size))
    return total.hexdigest()


def no_safetensors(names: list[str], *, name: str, where: str, repo: bool = False) -> ModelError:
    """The error for a folder (`repo`: a repository) without model.safetensors, by what it holds
    instead.
    """
    gguf = sorted(file for file in names if file.endswith(".gguf"))
    what = "there are no weights"
    why = "neither model.safetensors nor its index"
    fix = "use another model"
    if ADAPTER_CONFIG in names:
        what = "this is a PEFT adapter, not a model"
        why = ""
        fix = f"set model.name to its base model, and adapter.from: {name}"
    elif gguf:
        what = f"the weights are in GGUF: {', '.join(gguf[:3])}"
        why = ""
        fix = f"use the file itself: model.name: {name}/{gguf[0]}"
        if repo:
            download = f"hf download {shell_word(name)} {shell_word(gguf[0])} --local-dir models"
            fix = f"{download}, then model.name: models/{gguf[0]}"
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


def read_into(file: BufferedReader, entry: Entry, memory: memoryview, offset: int = 0) -> None:
    """Fill `memory` (writable bytes) with the entry's bytes from `offset` on.

    ModelError where that fails.
    """
    try:
        file.seek(entry.start + offset)
        count = file.readinto(memory)
    except OSError as error:
        raise unreadable_file(entry.file, error) from error
    # A file that was cut off after its header was read.
    if count < len(memory):
        raise _damaged(entry.file, f"it ends inside {entry.name}; it was changed while it was read")
