"""The tensors of a checkpoint, those that make one weight as one entry.

- fp8: e4m3 codes [out, in], and `weight_scale_inv` beside them (compressed-tensors, ModelOpt and
  AutoFP8: `weight_scale`): a scale for each block of weights (DeepSeek, Qwen: 128 x 128), for each
  row, or one of all (Ministral 3). weight = codes * scale.
- nvfp4: two 4-bit codes a byte [out, in / 2], an e4m3 scale for each 16 of a row, and one of all in
  fp32; their names are those of the tool that wrote them (`Nvfp4Names`).
- mxfp4 (gpt-oss): of a stack of experts `_blocks`, two 4-bit codes a byte, and `_scales`, an
  exponent for each 32 of them.

The values of an entry are dense, and so is its shape (see `formats/`). Experts are stored one
by one, but for those of mxfp4. No torch is imported here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import ModelError
from tunesmith.formats.form import FETCH, MXFP4_GROUP, NVFP4_GROUP, Nvfp4Names, ShippedForm
from tunesmith.model.safetensors_files import Entry, read_headers
from tunesmith.model.shipped import form_of_folder

CODES = ".weight"
PACKED = "_blocks"
EXPONENTS = "_scales"
SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0")
GROUP_BYTES = MXFP4_GROUP // 2
# Of inputs, outputs, keys and values: what is trained here is not rounded.
ACTIVATION_SCALES = (
    ".activation_scale",
    ".input_scale",
    ".input_global_scale",
    ".output_scale",
    *(f".{name}_scale" for name in "qkv"),
)


@dataclass(frozen=True)
class CodedEntry:
    """A weight that is stored as codes and scales; its place in the files is that of its codes.

    Attributes:
        name, shape: those that it has where it is dense.
        codes: the tensors that have something of each row, the codes first; of fp8 [out, in], of
            nvfp4 [out, in / 2] and [out, in / 16], of a stack in mxfp4 [experts, out, groups, 16]
            and [experts, out, groups].
        scale: of the whole weight, but for mxfp4.
        form: of the checkpoint.
        dtype: of the values that are read.
    """

    name: str
    shape: tuple[int, ...]
    codes: tuple[Entry, ...]
    scale: Entry | None
    form: ShippedForm
    dtype: str = "F32"

    @property
    def file(self) -> Path:
        return self.codes[0].file

    @property
    def start(self) -> int:
        return self.codes[0].start


StoredEntry = Entry | CodedEntry


def read_entries(folder: Path) -> dict[Path, list[StoredEntry]]:
    """As `read_headers`, with the tensors that make one weight as one entry.

    ModelError where a part of one is missing, or of another shape or type.
    """
    headers = read_headers(folder)
    form = form_of_folder(folder)
    if form is None:
        return {file: [*entries] for file, entries in headers.items()}
    by_name = {entry.name: entry for entries in headers.values() for entry in entries}
    join = JOINS[form.method]
    joined: dict[Path, list[StoredEntry]] = {}
    for file, entries in headers.items():
        joined[file] = []
        for entry in entries:
            weight = join(entry, by_name, form)
            if weight is not None:
                joined[file].append(weight)
    return joined


def _join_scaled(
    entry: Entry, by_name: Mapping[str, Entry], form: ShippedForm
) -> StoredEntry | None:
    """The weight that a tensor of an fp8 checkpoint is, alone or with its scale; None: it is the
    part of another, or not used.
    """
    name = entry.name
    if name.endswith(ACTIVATION_SCALES):
        return None
    if name.endswith(form.scale_suffix):
        weight = by_name.get(name.removesuffix(form.scale_suffix) + CODES)
        if weight is None:
            raise _torn(entry, f"there is no weight for {name}")
        if weight.dtype != "F8_E4M3":
            why = "its scales are there, as of fp8: that is e4m3"
            raise _torn(weight, f"{weight.name} is stored as {weight.dtype}", why)
        return None
    if not entry.dtype.startswith("F8_"):
        return entry
    if entry.dtype != "F8_E4M3":
        raise _torn(entry, f"{name} is stored as {entry.dtype}", "e4m3 is read of fp8 checkpoints")
    scale = None
    if name.endswith(CODES):
        scale = by_name.get(f"{name.removesuffix(CODES)}{form.scale_suffix}")
    if scale is None:
        raise _torn(entry, f"the scales of {name} are missing")
    if len(entry.shape) != 2:
        raise _torn(entry, f"{name} is {list(entry.shape)}", "of fp8 checkpoints matrices are read")
    if scale.dtype not in SCALE_TYPES:
        why = f"{', '.join(SCALE_TYPES)} are read"
        raise _torn(scale, f"{scale.name} is stored as {scale.dtype}", why)
    expected_shape = form.scale_shape(*entry.shape)
    is_one = form.block is None and math.prod(scale.shape) == 1
    if scale.shape != expected_shape and not is_one:
        why = f"{name} is {list(entry.shape)}, {form.describe()}: that makes {list(expected_shape)}"
        raise _torn(scale, f"{scale.name} is {list(scale.shape)}", why)
    return CodedEntry(name, entry.shape, (entry,), scale, form)


def _join_packed(
    entry: Entry, by_name: Mapping[str, Entry], form: ShippedForm
) -> StoredEntry | None:
    """As `_join_scaled`, of an mxfp4 checkpoint."""
    name = entry.name
    if name.endswith(EXPONENTS):
        if f"{name.removesuffix(EXPONENTS)}{PACKED}" not in by_name:
            raise _torn(entry, f"there are no blocks for {name}")
        return None
    if not name.endswith(PACKED):
        return entry
    exponents = by_name.get(f"{name.removesuffix(PACKED)}{EXPONENTS}")
    if exponents is None:
        raise _torn(entry, f"the scales of {name} are missing")
    for part in (entry, exponents):
        if part.dtype != "U8":
            raise _torn(part, f"{part.name} is stored as {part.dtype}", "mxfp4 is bytes (U8)")
    if len(entry.shape) != 4 or entry.shape[-1] != GROUP_BYTES:
        why = f"blocks are [experts, rows, groups, {GROUP_BYTES}]"
        raise _torn(entry, f"{name} is {list(entry.shape)}", why)
    if exponents.shape != entry.shape[:-1]:
        why = f"{name} is {list(entry.shape)}: a scale for each {GROUP_BYTES} bytes"
        raise _torn(exponents, f"{exponents.name} is {list(exponents.shape)}", why)
    experts, rows, groups, _ = entry.shape
    # The model has it the other way around.
    shape = (experts, groups * MXFP4_GROUP, rows)
    return CodedEntry(name.removesuffix(PACKED), shape, (entry, exponents), None, form)


def _join_nvfp4(
    entry: Entry, by_name: Mapping[str, Entry], form: ShippedForm
) -> StoredEntry | None:
    """As `_join_scaled`, of an nvfp4 checkpoint."""
    names = form.names
    assert names is not None
    name = entry.name
    if name.endswith(ACTIVATION_SCALES):
        return None
    for suffix in (names.scales, names.scale):
        stem = name.removesuffix(suffix)
        if stem != name:
            if f"{stem}{names.codes}" not in by_name:
                raise _torn(entry, f"there are no codes for {name}")
            return None
    if entry.dtype != "U8" and not _has_scales(entry, by_name, names):
        return entry
    if entry.dtype != "U8":
        why = "its scales are there, as of nvfp4: that is bytes (U8)"
        raise _torn(entry, f"{name} is stored as {entry.dtype}", why)
    stem = name.removesuffix(names.codes)
    if stem == name:
        why = f"of nvfp4 checkpoints bytes are read under {names.codes}, a matrix each"
        raise _torn(entry, f"{name} is stored as U8", why)
    if len(entry.shape) != 2:
        why = "of nvfp4 checkpoints matrices are read"
        raise _torn(entry, f"{name} is {list(entry.shape)}", why)
    parts = []
    for suffix in (names.scales, names.scale):
        part = by_name.get(f"{stem}{suffix}")
        if part is None:
            raise _torn(entry, f"{stem}{suffix} is missing")
        parts.append(part)
    scales, scale = parts
    dense = f"{stem}{CODES}"
    if dense != name and dense in by_name:
        raise _torn(by_name[dense], f"{dense} is stored both unquantized and in codes")
    _check_nvfp4_scales(entry, scales, scale)
    rows, row_bytes = entry.shape
    return CodedEntry(dense, (rows, 2 * row_bytes), (entry, scales), scale, form)


def _has_scales(entry: Entry, by_name: Mapping[str, Entry], names: Nvfp4Names) -> bool:
    stem = entry.name.removesuffix(names.codes)
    return stem != entry.name and f"{stem}{names.scales}" in by_name


def _check_nvfp4_scales(codes: Entry, scales: Entry, scale: Entry) -> None:
    """ModelError unless both scales have the types and the shapes of nvfp4 for a matrix's codes."""
    rows, row_bytes = codes.shape
    width = 2 * row_bytes
    what = f"{codes.name} is {list(codes.shape)}, two weights a byte"
    if width % NVFP4_GROUP:
        why = f"{NVFP4_GROUP} weights of a row share a scale"
        raise _torn(codes, what, why)
    _check_dtype(scales, "F8_E4M3")
    _check_dtype(scale, "F32")
    expected_shape = (rows, width // NVFP4_GROUP)
    if scales.shape != expected_shape:
        why = f"{what}, with a scale for {NVFP4_GROUP}: that makes {list(expected_shape)}"
        raise _torn(scales, f"{scales.name} is {list(scales.shape)}", why)
    # The second scale is one number for the whole matrix.
    if math.prod(scale.shape) != 1:
        why = "all of a matrix share one"
        raise _torn(scale, f"{scale.name} is {list(scale.shape)}", why)


def _check_dtype(part: Entry, dtype: str) -> None:
    """ModelError unless a part of an nvfp4 weight is stored as `dtype`, as safetensors names it."""
    if part.dtype != dtype:
        raise _torn(part, f"{part.name} is stored as {part.dtype}", f"of nvfp4 it is {dtype}")


JOINS: dict[str, Callable[[Entry, Mapping[str, Entry], ShippedForm], StoredEntry | None]] = {
    "fp8": _join_scaled,
    "mxfp4": _join_packed,
    "nvfp4": _join_nvfp4,
}


def _torn(entry: Entry, what: str, why: str = "") -> ModelError:
    why = why or "config.json says that the weights are quantized, and codes need their scales"
    return ModelError(what, where=str(entry.file), why=why, fix=FETCH)
