"""Weights that a checkpoint ships in 8 or 4 bits: what config.json says of them, and which stored
tensors make one weight.

- fp8: e4m3 codes [out, in], and `weight_scale_inv` beside them: a scale for each block of weights
  (DeepSeek, Qwen: 128 x 128), or one of all (Ministral 3). weight = codes * scale. Experts are
  stored one by one.
- mxfp4 (gpt-oss): of a stack of experts `_blocks`, two 4-bit codes a byte, and `_scales`, an
  exponent for each 32 of them; see `mxfp4.py`.

A reader gets the pair as one entry with the shape of the weight, whose values are dense. No torch
is imported here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.config.schema import Model, Run
from tunesmith.errors import ModelError, RecipeError
from tunesmith.model.safetensors_files import Entry, read_headers, read_json
from tunesmith.units import ceil_div

if TYPE_CHECKING:
    from tunesmith.model.spec import ModelSpec

FETCH_CONFIG = "take config.json from the model's page again: tunesmith fetch MODEL"
FETCH = "fetch the model again: tunesmith fetch MODEL"
UNQUANTIZED = "take the unquantized model; model.quantize: nf4 then quantizes it as it is loaded"
# Transformers' own default of `weight_block_size`.
BLOCK = (128, 128)
SCALE = ".weight_scale_inv"
ACTIVATION_SCALE = ".activation_scale"
CODES = ".weight"
PACKED = "_blocks"
EXPONENTS = "_scales"
SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0")
# Weights of mxfp4 that share an exponent, in so many bytes.
GROUP = 32
GROUP_BYTES = GROUP // 2
AS_SHIPPED: Literal["as-shipped"] = "as-shipped"
KEPT = ("fp8", "mxfp4")  # forms whose codes a frozen base can keep


@dataclass(frozen=True)
class ShippedForm:
    """How a checkpoint's weights are stored, as its config.json says.

    Attributes:
        method: fp8 or mxfp4.
        block: rows and columns of a weight that share a scale; None: all share one.
        not_converted: patterns of the modules whose weights are plain.
        has_activation_scales: it ships scales for inputs, which training does not round.
    """

    method: str
    block: tuple[int, int] | None = None
    not_converted: tuple[str, ...] = ()
    has_activation_scales: bool = False

    def describe(self) -> str:
        """Words for the user."""
        if self.method == "mxfp4":
            return "MXFP4"
        if self.block is None:
            return "FP8 with a scale a matrix"
        rows, columns = self.block
        return f"FP8 in blocks of {rows} x {columns}"

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Of the scales of a weight [rows, columns]; () where there is one."""
        if self.block is None:
            return ()
        return ceil_div(rows, self.block[0]), ceil_div(columns, self.block[1])


@dataclass(frozen=True)
class ScaledEntry:
    """A weight in fp8: codes and their scales. It goes by the name of the codes.

    Attributes:
        block: as of `ShippedForm`.
        dtype: of the values that are read.
    """

    codes: Entry
    scale: Entry
    block: tuple[int, int] | None
    dtype: str = "F32"

    @property
    def name(self) -> str:
        return self.codes.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def file(self) -> Path:
        return self.codes.file

    @property
    def start(self) -> int:
        return self.codes.start


@dataclass(frozen=True)
class PackedEntry:
    """A stack of experts in mxfp4, by its own name; dense it is [experts, in, out].

    Attributes:
        blocks: [experts, out, groups, 16]; exponents: [experts, out, groups].
        dtype: of the values that are read.
    """

    blocks: Entry
    exponents: Entry
    dtype: str = "F32"

    @property
    def name(self) -> str:
        return self.blocks.name.removesuffix(PACKED)

    @property
    def shape(self) -> tuple[int, ...]:
        experts, rows, groups, _ = self.blocks.shape
        return experts, groups * GROUP, rows

    @property
    def file(self) -> Path:
        return self.blocks.file

    @property
    def start(self) -> int:
        return self.blocks.start


StoredEntry = Entry | ScaledEntry | PackedEntry


def parts_of(entry: StoredEntry) -> list[Entry]:
    """The tensors in the file that are one weight."""
    if isinstance(entry, ScaledEntry):
        return [entry.codes, entry.scale]
    if isinstance(entry, PackedEntry):
        return [entry.blocks, entry.exponents]
    return [entry]


# ---- config.json


def stated_quantization(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """How the weights are quantized; empty where they are not. ModelError for no mapping.

    A vision-language model says it of the whole, or of its text model.
    """
    text = config.get("text_config")
    stored = config.get("quantization_config")
    if not stored and isinstance(text, Mapping):
        stored = text.get("quantization_config")
    stored = stored or {}
    if not isinstance(stored, Mapping):
        raise ModelError(
            f"quantization_config is {stored!r:.100}: it must be a mapping",
            where=where,
            fix=FETCH_CONFIG,
        )
    return stored


def stored_quantization(config: Mapping[str, Any], where: str) -> str | None:
    """`bnb-nf4` for bitsandbytes' 4-bit NormalFloat checkpoints, `fp8`, `mxfp4`; None for plain
    ones.

    ModelError for every other kind.
    """
    stored = stated_quantization(config, where)
    if not stored:
        return None
    if shipped_form(config, where) is not None:
        return str(stored["quant_method"])
    method = str(stored.get("quant_method", ""))
    if method in ("bitsandbytes", "bitsandbytes_4bit", "") and stored.get("load_in_4bit"):
        if stored.get("bnb_4bit_quant_type") == "nf4":
            return "bnb-nf4"
        method = f"bitsandbytes {stored.get('bnb_4bit_quant_type', 'fp4')}"
    elif stored.get("load_in_8bit"):
        method = "bitsandbytes 8-bit"
    raise ModelError(
        f"the weights are quantized with {method or 'an unnamed method'}",
        where=where,
        why="plain weights, bitsandbytes nf4, fp8 and mxfp4 are read; other formats are for "
        "serving, not for training",
        fix="take the unquantized model and set model.quantize: nf4",
    )


def shipped_form(config: Mapping[str, Any], where: str) -> ShippedForm | None:
    """The form that a parsed config.json, called `where`, says its weights have; None: another.

    ModelError where it says so in a way that is not read.
    """
    stored = stated_quantization(config, where)
    method = stored.get("quant_method")
    if method not in ("fp8", "mxfp4"):
        return None
    for key, plain in (("modules_to_convert", None), ("expert_dtype", "fp8")):
        value = stored.get(key)
        if value not in (plain, None, []):
            raise ModelError(
                f"quantization_config.{key} is {value!r:.100}, which is not read",
                where=where,
                why="linear layers and experts in e4m3 are",
                fix=UNQUANTIZED,
            )
    skipped = stored.get("modules_to_not_convert") or stored.get("ignored_layers") or []
    if not isinstance(skipped, list | tuple) or not all(isinstance(name, str) for name in skipped):
        raise ModelError(
            f"quantization_config.modules_to_not_convert is {skipped!r:.100}: "
            "it must be a list of names",
            where=where,
            fix=FETCH_CONFIG,
        )
    if method == "mxfp4":
        return ShippedForm(method, not_converted=tuple(skipped))
    return ShippedForm(
        method,
        _block_size(stored, where),
        tuple(skipped),
        has_activation_scales=stored.get("activation_scheme") == "static",
    )


def check_quantize(quantize: str, config: Mapping[str, Any], where: str) -> None:
    """ModelError where `model.quantize` and what config.json says of the weights do not fit."""
    stored = stored_quantization(config, where)
    if stored == "bnb-nf4" and quantize != "nf4":
        said = "" if quantize == "auto" else f"the recipe says model.quantize: {quantize}"
        raise ModelError(
            "the checkpoint is already in bitsandbytes nf4",
            where=where,
            why=said,
            fix="set model.quantize: nf4, or take the unquantized model",
        )
    if quantize == AS_SHIPPED and stored not in KEPT:
        why = "its weights are plain"
        if stored:
            why = f"its weights are in {stored}, and {' and '.join(KEPT)} can be kept"
        raise ModelError(
            "model.quantize is as-shipped, and this base ships nothing that can be kept so",
            where=where,
            why=why,
            fix="model.quantize=none, or model.quantize=nf4 to save memory",
        )


def resolve_quantize(model: Model, spec: "ModelSpec") -> Model:
    """The recipe's `model` section with the word that `quantize: auto` stands for."""
    if model.quantize != "auto":
        return model
    return replace(model, quantize=AS_SHIPPED if spec.quantized in KEPT else "none")


def check_frozen(run: Run) -> None:
    """RecipeError where a base that is kept as it ships would be trained in full."""
    if run.model.quantize == AS_SHIPPED and run.adapter.kind == "none":
        raise RecipeError(
            "adapter.kind is none, and the base is kept as it ships, in codes",
            where="model.quantize",
            why="full fine-tuning trains the base weights, and codes are frozen",
            fix=f"model.quantize=none, which trains the {run.model.dtype} weights made of it",
        )


def _block_size(stored: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    block = stored.get("weight_block_size", BLOCK)
    if block is None:
        return None
    is_pair = isinstance(block, list | tuple) and len(block) == 2
    if not is_pair or any(type(size) is not int or size < 1 for size in block):
        raise ModelError(
            f"quantization_config.weight_block_size is {block!r:.100}: "
            "it must be two whole numbers above 0, or null for a scale a matrix",
            where=where,
            fix=FETCH_CONFIG,
        )
    return block[0], block[1]


def form_of_folder(folder: Path) -> ShippedForm | None:
    """What the config.json of a folder says; None where there is none."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    return shipped_form(read_json(file), str(file))


# ---- the tensors of a checkpoint


def read_entries(folder: Path) -> dict[Path, list[StoredEntry]]:
    """As `read_headers`, with the tensors that make one weight as one entry.

    ModelError where a part of one is missing, or of another shape or type.
    """
    headers = read_headers(folder)
    form = form_of_folder(folder)
    if form is None:
        return {file: [*entries] for file, entries in headers.items()}
    by_name = {entry.name: entry for entries in headers.values() for entry in entries}
    join = _join_packed if form.method == "mxfp4" else _join_scaled
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
    if name.endswith(ACTIVATION_SCALE):
        return None
    if name.endswith(SCALE):
        weight = by_name.get(name.removesuffix(SCALE) + CODES)
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
    scale = by_name.get(f"{name.removesuffix(CODES)}{SCALE}") if name.endswith(CODES) else None
    if scale is None:
        raise _torn(entry, f"the scales of {name} are missing")
    if len(entry.shape) != 2:
        raise _torn(entry, f"{name} is {list(entry.shape)}", "of fp8 checkpoints matrices are read")
    if scale.dtype not in SCALE_TYPES:
        why = f"{', '.join(SCALE_TYPES)} are read"
        raise _torn(scale, f"{scale.name} is stored as {scale.dtype}", why)
    wanted = form.scale_shape(*entry.shape)
    is_one = form.block is None and math.prod(scale.shape) == 1
    if scale.shape != wanted and not is_one:
        why = f"{name} is {list(entry.shape)}, {form.describe()}: that makes {list(wanted)}"
        raise _torn(scale, f"{scale.name} is {list(scale.shape)}", why)
    return ScaledEntry(entry, scale, form.block)


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
    return PackedEntry(entry, exponents)


def _torn(entry: Entry, what: str, why: str = "") -> ModelError:
    why = why or "config.json says that the weights are quantized, and codes need their scales"
    return ModelError(what, where=str(entry.file), why=why, fix=FETCH)
