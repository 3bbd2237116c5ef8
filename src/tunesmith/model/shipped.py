"""Weights that a checkpoint ships in 8 or 4 bits: what config.json says of them.

fp8, nvfp4 and mxfp4 are read; `shipped_entries.py` has which stored tensors make one weight. No
torch is imported here.
"""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.config.schema import Model, Run
from tunesmith.errors import ModelError, RecipeError
from tunesmith.model.safetensors_files import read_model_config
from tunesmith.units import ceil_div

if TYPE_CHECKING:
    from tunesmith.model.spec import ModelSpec

FETCH_CONFIG = "take config.json from the model's page again: tunesmith fetch MODEL"
FETCH = "fetch the model again: tunesmith fetch MODEL"
UNQUANTIZED = "take the unquantized model; model.quantize: nf4 then quantizes it as it is loaded"
# Transformers' own default of `weight_block_size`.
BLOCK = (128, 128)
ROW = (1, 0)  # as a block: all of a row
# How the name of the scales of a weight in fp8 ends, by Transformers and by other tools.
WEIGHT_SCALE_INV = ".weight_scale_inv"
WEIGHT_SCALE = ".weight_scale"
NVFP4_GROUP = 16  # weights of a row that share a scale
AS_SHIPPED: Literal["as-shipped"] = "as-shipped"
KEEPABLE = ("fp8", "mxfp4", "nvfp4")  # forms whose codes a frozen base can keep
# What `format` of compressed-tensors says of weights in fp8, with inputs in 8 bits and without.
COMPRESSED_FP8 = ("float-quantized", "naive-quantized")
COMPRESSED_NVFP4 = "nvfp4-pack-quantized"
# What `quant_algo` of ModelOpt says of weights in nvfp4, with inputs in 4 bits and without.
MODELOPT_NVFP4 = ("NVFP4", "W4A16_NVFP4")
MODELOPT_FP8 = "FP8"
# What both have for the weights of a group.
FP8_WEIGHTS = {"num_bits": 8, "type": "float"}
NVFP4_WEIGHTS = {"num_bits": 4, "type": "float", "group_size": NVFP4_GROUP}


@dataclass(frozen=True)
class Nvfp4Names:
    """How a tool calls the three tensors of a weight in nvfp4, after the name of its module.

    Attributes:
        codes: two a byte; scales: one for 16 weights of a row; scale: one of all.
        divides: `scales` are divided by `scale`; False: multiplied.
    """

    codes: str
    scales: str
    scale: str
    divides: bool


COMPRESSED_TENSORS = Nvfp4Names(
    ".weight_packed", ".weight_scale", ".weight_global_scale", divides=True
)
MODELOPT = Nvfp4Names(".weight", ".weight_scale", ".weight_scale_2", divides=False)


@dataclass(frozen=True)
class ShippedForm:
    """How a checkpoint's weights are stored, as its config.json says.

    Attributes:
        method: one of KEEPABLE.
        block: rows and columns of a weight that share a scale; ROW: one a row; None: all share one.
        not_converted: patterns of the modules whose weights are plain.
        converted: those of the modules whose weights are not; empty: all others.
        has_expressions: these patterns are regular expressions; False: Transformers' own.
        scale_suffix: how the name of the scales of fp8 ends.
        names: of the tensors of nvfp4.
        has_activation_scales: it ships scales for inputs, or keys and values, which training does
            not round.
    """

    method: str
    block: tuple[int, int] | None = None
    not_converted: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()
    has_expressions: bool = False
    scale_suffix: str = WEIGHT_SCALE_INV
    names: Nvfp4Names | None = None
    has_activation_scales: bool = False

    def describe(self) -> str:
        """Words for the user."""
        if self.method != "fp8":
            return self.method.upper()
        if self.block is None:
            return "FP8 with a scale a matrix"
        if self.block == ROW:
            return "FP8 with a scale a row"
        rows, columns = self.block
        return f"FP8 in blocks of {rows} x {columns}"

    @property
    def plain_key(self) -> str:
        """Of the list in `quantization_config` that `not_converted` is of."""
        if self.has_expressions:
            return "ignore"
        # AutoFP8's
        return "ignored_layers" if self.scale_suffix == WEIGHT_SCALE else "modules_to_not_convert"

    def has_codes(self, module: str) -> bool:
        """Whether the weights of a module, by its name in the checkpoint, are in codes; of forms
        that have regular expressions.
        """
        if _matches(self.not_converted, module):
            return False
        return not self.converted or _matches(self.converted, module)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Of the scales of a weight [rows, columns]."""
        if self.block is None:
            return 1, 1
        height, width = self.block
        return ceil_div(rows, height), ceil_div(columns, width) if width else 1

    def block_of(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of a weight [rows, columns] that share a scale."""
        height, width = self.block or (rows, columns)
        return height, width or columns


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
    """`bnb-nf4` for bitsandbytes' 4-bit NormalFloat checkpoints, one of KEEPABLE; None: plain.

    ModelError for every other kind.
    """
    stored = stated_quantization(config, where)
    if not stored:
        return None
    form = shipped_form(config, where)
    if form is not None:
        return form.method
    method = str(stored.get("quant_method", ""))
    # These two have many formats.
    if method in ("compressed-tensors", "modelopt"):
        method = f"{method} {stored.get('format') or stored.get('quant_algo')}"
    if method in ("bitsandbytes", "bitsandbytes_4bit", "") and stored.get("load_in_4bit"):
        if stored.get("bnb_4bit_quant_type") == "nf4":
            return "bnb-nf4"
        method = f"bitsandbytes {stored.get('bnb_4bit_quant_type', 'fp4')}"
    elif stored.get("load_in_8bit"):
        method = "bitsandbytes 8-bit"
    raise ModelError(
        f"the weights are quantized with {method or 'an unnamed method'}",
        where=where,
        why="plain weights, bitsandbytes nf4, fp8, mxfp4 and nvfp4 are read; other formats are for "
        "serving, not for training",
        fix="use the unquantized model and set model.quantize: nf4",
    )


def shipped_form(config: Mapping[str, Any], where: str) -> ShippedForm | None:
    """The form that a parsed config.json, called `where`, says its weights have; None: another.

    ModelError where it says so in a way that is not read.
    """
    stored = stated_quantization(config, where)
    reader = FORM_READERS.get(str(stored.get("quant_method")))
    return reader(stored, where) if reader is not None else None


def _transformers_form(stored: Mapping[str, Any], where: str) -> ShippedForm:
    """FP8 and MXFP4, as Transformers writes them; FP8 also as AutoFP8 does."""
    for key, plain in (("modules_to_convert", None), ("expert_dtype", "fp8")):
        _check_value(stored, key, (plain,), where)
    skipped = tuple(_names(stored, ("modules_to_not_convert", "ignored_layers"), where))
    if stored["quant_method"] == "mxfp4":
        return ShippedForm("mxfp4", not_converted=skipped)
    has_activation_scales = stored.get("activation_scheme") == "static"
    # AutoFP8 calls its method the same, and has other names: one scale a matrix.
    if not {"weight_block_size", "modules_to_not_convert"} & stored.keys():
        return ShippedForm(
            "fp8",
            not_converted=skipped,
            scale_suffix=WEIGHT_SCALE,
            has_activation_scales=has_activation_scales,
        )
    block = stored.get("weight_block_size", BLOCK)
    return ShippedForm(
        "fp8",
        None if block is None else _block_size(block, "weight_block_size", where),
        skipped,
        has_activation_scales=has_activation_scales,
    )


def _compressed_tensors_form(stored: Mapping[str, Any], where: str) -> ShippedForm | None:
    """FP8 and NVFP4 as compressed-tensors writes them: llm-compressor, and `export --quant`."""
    stated = stored.get("format")
    if stated not in (*COMPRESSED_FP8, COMPRESSED_NVFP4):
        return None
    is_fp8 = stated in COMPRESSED_FP8
    # Weights that were rotated, or have holes.
    _check_value(stored, "transform_config", (), where)
    sparsity = stored.get("sparsity_config")
    if not isinstance(sparsity, Mapping) or sparsity.get("format") != "dense":
        _check_value(stored, "sparsity_config", (), where)
    group = _only_group(stored, FP8_WEIGHTS if is_fp8 else NVFP4_WEIGHTS, where)
    _check_value(group, "format", COMPRESSED_FP8 if is_fp8 else (COMPRESSED_NVFP4,), where)
    weights = group["weights"]
    _check_value(weights, "symmetric", (True,), where)
    targets = _names(group, ("targets",), where)
    # All linear layers, by their class.
    converted = _expressions([] if "Linear" in targets else targets, where)
    skipped = _expressions(_names(stored, ("ignore",), where), where)
    if is_fp8:
        return ShippedForm(
            "fp8",
            _strategy_block(weights, where),
            skipped,
            converted,
            has_expressions=True,
            scale_suffix=WEIGHT_SCALE,
            has_activation_scales=_has_static_scales(stored, group),
        )
    return ShippedForm(
        "nvfp4",
        not_converted=skipped,
        converted=converted,
        has_expressions=True,
        names=COMPRESSED_TENSORS,
        has_activation_scales=bool(group.get("input_activations")),
    )


def _strategy_block(weights: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    """`ShippedForm.block` by the strategy of compressed-tensors."""
    _check_value(weights, "dynamic", (False,), where)
    _check_value(weights, "strategy", ("tensor", "channel", "block"), where)
    strategy = weights.get("strategy")
    if strategy == "block":
        return _block_size(weights.get("block_structure"), "block_structure", where)
    return ROW if strategy == "channel" else None


def _has_static_scales(stored: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether compressed-tensors has scales of inputs, or of keys and values, in its files."""
    inputs = group.get("input_activations")
    is_static = isinstance(inputs, Mapping) and not inputs.get("dynamic")
    return is_static or bool(stored.get("kv_cache_scheme"))


def _modelopt_form(stored: Mapping[str, Any], where: str) -> ShippedForm | None:
    """FP8 with a scale a matrix, and NVFP4, as NVIDIA's ModelOpt writes them. Its names of modules
    have wildcards.
    """
    algorithm = stored.get("quant_algo")
    if algorithm not in (MODELOPT_FP8, *MODELOPT_NVFP4):
        return None
    is_fp8 = algorithm == MODELOPT_FP8
    if "config_groups" in stored:
        _only_group(stored, FP8_WEIGHTS if is_fp8 else NVFP4_WEIGHTS, where)
    _check_value(stored, "group_size", () if is_fp8 else (NVFP4_GROUP,), where)
    _check_value(stored, "pre_quant_scale", (False,), where)
    names = _names(stored, ("ignore", "exclude_modules"), where)
    return ShippedForm(
        "fp8" if is_fp8 else "nvfp4",
        not_converted=tuple(fnmatch.translate(name) for name in names),
        has_expressions=True,
        scale_suffix=WEIGHT_SCALE,
        names=None if is_fp8 else MODELOPT,
        has_activation_scales=algorithm != "W4A16_NVFP4",
    )


FORM_READERS: dict[str, Callable[[Mapping[str, Any], str], ShippedForm | None]] = {
    "fp8": _transformers_form,
    "mxfp4": _transformers_form,
    "compressed-tensors": _compressed_tensors_form,
    "modelopt": _modelopt_form,
}


def _only_group(
    stored: Mapping[str, Any], expected: Mapping[str, Any], where: str
) -> Mapping[str, Any]:
    """The only one of `config_groups`, whose weights are as `expected`."""
    groups = stored.get("config_groups")
    group = None
    if isinstance(groups, Mapping) and len(groups) == 1:
        [group] = groups.values()
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise ModelError(
            f"quantization_config.config_groups is {groups!r:.100}",
            where=where,
            why="one group of weights in fp8 or nvfp4 is read",
            fix=UNQUANTIZED,
        )
    for key, value in expected.items():
        _check_value(group["weights"], key, (value,), where)
    return group


def _check_value(stored: Mapping[str, Any], key: str, read: Sequence[Any], where: str) -> None:
    """ModelError for a key that is there with another value than those that are read, and not
    empty.
    """
    value = stored.get(key)
    if value in (None, [], {}) or value in read:
        return
    raise ModelError(
        f"quantization_config: {key} is {value!r:.100}, which is not supported",
        where=where,
        why="linear layers and experts in e4m3, or in e2m1 by groups of 16, are",
        fix=UNQUANTIZED,
    )


def _names(stored: Mapping[str, Any], keys: Sequence[str], where: str) -> Sequence[str]:
    """The list of names under the first of these keys that has one."""
    key = next((key for key in keys if stored.get(key)), keys[0])
    names = stored.get(key) or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"quantization_config.{key} is {names!r:.100}: it must be a list of names",
            where=where,
            fix=FETCH_CONFIG,
        )
    return names


def _expressions(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Names of compressed-tensors as regular expressions, which some are after `re:`."""
    expressions = []
    for name in names:
        expression = name.removeprefix("re:")
        if expression == name:
            expression = f"{re.escape(name)}$"
        try:
            re.compile(expression)
        except re.error as error:
            raise ModelError(
                f"quantization_config has {name!r:.100}, which is no regular expression",
                where=where,
                why=str(error),
                fix=FETCH_CONFIG,
            ) from error
        expressions.append(expression)
    return tuple(expressions)


def _matches(expressions: Sequence[str], name: str) -> bool:
    return any(re.match(expression, name) for expression in expressions)


def check_quantize(quantize: str, config: Mapping[str, Any], where: str) -> None:
    """ModelError where `model.quantize` and what config.json says of the weights do not fit."""
    stored = stored_quantization(config, where)
    if stored == "bnb-nf4" and quantize != "nf4":
        why = "" if quantize == "auto" else f"the recipe has model.quantize: {quantize}"
        raise ModelError(
            "the checkpoint is already in bitsandbytes nf4",
            where=where,
            why=why,
            fix="set model.quantize: nf4, or use the unquantized model",
        )
    if quantize == AS_SHIPPED and stored not in KEEPABLE:
        why = "its weights are not quantized"
        if stored:
            why = f"its weights are in {stored}, and {', '.join(KEEPABLE)} can be kept"
        raise ModelError(
            "model.quantize is as-shipped, but this base is not stored in a supported "
            "quantized format",
            where=where,
            why=why,
            fix="model.quantize=none, or model.quantize=nf4 to save memory",
        )


def resolve_quantize(model: Model, spec: "ModelSpec") -> Model:
    """The recipe's `model` section with the word that `quantize: auto` stands for."""
    if model.quantize != "auto":
        return model
    return replace(model, quantize=AS_SHIPPED if spec.quantized in KEEPABLE else "none")


def check_frozen(run: Run) -> None:
    """RecipeError where a base that stays as it ships would be trained in full."""
    if run.model.quantize == AS_SHIPPED and run.adapter.kind == "none":
        raise RecipeError(
            "adapter.kind is none, but the base is kept quantized (as-shipped)",
            where="model.quantize",
            why="full fine-tuning trains the base weights, but quantized weights are frozen",
            fix=f"model.quantize=none, which trains the {run.model.dtype} weights made from it",
        )


def _block_size(block: Any, key: str, where: str) -> tuple[int, int]:
    is_pair = isinstance(block, list | tuple) and len(block) == 2
    if not is_pair or any(type(size) is not int or size < 1 for size in block):
        raise ModelError(
            f"quantization_config: {key} is {block!r:.100}: it must be two whole numbers above 0",
            where=where,
            why="rows and columns of a weight that share a scale",
            fix=FETCH_CONFIG,
        )
    return block[0], block[1]


def form_of_folder(folder: Path) -> ShippedForm | None:
    """What the config.json of a folder says; None where there is none."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    return shipped_form(read_model_config(folder), str(file))
