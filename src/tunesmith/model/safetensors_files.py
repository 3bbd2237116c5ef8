"""Safetensors files: their headers read and checked, their tensors read by position. No torch is imported here.

Files are never mapped: while a mapping lives, a whole checkpoint stays in the page cache, and advising the kernel to
drop its pages has no effect. Format: 8 bytes of length (little-endian), a JSON header of that length, then the tensors
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # bytes; the bound of the safetensors library

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
    found = []
    try:
        actual = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if actual < 8 or length > min(MAX_HEADER, actual - 8):
                raise _damaged(file, f"a header of {length} bytes cannot stand in a file of {actual} bytes")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        for name, spec in header.items():
            begin, end = spec["data_offsets"]
            entry = Entry(name, spec["dtype"], tuple(spec["shape"]), file, 8 + length + begin, end - begin)
            expected = math.prod(entry.shape) * ITEMSIZE.get(entry.dtype, 0)
            if entry.dtype in ITEMSIZE and entry.size != expected:
                raise _damaged(file, f"{name} has {entry.size} bytes where its shape needs {expected}")
            found.append(entry)
    except OSError as error:
        raise unreadable_file(file, error) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # not JSON, or of another form
        raise _damaged(file, f"its header cannot be read: {error!r}") from error
    end = max((e.start + e.size for e in found), default=8 + length)
    if actual != end:
        lack = f"{end - actual} bytes are missing at its end" if actual < end else f"{actual - end} bytes too many"
        raise _damaged(file, f"{lack}: it should have {end} bytes and has {actual}")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """Parse a JSON object from a model's folder, or raise ModelError naming the file and line."""
    again = "fetch the model again: tunesmith fetch MODEL"
    where, why, fix = str(file), "", f"correct the file, or {again}"
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
    raise ModelError(what, where=where, why=why, fix=fix)


def indexed_files(index: Path) -> list[str]:
    """The weight files that an index lists, as paths below its folder, sorted; ModelError where it lists none."""
    names = read_json(index).get("weight_map")
    files = set(map(str, names.values())) if isinstance(names, dict) else set()
    if not files or any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise ModelError("the index has no weight_map of file names", where=str(index), fix="fetch the model again")
    return sorted(files)


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
