"""Safetensors files: their headers read and checked, their tensors read by position.

The file is opened, never mapped: while a mapping lives, the pages of a whole checkpoint stay in the page cache, and
advising the kernel to drop them has no effect. Reading at a position into the tensor's own memory leaves one copy, and
the pages can be dropped tensor by tensor.

Format: 8 bytes of length (little-endian), a JSON header of that length, then the tensors
(https://huggingface.co/docs/safetensors). This file imports no torch, so that a folder can be checked before anything
heavy starts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    return ModelError(
        f"{file.name} is damaged or not a safetensors file",
        where=str(file),
        why=why,
        fix="copy the file again; in the Hub's cache: tunesmith fetch --remove MODEL, then tunesmith fetch MODEL",
    )


def _unreadable(file: Path, error: OSError) -> ModelError:
    why = error.strerror or str(error)
    return ModelError(f"{file.name} cannot be read", where=str(file), why=why, fix=f"see who may read it: ls -l {file}")


def read_entries(file: Path) -> list[Entry]:
    """Read a file's header and check it against the file's size.

    Raises:
        ModelError: the file cannot be read, is cut off, or its header does not describe it.
    """
    try:
        actual = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if actual < 8 or length > min(MAX_HEADER, actual - 8):
                raise _damaged(file, f"a header of {length} bytes cannot stand in a file of {actual} bytes")
            header = json.loads(f.read(length))
    except OSError as error:
        raise _unreadable(file, error) from error
    except (UnicodeDecodeError, ValueError) as error:
        raise _damaged(file, f"its header is not JSON: {error}") from error
    found = []
    try:
        for name, spec in header.items():
            if name == "__metadata__":
                continue
            begin, end = spec["data_offsets"]
            entry = Entry(name, spec["dtype"], tuple(spec["shape"]), file, 8 + length + begin, end - begin)
            expected = math.prod(entry.shape) * ITEMSIZE.get(entry.dtype, 0)
            if entry.dtype in ITEMSIZE and entry.size != expected:
                raise _damaged(file, f"{name} has {entry.size} bytes where its shape needs {expected}")
            found.append(entry)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(file, f"its header has a wrong form: {error!r}") from error
    end = max((e.start + e.size for e in found), default=8 + length)
    if actual != end:
        lack = f"{end - actual} bytes are missing at its end" if actual < end else f"{actual - end} bytes too many"
        raise _damaged(file, f"{lack}: it should have {end} bytes and has {actual}")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """Parse a JSON object from a model's folder, or raise ModelError naming the file and line."""
    again = "correct the file, or fetch the model again: tunesmith fetch MODEL"
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        fix = f"put the model's {file.name} there, or fetch the model again: tunesmith fetch MODEL"
        raise ModelError(f"{file.name} is missing", where=str(file.parent), fix=fix) from error
    except OSError as error:
        raise _unreadable(file, error) from error
    except json.JSONDecodeError as error:
        what = f"{file.name} is not JSON: {error.msg}"
        raise ModelError(what, where=f"{file}:{error.lineno}", fix=again) from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{file.name} is not UTF-8 text", where=str(file), why=str(error), fix=again) from error
    if not isinstance(value, dict):
        raise ModelError(f"{file.name} holds no JSON object", where=str(file), fix=again)
    return value


def indexed_files(index: Path) -> list[str]:
    """The names of the weight files that an index lists, sorted; ModelError where it lists none."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or any(Path(str(n)).name != n for n in names.values()):
        raise ModelError("the index has no weight_map of file names", where=str(index), fix="fetch the model again")
    return sorted(set(names.values()))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, from its index where it has one.

    Raises:
        ModelError: none is there (the message says what is there instead), or the index names one that is missing.
    """
    index = folder / INDEX
    if not index.exists():
        if (folder / SINGLE).exists():
            return [folder / SINGLE]
        raise no_safetensors([p.name for p in folder.iterdir()], name=str(folder), where=str(folder))
    files = [folder / name for name in indexed_files(index)]
    if missing := [f.name for f in files if not f.exists()]:
        raise ModelError(
            f"{len(missing)} of {len(files)} weight files are missing: {', '.join(missing[:3])}",
            where=str(folder),
            why=f"{INDEX} names them",
            fix="finish the download: tunesmith fetch MODEL",
        )
    return files


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
def open_uncached(file: Path) -> Iterator[int]:
    """The file's descriptor, closed at the end; no page of the file stays in the page cache."""
    fd = os.open(file, os.O_RDONLY)
    try:
        yield fd
    finally:
        drop_pages(fd)  # those that two tensors share
        os.close(fd)


def drop_pages(fd: int, entry: Entry | None = None) -> None:
    """Tell the kernel that the entry's pages (None: all of the file's) are not needed again, where it can be told."""
    if hasattr(os, "posix_fadvise"):  # Linux; macOS has no such call
        # A length of 0 means to the end of the file.
        os.posix_fadvise(fd, entry.start if entry else 0, entry.size if entry else 0, os.POSIX_FADV_DONTNEED)


def read_into(fd: int, entry: Entry, memory: memoryview, offset: int = 0) -> None:
    """Fill `memory` (writable bytes) with the entry's bytes from `offset` on.

    Raises:
        ModelError: the file ends too early, or the disk fails.
    """
    done = 0
    while done < len(memory):
        try:
            got = os.preadv(fd, [memory[done:]], entry.start + offset + done)
        except OSError as error:
            raise _unreadable(entry.file, error) from error
        if got == 0:
            raise _damaged(entry.file, f"it ends inside {entry.name}; it was changed while it was read")
        done += got
