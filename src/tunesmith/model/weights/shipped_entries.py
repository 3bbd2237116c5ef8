"""The tensors of a checkpoint. All tensors of one quantized weight become one entry.

- fp8: e4m3 codes [out, in] and scales in `weight_scale_inv` (compressed-tensors, ModelOpt and
  AutoFP8: `weight_scale`). There is a scale per block of weights (DeepSeek, Qwen: 128 x 128), per
  row, or per matrix (Ministral 3). weight = codes * scale. A stack of experts (Mistral Small 4) is
  [experts, rows, columns], and `_scale_inv` has the scales of each expert.
- nvfp4: two 4-bit codes per byte [out, in / 2], an e4m3 scale per 16 weights of a row, and an fp32
  scale of the entire weight. The names depend on the tool that wrote them (`Nvfp4Names`).
- mxfp4 (gpt-oss): for a stack of experts, `_blocks` has two 4-bit codes per byte, and `_scales` has
  an exponent per 32 codes.

An entry has the shape and the values of the dequantized weight (see `formats/`). Experts in nvfp4
are stored separately, experts in mxfp4 as stacks, and experts in fp8 in either form. This module
does not import torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tunesmith.errors import ModelError
from tunesmith.formats.form import FETCH, MXFP4_GROUP, NVFP4_GROUP, ShippedForm
from tunesmith.model.weights.safetensors_files import Entry, read_headers
from tunesmith.model.weights.shipped import form_of_folder

CODES = ".weight"
PACKED = "_blocks"
EXPONENTS = "_scales"
SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0")
GROUP_BYTES = MXFP4_GROUP // 2
# Scales of activations, keys and values. They are ignored, because activations are not quantized.
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
    """A weight that is stored as codes and scales. `file` and `start` are those of the codes.

    Attributes:
        name, shape: name and shape of the dequantized weight.
        codes: the stored tensors with values for each row: first the codes, then the scales. fp8:
            [out, in], or the shape of the stack. nvfp4: [out, in / 2] and [out, in / 16]. mxfp4:
            [experts, out, groups, 16] and [experts, out, groups].
        scale: the scale tensor of the entire weight, or None for mxfp4.
        form: the stored form of the checkpoint.
        dtype: dtype of the dequantized values.
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
    """Read headers like `read_headers`, but join all tensors of one weight to one entry.

    Raise ModelError if a tensor of a weight is missing or has a wrong shape or dtype.
    """
    headers = read_headers(folder)
    form = form_of_folder(folder)
    if form is None:
        return {file: [*entries] for file, entries in headers.items()}
    by_name = {entry.name: entry for entry in chain.from_iterable(headers.values())}
    joined: dict[Path, list[StoredEntry]] = {}
    for file, entries in headers.items():
        weights = [_join(entry, by_name, form) for entry in entries]
        joined[file] = [weight for weight in weights if weight is not None]
    return joined


@dataclass(frozen=True)
class _Layout:
    """Names and dtypes of the tensors of a quantized weight.

    Attributes:
        codes: the suffix of the codes' name.
        dtype: the dtype of the codes.
        scales: the suffix of each scale's name, with its allowed dtypes.
    """

    codes: str
    dtype: str
    scales: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, form: ShippedForm, name: str) -> "_Layout":
        """Return the layout of the weight to which the tensor of this name belongs."""
        if form.method == "fp8":
            codes = CODES
            scales = form.scale_suffix
            if not name.endswith((codes, scales)):
                # A stack of experts is a parameter itself, so its name does not end in ".weight".
                codes = ""
                scales = scales.removeprefix(CODES)
            return cls(codes, "F8_E4M3", {scales: SCALE_TYPES})
        names = form.names
        if names is not None:
            return cls(names.codes, "U8", {names.scales: ("F8_E4M3",), names.scale: ("F32",)})
        return cls(PACKED, "U8", {EXPONENTS: ("U8",)})


def _join(entry: Entry, by_name: Mapping[str, Entry], form: ShippedForm) -> StoredEntry | None:
    """Return one entry for the codes of a weight and their scales.

    Return an unquantized tensor unchanged. Return None for a scale, which is joined to its codes,
    and for a tensor that is not used.
    """
    name = entry.name
    layout = _Layout.of(form, name)
    if name.endswith(ACTIVATION_SCALES):
        return None
    for suffix in layout.scales:
        if name.endswith(suffix):
            codes = by_name.get(name.removesuffix(suffix) + layout.codes)
            _check_codes(entry, codes, layout)
            return None
    # A tensor with another kind of dtype, such as BF16, is an unquantized weight. Other 8-bit
    # floats are rejected below.
    if not entry.dtype.startswith(layout.dtype[:2]):
        return entry
    if entry.dtype != layout.dtype or not name.endswith(layout.codes):
        why = f"{form.method} weights must be {layout.dtype} with the name NAME{layout.codes}"
        raise _broken_entry(entry, f"{name} is stored as {entry.dtype}", why)
    stem = name.removesuffix(layout.codes)
    scales = [_scale_of(entry, by_name, layout, suffix) for suffix in layout.scales]
    dense = f"{stem}{CODES}" if layout.codes.startswith(CODES) else stem
    if dense != name and dense in by_name:
        raise _broken_entry(by_name[dense], f"{dense} is stored both unquantized and in codes")
    shape, *scale_shapes = _shapes(entry, form)
    for scale, expected in zip(scales, scale_shapes, strict=True):
        is_one = math.prod(scale.shape) == math.prod(expected) == 1
        if scale.shape != expected and not is_one:
            raise _broken_entry(
                scale,
                f"{scale.name} is {list(scale.shape)}",
                f"{name} is {list(entry.shape)}, {form.describe()}: the expected shape is "
                f"{list(expected)}",
            )
    entire_scale = None if form.method == "mxfp4" else scales.pop()
    return CodedEntry(dense, shape, (entry, *scales), entire_scale, form)


def _check_codes(scale: Entry, codes: Entry | None, layout: _Layout) -> None:
    """Raise ModelError if a scale has no codes, or if the codes have a wrong dtype."""
    if codes is None:
        raise _broken_entry(scale, f"the quantized weight of {scale.name} is missing")
    if codes.dtype != layout.dtype:
        raise _broken_entry(
            codes,
            f"{codes.name} is stored as {codes.dtype}",
            f"the weight has scales, so its codes must be {layout.dtype}",
        )


def _scale_of(codes: Entry, by_name: Mapping[str, Entry], layout: _Layout, suffix: str) -> Entry:
    """Return the scale tensor with this suffix for the codes.

    Raise ModelError if the scale is missing or has an unsupported dtype.
    """
    name = codes.name.removesuffix(layout.codes) + suffix
    scale = by_name.get(name)
    if scale is None:
        raise _broken_entry(codes, f"the scales of {codes.name} are missing: {name}")
    dtypes = layout.scales[suffix]
    if scale.dtype not in dtypes:
        raise _broken_entry(
            scale,
            f"{scale.name} is stored as {scale.dtype}",
            f"supported dtypes of these scales: {', '.join(dtypes)}",
        )
    return scale


def _shapes(codes: Entry, form: ShippedForm) -> list[tuple[int, ...]]:
    """Return the shape of the dequantized weight, and the expected shapes of its scales."""
    shape = codes.shape
    if form.method == "mxfp4":
        why = f"blocks are [experts, rows, groups, {GROUP_BYTES}]"
        if len(shape) == 4 and shape[-1] == GROUP_BYTES:
            experts, rows, groups, _ = shape
            # The model stores the transposed matrix: [experts, in, out].
            return [(experts, groups * MXFP4_GROUP, rows), shape[:-1]]
    elif form.method == "nvfp4":
        why = f"only matrices with groups of {NVFP4_GROUP} weights per row are supported"
        if len(shape) == 2 and 2 * shape[1] % NVFP4_GROUP == 0:
            rows, pairs = shape
            return [(rows, 2 * pairs), (rows, 2 * pairs // NVFP4_GROUP), (1,)]
    else:
        why = (
            "only matrices, and stacks whose blocks divide half of an expert's rows, are supported"
        )
        dimensions = 2 if codes.name.endswith(CODES) else 3
        if len(shape) == dimensions:
            *experts_of, rows, columns = shape
            # The rows of an expert can be two projections (gate and up). Therefore no block may
            # contain rows of both halves.
            if dimensions == 2 or form.block is None or rows % (2 * form.block[0]) == 0:
                return [shape, (*experts_of, *form.scale_shape(rows, columns))]
    raise _broken_entry(codes, f"{codes.name} is {list(shape)}", why)


def _broken_entry(entry: Entry, what: str, why: str = "") -> ModelError:
    why = why or "config.json says that the weights are quantized, and codes need their scales"
    return ModelError(what, where=entry.file, why=why, fix=FETCH)
