"""Weights that a checkpoint ships in 8 or 4 bits: what config.json says of them.

fp8, nvfp4 and mxfp4 are read; `shipped_entries.py` has which stored tensors make one weight. No
torch is imported here.
"""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.config.schema import Model, Run
from tunesmith.errors import ModelError, RecipeError, errors_at
from tunesmith.formats.form import (
    COMPRESSED_TENSORS,
    MODELOPT,
    NVFP4_GROUP,
    ROW,
    WEIGHT_SCALE,
    ShippedForm,
)
from tunesmith.model.safetensors_files import Config, read_model_config

if TYPE_CHECKING:
    from tunesmith.model.spec import ModelSpec

FETCH_CONFIG = "take config.json from the model's page again: tunesmith fetch MODEL"
UNQUANTIZED = "take the unquantized model; model.quantize: nf4 then quantizes it as it is loaded"
# Transformers' own default of `weight_block_size`.
DEFAULT_FP8_BLOCK = (128, 128)
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


# ---- config.json


def stated_quantization(config: Config, where: str) -> Config:
    """Read how the weights are quantized; empty where they are not. ModelError for no mapping.

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


def stored_quantization(config: Config, where: str) -> str | None:
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


def shipped_form(config: Config, where: str) -> ShippedForm | None:
    """The form that a parsed config.json, called `where`, says its weights have; None: another.

    ModelError where it says so in a way that is not read.
    """
    stored = stated_quantization(config, where)
    reader = FORM_READERS.get(str(stored.get("quant_method")))
    if reader is None:
        return None
    with errors_at(where):
        return reader(stored)


def _transformers_form(stored: Config) -> ShippedForm:
    """FP8 and MXFP4, as Transformers writes them; FP8 also as AutoFP8 does."""
    for key, plain in (("modules_to_convert", None), ("expert_dtype", "fp8")):
        _check_value(stored, key, (plain,))
    skipped = tuple(_names(stored, ("modules_to_not_convert", "ignored_layers")))
    if stored["quant_method"] == "mxfp4":
        return ShippedForm("mxfp4", not_converted=skipped)
    # AutoFP8 calls its method the same, and has other names: one scale a matrix.
    if not {"weight_block_size", "modules_to_not_convert"} & stored.keys():
        return ShippedForm(
            "fp8",
            not_converted=skipped,
            scale_suffix=WEIGHT_SCALE,
        )
    block = stored.get("weight_block_size", DEFAULT_FP8_BLOCK)
    return ShippedForm(
        "fp8",
        None if block is None else _block_size(block, "weight_block_size"),
        skipped,
    )


def _compressed_tensors_form(stored: Config) -> ShippedForm | None:
    """FP8 and NVFP4 as compressed-tensors writes them: llm-compressor, and `export --quant`."""
    stated = stored.get("format")
    if stated not in (*COMPRESSED_FP8, COMPRESSED_NVFP4):
        return None
    is_fp8 = stated in COMPRESSED_FP8
    # Weights that were rotated, or have holes.
    _check_value(stored, "transform_config", ())
    sparsity = stored.get("sparsity_config")
    if not isinstance(sparsity, Mapping) or sparsity.get("format") != "dense":
        _check_value(stored, "sparsity_config", ())
    group = _only_group(stored, FP8_WEIGHTS if is_fp8 else NVFP4_WEIGHTS)
    _check_value(group, "format", COMPRESSED_FP8 if is_fp8 else (COMPRESSED_NVFP4,))
    weights = group["weights"]
    _check_value(weights, "symmetric", (True,))
    targets = _names(group, ("targets",))
    # All linear layers, by their class.
    converted = _expressions([] if "Linear" in targets else targets)
    skipped = _expressions(_names(stored, ("ignore",)))
    if is_fp8:
        return ShippedForm(
            "fp8",
            _strategy_block(weights),
            skipped,
            converted,
            has_expressions=True,
            scale_suffix=WEIGHT_SCALE,
        )
    return ShippedForm(
        "nvfp4",
        not_converted=skipped,
        converted=converted,
        has_expressions=True,
        names=COMPRESSED_TENSORS,
    )


def _strategy_block(weights: Config) -> tuple[int, int] | None:
    """`ShippedForm.block` by the strategy of compressed-tensors."""
    _check_value(weights, "dynamic", (False,))
    _check_value(weights, "strategy", ("tensor", "channel", "block"))
    strategy = weights.get("strategy")
    if strategy == "block":
        return _block_size(weights.get("block_structure"), "block_structure")
    return ROW if strategy == "channel" else None


def _modelopt_form(stored: Config) -> ShippedForm | None:
    """FP8 with a scale a matrix, and NVFP4, as NVIDIA's ModelOpt writes them. Its names of modules
    have wildcards.
    """
    algorithm = stored.get("quant_algo")
    if algorithm not in (MODELOPT_FP8, *MODELOPT_NVFP4):
        return None
    is_fp8 = algorithm == MODELOPT_FP8
    if "config_groups" in stored:
        _only_group(stored, FP8_WEIGHTS if is_fp8 else NVFP4_WEIGHTS)
    _check_value(stored, "group_size", () if is_fp8 else (NVFP4_GROUP,))
    _check_value(stored, "pre_quant_scale", (False,))
    names = _names(stored, ("ignore", "exclude_modules"))
    return ShippedForm(
        "fp8" if is_fp8 else "nvfp4",
        not_converted=tuple(fnmatch.translate(name) for name in names),
        has_expressions=True,
        scale_suffix=WEIGHT_SCALE,
        names=None if is_fp8 else MODELOPT,
    )


FORM_READERS: dict[str, Callable[[Config], ShippedForm | None]] = {
    "fp8": _transformers_form,
    "mxfp4": _transformers_form,
    "compressed-tensors": _compressed_tensors_form,
    "modelopt": _modelopt_form,
}


def _only_group(stored: Config, expected: Config) -> Mapping[str, Any]:
    """The only one of `config_groups`, whose weights are as `expected`."""
    groups = stored.get("config_groups")
    group = None
    if isinstance(groups, Mapping) and len(groups) == 1:
        [group] = groups.values()
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise ModelError(
            f"quantization_config.config_groups is {groups!r:.100}",
            why="one group of weights in fp8 or nvfp4 is read",
            fix=UNQUANTIZED,
        )
    for key, value in expected.items():
        _check_value(group["weights"], key, (value,))
    return group


def _check_value(stored: Config, key: str, read: Sequence[object]) -> None:
    """ModelError for a key that is there with another value than those that are read, and not
    empty.
    """
    value = stored.get(key)
    if value in (None, [], {}) or value in read:
        return
    raise ModelError(
        f"quantization_config: {key} is {value!r:.100}, which is not supported",
        why="linear layers and experts in e4m3, or in e2m1 by groups of 16, are",
        fix=UNQUANTIZED,
    )


def _names(stored: Config, keys: Sequence[str]) -> Sequence[str]:
    """The list of names under the first of these keys that has one."""
    key = next((key for key in keys if stored.get(key)), keys[0])
    names = stored.get(key) or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"quantization_config.{key} is {names!r:.100}: it must be a list of names",
            fix=FETCH_CONFIG,
        )
    return names


def _expressions(names: Sequence[str]) -> tuple[str, ...]:
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
                why=str(error),
                fix=FETCH_CONFIG,
            ) from error
        expressions.append(expression)
    return tuple(expressions)


def check_quantize(quantize: str, config: Config, where: str) -> None:
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


def _block_size(block: Any, key: str) -> tuple[int, int]:
    is_pair = isinstance(block, list | tuple) and len(block) == 2
    if not is_pair or any(type(size) is not int or size < 1 for size in block):
        raise ModelError(
            f"quantization_config: {key} is {block!r:.100}: it must be two whole numbers above 0",
            why="rows and columns of a weight that share a scale",
            fix=FETCH_CONFIG,
        )
    return block[0], block[1]


def form_of_folder(folder: Path) -> ShippedForm | None:
    """Read what the config.json of a folder says; None where there is none."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    return shipped_form(read_model_config(folder), str(file))
