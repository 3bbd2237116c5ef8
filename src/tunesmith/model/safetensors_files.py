"""Safetensors files: their headers read and checked, their tensors read by position. No torch is imported here.

Files are never mapped: while a mapping lives, a whole checkpoint stays in the page cache, and advising the kernel to
drop its pages has no effect. Format: 8 bytes of length (little-endian), a JSON header of that length, then the tensors
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.host_files import refuse_special_files

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # bytes; the bound of the safetensors library
SAMPLED_TENSORS, SAMPLE_BYTES = 4096, 64  # of `weights_digest`

ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: its name, dtype (as safetensors writes it), shape, and bytes [start, start + size)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int


def _damaged(file: Path, why: str) -> ModelError:
    fix = "copy the file again; in the Hub's cache: tunesmith fetch --remove MODEL, then tunesmith fetch MODEL"
    return ModelError(f"{file.name} is damaged or not a safetensors file", where=str(file), why=why, fix=fix)


def unreadable_file(file: Path, error: OSError) -> ModelError:
    """The error for a file that the system does not let us read."""
    why = error.strerror or str(error)
    return ModelError(f"{file.name} cannot be read", where=str(file), why=why, fix=f"see who may read it: ls -l {file}")


def _read_header(file: Path) -> list[Entry]:
    """A file's tensors, checked against the file's size."""
    refuse_special_files(file)
    found: list[Entry] = []
    try:
        actual = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if actual < 8 or length > min(MAX_HEADER, actual - 8):
                raise _damaged(file, f"a header of {length} bytes cannot stand in a file of {actual} bytes")
            pairs = json.loads(f.read(length), object_pairs_hook=_unique)
        pairs.pop("__metadata__", None)
        for name, spec in pairs.items():
            begin, end = spec["data_offsets"]
            entry = Entry(name, spec["dtype"], tuple(spec["shape"]), file, 8 + length + begin, end - begin)
            if not all(type(size) is int and size >= 0 for size in (*entry.shape, begin, end)):
                raise _damaged(file, f"shape or offsets of {name} are not whole numbers: {spec}"[:200])
            expected = math.prod(entry.shape) * ITEMSIZE.get(entry.dtype, 0)
            if entry.dtype in ITEMSIZE and entry.size != expected:
                raise _damaged(file, f"{name} has {entry.size} bytes where its shape needs {expected}")
            found.append(entry)
    except OSError as error:
        raise unreadable_file(file, error) from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:  # not JSON, or of another form
        raise _damaged(file, f"its header cannot be read: {error!r}"[:300]) from error
    end = 8 + length
    for entry in sorted(found, key=lambda e: (e.start, e.size)):
        if entry.start != end:
            raise _damaged(file, f"{entry.name} begins at byte {entry.start}, and what is before it ends at {end}")
        end += entry.size
    if actual != end:
        lack = f"{end - actual} bytes are missing at its end" if actual < end else f"{actual - end} bytes too many"
        raise _damaged(file, f"{lack}: it should have {end} bytes and has {actual}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, or ValueError where it has a name twice."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


# What formats of quantized checkpoints call the tensors of a linear layer.
_FORMATS = {
    ".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", ".weight_packed": "compressed-tensors", ".SCB": "bitsandbytes 8-bit",
    ".weight_scale": "compressed-tensors", ".weight_scale_inv": "fp8 in blocks",
}  # fmt: skip


def refuse_quantized(headers: Mapping[Path, list[Entry]], folder: Path) -> None:
    """Raise ModelError where weights are stored as integers, unless they are bitsandbytes' nf4: scales belong to them."""
    entries = [entry for found in headers.values() for entry in found]
    integers = [e for e in entries if e.dtype in ("I8", "I16", "I32", "I64", "U8")]
    if not integers or any("bitsandbytes__" in entry.name for entry in entries):
        return
    endings = [known for e in entries for end, known in _FORMATS.items() if e.name.endswith(end)]
    like = f"the names are those of {endings[0]}" if endings else "no scales are beside them that are known here"
    first = integers[0]
    what = f"{len(integers)} tensors hold integers, as quantized weights do: {first.name} ({first.dtype})"
    fix = "take the unquantized model; model.quantize: nf4 then quantizes it as it is loaded"
    raise ModelError(what, where=str(first.file), why=like, fix=fix)


def read_json(file: Path) -> dict[str, Any]:
    """Parse a JSON object from a model's folder, or raise ModelError naming the file and line."""
    again = "fetch the model again: tunesmith fetch MODEL"
    where, why, fix = str(file), "", f"correct the file, or {again}"
    refuse_special_files(file)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        what = f"{file.name} holds no JSON object"
    except FileNotFoundError:
        what, where, fix = f"{file.name} is missing", str(file.parent), f"put the model's {file.name} there, or {again}"
    except OSError as error:
        raise unreadable_file(file, error) from error
    except json.JSONDecodeError as error:
        what, where = f"{file.name} is not JSON: {error.msg}", f"{file}:{error.lineno}"
    except UnicodeDecodeError as error:
        what, why = f"{file.name} is not UTF-8 text", str(error)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets in brackets
        what, why = f"{file.name} cannot be read", str(error)
    raise ModelError(what, where=where, why=why, fix=fix)


def indexed_files(index: Path) -> list[str]:
    """The weight files that an index lists, as paths below its folder, sorted; ModelError where it lists none."""
    names = read_json(index).get("weight_map")
    files = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    if not files:
        raise ModelError("the index has no weight_map of file names", where=str(index), fix="fetch the model again")
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts or not name.isprintable():
            what = f"the index names {name!r}, which is not in its folder"
            fix = "put the file there and name it, or fetch the model again: tunesmith fetch MODEL"
            raise ModelError(what, where=f"{index}: weight_map", fix=fix)
    return files


def read_headers(folder: Path) -> dict[Path, list[Entry]]:
    """The safetensors files of a folder, from its index where it has one, and the tensors of each.

    Raises:
        ModelError: none is there, one that the index names is missing, or one is cut off or cannot be read.
    """
    if (folder / INDEX).exists():
        files = [folder / name for name in indexed_files(folder / INDEX)]
        if missing := [f.name for f in files if not f.exists()]:
            what = f"{len(missing)} of {len(files)} weight files are missing: {', '.join(missing[:3])}"
            fix = "finish the download: tunesmith fetch MODEL"
            raise ModelError(what, where=str(folder), why=f"{INDEX} names them", fix=fix)
    elif (folder / SINGLE).exists():
        files = [folder / SINGLE]
    else:
        raise no_safetensors([p.name for p in folder.iterdir()], name=str(folder), where=str(folder))
    return {file: _read_header(file) for file in files}


def weights_digest(folder: Path) -> str:
    """sha256 (hex) of a model's tensors: the name, dtype and shape of each, and bytes from the middle of most.

    It takes milliseconds whatever the size, and misses a change of single rows. The folder's name and how the tensors
    are spread over files do not enter.
    """
    entries = sorted((e for found in read_headers(folder).values() for e in found), key=lambda e: e.name)
    total = hashlib.sha256(json.dumps([(e.name, e.dtype, e.shape) for e in entries]).encode())
    with ExitStack() as stack:
        files = {f: stack.enter_context(f.open("rb", buffering=0)) for f in {e.file for e in entries}}
        for entry in entries[:: 1 + len(entries) // SAMPLED_TENSORS]:
            size = min(SAMPLE_BYTES, entry.size)
            files[entry.file].seek(entry.start + (entry.size - size) // 2)
            total.update(files[entry.file].read(size))
    return total.hexdigest()


def no_safetensors(names: list[str], *, name: str, where: str, repo: bool = False) -> ModelError:
    """The error for a folder (`repo`: a repository) without model.safetensors, by what it holds instead."""
    gguf = sorted(n for n in names if n.endswith(".gguf"))
    if "adapter_config.json" in names:
        what, why = "this is a PEFT adapter, not a model", ""
        fix = f"set model.name to its base model, and adapter.from: {name}"
    elif gguf:
        what, why = f"the weights are in GGUF: {', '.join(gguf[:3])}", ""
        fix = f"name the file itself: model.name: {name}/{gguf[0]}"
        if repo:
            fix = f"hf download {name} {gguf[0]} --local-dir models, then model.name: models/{gguf[0]}"
    elif any(n.endswith((".bin", ".pth", ".pt")) for n in names):
        what, why = "the weights are only there as pickled files (.bin, .pth)", "a pickle can run any code when loaded"
        fix = (
            'convert once, then name the folder: python -c "from transformers import AutoModelForCausalLM as M, '
            f"AutoTokenizer as T; n='{name}'; M.from_pretrained(n, dtype='auto').save_pretrained('converted'); "
            "T.from_pretrained(n).save_pretrained('converted')\""
        )
    else:
        what, why, fix = "no weights are there", "neither model.safetensors nor its index", "take another model"
    return ModelError(what, where=where, why=why, fix=fix)


@contextmanager
def open_uncached(path: Path) -> Iterator[BufferedReader]:
    """The open file, closed at the end; no page of it stays in the page cache."""
    with path.open("rb") as file:
        try:
            yield file
        finally:
            drop_pages(file)  # those that two tensors share


def drop_pages(file: BufferedReader, entry: Entry | None = None) -> None:
    """Tell the kernel that the entry's pages (None: all of the file's) are not needed again, where it can be told."""
    if hasattr(os, "posix_fadvise"):  # Linux; macOS has no such call
        start, size = (entry.start, entry.size) if entry else (0, 0)  # a size of 0: to the end of the file
        os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_DONTNEED)


def read_into(file: BufferedReader, entry: Entry, memory: memoryview, offset: int = 0) -> None:
    """Fill `memory` (writable bytes) with the entry's bytes from `offset` on; ModelError where that fails."""
    try:
        file.seek(entry.start + offset)
        got = file.readinto(memory)
    except OSError as error:
        raise unreadable_file(entry.file, error) from error
    if got < len(memory):
        raise _damaged(entry.file, f"it ends inside {entry.name}; it was changed while it was read")
