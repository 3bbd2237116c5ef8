"""Quantization of fp32 rows to the bytes of a GGUF type.

Block types are quantized with ggml's C function, from the shared library in the wheel
libggml-python. An implementation in Python would be slower and would give slightly different bytes.
ctypes releases the GIL during the call, so several threads can quantize concurrently.
"""

import ctypes
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.errors import MachineError, ModelError
from tunesmith.host.packages import pip_install
from tunesmith.tools.export.gguf.types import tensor_bytes

# Values of the C enum `ggml_type`.
_GGML_TYPES = {
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "MXFP4": 39,
}
_TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PYTHON_ENVIRONMENT = "the Python environment"


@cache
def ggml() -> ctypes.CDLL:
    """Load ggml's shared library, and set the argument types of its functions.

    Raise MachineError if the library is not installed or lacks a function.
    """
    try:
        library = ctypes.CDLL(str(_library_file()))
        library.ggml_quantize_init.argtypes = [ctypes.c_int]
        library.ggml_quantize_init.restype = None
        quantize_chunk = library.ggml_quantize_chunk
        quantize_chunk.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
        quantize_chunk.restype = ctypes.c_size_t
    except (AttributeError, OSError) as error:
        raise MachineError(
            "ggml's library cannot be loaded",
            where=_PYTHON_ENVIRONMENT,
            why=str(error),
            fix=f"run `{pip_install('libggml-python')}`, or use --quant f16",
        ) from error
    # Build the quantization tables now. Otherwise several threads could build them concurrently.
    for number in _GGML_TYPES.values():
        library.ggml_quantize_init(number)
    return library


def _library_file() -> Path:
    """Return ggml's shared library in the wheel libggml-python. Raise OSError if it is missing."""
    spec = find_spec("libggml")
    if spec is None:
        raise OSError("the package libggml-python is not installed")
    for folder in spec.submodule_search_locations or ():
        # The file has a different name on Linux, macOS and Windows.
        for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
            for path in Path(folder).rglob(name):
                return path
    raise OSError("the package libggml-python contains no ggml library for this machine")


def load_ggml_if_needed(ggml_types: Iterable[str]) -> None:
    """Load the ggml library if a tensor will be quantized with it.

    Callers use this function before a long write, so that a missing package is reported early.
    """
    if not _GGML_TYPES.keys().isdisjoint(ggml_types):
        ggml()


def quantize_rows(rows: Tensor, ggml_type: str, name: str) -> memoryview:
    """Convert rows [n, columns] or [n] to the bytes of a GGUF type.

    Raise ModelError if a value is not finite before or after the conversion. `name` is the tensor's
    name for the message.
    """
    rows = rows.float().contiguous()
    if ggml_type in _GGML_TYPES:
        _check_finite(rows, name, ggml_type)
        return _blocks(rows, ggml_type)
    converted = rows.to(_TORCH_TYPES[ggml_type])
    _check_finite(converted, name, ggml_type)
    return converted.view(torch.uint8).numpy().data


def _check_finite(values: Tensor, name: str, ggml_type: str) -> None:
    if torch.isfinite(values).all():
        return
    raise ModelError(
        f"{name} has a value that is infinite or NaN in the format {ggml_type}",
        where="the model's weights",
        why="such a value makes every answer NaN; F16 can store values up to 65,504",
        fix="use --quant bf16; if the trained weights already have such values, export an earlier "
        "checkpoint",
    )


def _blocks(rows: Tensor, ggml_type: str) -> memoryview:
    columns = rows.shape[-1]
    data = bytearray(tensor_bytes(ggml_type, rows.shape))
    # `target` is a view of the bytearray, so ggml writes into it without a copy.
    target = (ctypes.c_char * len(data)).from_buffer(data)
    written = ggml().ggml_quantize_chunk(
        _GGML_TYPES[ggml_type], rows.data_ptr(), target, 0, rows.numel() // columns, columns, None
    )
    # Check the size, because a wrong size would shift all following tensors in the file.
    if written != len(data):
        raise RuntimeError(
            f"ggml wrote {written} bytes of {ggml_type} data instead of the expected {len(data)}"
        )
    return memoryview(data)
