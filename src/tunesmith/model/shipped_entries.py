"""The tensors of a checkpoint, those that make one weight as one entry.

- fp8: e4m3 codes [out, in], and `weight_scale_inv` beside them (compressed-tensors, ModelOpt and
  AutoFP8: `weight_scale`): a scale for each block of weights (DeepSeek, Qwen: 128 x 128), for each
  row, or one of all (Ministral 3). weight = codes * scale. A stack of experts (Mistral Small 4) is
  [experts, rows, columns], and `_scale_inv` has the scales of each.
- nvfp4: two 4-bit codes a byte [out, in / 2], an e4m3 scale for each 16 of a row, and one of all in
  fp32; their names are those of the tool that wrote them (`Nvfp4Names`).
- mxfp4 (gpt-oss): of a stack of experts `_blocks`, two 4-bit codes a byte, and `_scales`, an
  exponent for each 32 of them.

The values of an entry are dense, and so is its shape (see `formats/`). Experts in nvfp4 are stored
one by one, those in mxfp4 as stacks, those in fp8 either way. No torch is imported here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import ModelError
from tunesmith.formats.form import FETCH, MXFP4_GROUP, NVFP4_GROUP, ShippedForm
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
    "_activation_scale",
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
        codes: the tensors that have something of each row, the codes first; of fp8 [out, in] or,
            of a stack, its own shape, of nvfp4 [out, in / 2] and [out, in / 16], of a stack in
            mxfp4 [experts, out, groups, 16] and [experts, out, groups].
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
    """Read headers as `read_headers` does, with the tensors that make one weight as one entry.

    ModelError where a part of one is missing, or of another shape or type.
    """
    headers = read_headers(folder)
    form = form_of_folder(folder)
    if form is None:
        return {file: [*entries] for file, entries in headers.items()}
    by_name = {entry.name: entry for entries in headers.values() for entry in entries}
    joined: dict[Path, list[StoredEntry]] = {}
    for file, entries in headers.items():
        weights = (_join(entry, by_name, form) for entry in entries)
        joined[file] = [weight for weight in weights if weight is not None]
    return joined


@dataclass(frozen=True)
class _Layout:
    """The names and types of the tensors of a weight in codes.

    Attributes:
        codes: the end of the name of the codes; dtype: of these.
        scales: the ends of the names of the scales, and the types that they may have.
    """

    codes: str
    dtype: str
    scales: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, form: ShippedForm, name: str) -> "_Layout":
        """Return the layout of the weight that a tensor of this name is, or is a part of."""
        if form.method == "fp8":
            codes, scales = CODES, form.scale_suffix
            if not name.endswith((codes, scales)):
                # A stack of experts is a parameter by its own name, not a module's `weight`.
                codes, scales = "", scales.removeprefix(CODES)
            return cls(codes, "F8_E4M3", {scales: SCALE_TYPES})
        if form.names is not None:
            names = form.names
            return cls(names.codes, "U8", {names.scales: ("F8_E4M3",), names.scale: ("F32",)})
        return cls(PACKED, "U8", {EXPONENTS: ("U8",)})


def _join(entry: Entry, by_name: Mapping[str, Entry], form: ShippedForm) -> StoredEntry | None:
    """The weight that a tensor of the checkpoint is, alone or with its scales; None: it is the part
    of another, or not used.
    """
    name = entry.name
    layout = _Layout.of(form, name)
    if name.endswith(ACTIVATION_SCALES):
        return None
    for suffix in layout.scales:
        if name.endswith(suffix):
            _check_codes(entry, by_name.get(name.removesuffix(suffix) + layout.codes), layout)
            return None
    # Of other floats in 8 bits none is a plain weight.
    if not entry.dtype.startswith(layout.dtype[:2]):
        return entry
    if entry.dtype != layout.dtype or not name.endswith(layout.codes):
        why = f"of {form.method} checkpoints {layout.dtype} is read, as NAME{layout.codes}"
        raise _torn(entry, f"{name} is stored as {entry.dtype}", why)
    stem = name.removesuffix(layout.codes)
    scales = [_scale_of(entry, by_name, layout, suffix) for suffix in layout.scales]
    dense = f"{stem}{CODES}" if layout.codes.startswith(CODES) else stem
    if dense != name and dense in by_name:
        raise _torn(by_name[dense], f"{dense} is stored both unquantized and in codes")
    shape, *scale_shapes = _shapes(entry, form)
    for scale, expected in zip(scales, scale_shapes, strict=True):
        is_one = math.prod(scale.shape) == math.prod(expected) == 1
        if scale.shape != expected and not is_one:
            why = f"{name} is {list(entry.shape)}, {form.describe()}: that makes {list(expected)}"
            raise _torn(scale, f"{scale.name} is {list(scale.shape)}", why)
    if form.method == "mxfp4":
        return CodedEntry(dense, shape, (entry, *scales), None, form)
    *of_rows, of_all = scales
    return CodedEntry(dense, shape, (entry, *of_rows), of_all, form)


def _check_codes(scale: Entry, codes: Entry | None, layout: _Layout) -> None:
    """ModelError unless there are codes for scales that are there."""
    if codes is None:
        raise _torn(scale, f"there is no weight in codes for {scale.name}")
    if codes.dtype != layout.dtype:
        why = f"its scales are there, as of codes: that is {layout.dtype}"
        raise _torn(codes, f"{codes.name} is stored as {codes.dtype}", why)


def _scale_of(codes: Entry, by_name: Mapping[str, Entry], layout: _Layout, suffix: str) -> Entry:
    """The scales of some codes whose name ends so; ModelError where they are not, or of a type that
    is not read.
    """
    name = codes.name.removesuffix(layout.codes) + suffix
    scale = by_name.get(name)
    if scale is None:
        raise _torn(codes, f"the scales of {codes.name} are missing: {name}")
    dtypes = layout.scales[suffix]
    if scale.dtype not in dtypes:
        why = f"of such scales {', '.join(dtypes)} is read"
        raise _torn(scale, f"{scale.name} is stored as {scale.dtype}", why)
    return scale


def _shapes(codes: Entry, form: ShippedForm) -> list[tuple[int, ...]]:
    """The shape of the dense weight, and those that its scales are to have."""
    shape = codes.shape
    if form.method == "mxfp4" and len(shape) == 4 and shape[-1] == GROUP_BYTES:
        experts, rows, groups, _ = shape
        # The model has it the other way around.
        return [(experts, groups * MXFP4_GROUP, rows), shape[:-1]]
    dimensions = 2 if codes.name.endswith(CODES) else 3
    if form.method == "fp8" and len(shape) == dimensions:
        rows, columns = shape[-2:]
        # Half of an expert's rows may be another projection's.
        if dimensions == 2 or form.block is None or rows % (2 * form.block[0]) == 0:
            return [shape, (*shape[:-2], *form.scale_shape(rows, columns))]
    if form.method == "nvfp4" and len(shape) == 2 and 2 * shape[1] % NVFP4_GROUP == 0:
        rows, width = shape[0], 2 * shape[1]
        return [(rows, width), (rows, width // NVFP4_GROUP), (1,)]
    why = {
        "fp8": "matrices are read, and stacks whose blocks divide half of an expert's rows",
        "nvfp4": f"matrices are read, of whose rows {NVFP4_GROUP} weights share a scale",
        "mxfp4": f"blocks are [experts, rows, groups, {GROUP_BYTES}]",
    }
    raise _torn(codes, f"{codes.name} is {list(shape)}", why[form.method])


def _torn(entry: Entry, what: str, why: str = "") -> ModelError:
    why = why or "config.json says that the weights are quantized, and codes need their scales"
    return ModelError(what, where=str(entry.file), why=why, fix=FETCH)
