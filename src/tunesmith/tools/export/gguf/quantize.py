"""Rows of fp32 as bytes of a GGUF type.

Blocks of the K types are searched for by ggml's own function, from the shared object of the wheel
libggml-python: a search in Python would be slow, and would not give the same bytes. ctypes releases
the interpreter's lock during the call, so threads run side by side.
"""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.errors import MachineError, ModelError
from tunesmith.host.packages import pip_install
from tunesmith.tools.export.gguf.types import tensor_bytes

# The numbers of `ggml_type`.
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
    """ggml's shared object. MachineError where it is not installed, or has no such function."""
    try:
        library = ctypes.CDLL(str(_library_file()))
        library.ggml_quantize_init.argtypes = [ctypes.c_int]
        library.ggml_quantize_init.restype = None
        library.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
    except (AttributeError, OSError) as error:
        raise MachineError(
            "ggml's library cannot be loaded",
            where=_PYTHON_ENVIRONMENT,
            why=str(error),
            fix=f"{pip_install('libggml-python')}, or use --quant f16",
        ) from error
    # Tables that threads would otherwise build at the same time.
    for number in _GGML_TYPES.values():
        library.ggml_quantize_init(number)
    return library


def _library_file() -> Path:
    """The file in the wheel. OSError where there is none."""
    spec = find_spec("libggml")
    if spec is None:
        raise OSError("libggml-python is not installed")
    for folder in spec.submodule_search_locations or ():
        # The wheel's file has another name on each system.
        for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
            for path in Path(folder).rglob(name):
                return path
    raise OSError("libggml-python has no libggml-base for this machine")


def needs_ggml(ggml_type: str) -> bool:
    """Tell whether a type is one of blocks that the ggml library quantizes."""
    return ggml_type in _GGML_TYPES


def quantize_rows(rows: Tensor, ggml_type: str, name: str) -> memoryview:
    """The bytes of contiguous fp32 rows [n, columns] or [n] in a type; `name` is for errors.

    ModelError where a value is not finite, in the rows or in the type.
    """
    if needs_ggml(ggml_type):
        _check_finite(rows, name, ggml_type)
        return _blocks(rows, ggml_type)
    converted = rows.to(_TORCH_TYPES[ggml_type])
    _check_finite(converted, name, ggml_type)
    return converted.view(torch.uint8).numpy().data


def _check_finite(values: Tensor, name: str, ggml_type: str) -> None:
    if torch.isfinite(values).all():
        return
    raise ModelError(
        f"{name} has a value that is not finite in {ggml_type}",
        where="the model's weights",
        why="one such value makes every answer NaN; the maximum of F16 is 65,504",
        fix="use --quant bf16; if the weights themselves are not finite, an earlier checkpoint",
    )


def _blocks(rows: Tensor, ggml_type: str) -> memoryview:
    columns = rows.shape[-1]
    data = bytearray(tensor_bytes(ggml_type, rows.shape))
    # A view of the bytearray: ggml writes into it without a copy.
    target = (ctypes.c_char * len(data)).from_buffer(data)
    written = ggml().ggml_quantize_chunk(
        _GGML_TYPES[ggml_type], rows.data_ptr(), target, 0, rows.numel() // columns, columns, None
    )
    # A size other than planned would shift every tensor after this one.
    if written != len(data):
        raise RuntimeError(f"ggml wrote {written} bytes of {ggml_type} instead of {len(data)}")
    return memoryview(data)
