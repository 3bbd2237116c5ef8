"""Detection of a checkpoint's 8-bit or 4-bit storage format from its config.json.

fp8, nvfp4 and mxfp4 are supported. `shipped_entries.py` joins the stored tensors of each weight.
This module does not import torch.
"""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

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
from tunesmith.model.weights.safetensors_files import Config, read_model_config

FETCH_CONFIG = "fetch config.json again: tunesmith fetch MODEL"
UNQUANTIZED = "use the unquantized model; model.quantize: nf4 then quantizes it as it is loaded"
# Transformers' default of `weight_block_size`.
DEFAULT_FP8_BLOCK = (128, 128)
AS_SHIPPED: Literal["as-shipped"] = "as-shipped"
KEEPABLE = ("fp8", "mxfp4", "nvfp4")  # storage formats that a frozen base can keep
# Values of compressed-tensors' key `format` for fp8 weights: with and without 8-bit activations.
COMPRESSED_FP8 = ("float-quantized", "naive-quantized")
COMPRESSED_NVFP4 = "nvfp4-pack-quantized"
# Values of ModelOpt's key `quant_algo` for nvfp4 weights: with and without 4-bit activations.
MODELOPT_NVFP4 = ("NVFP4", "W4A16_NVFP4")
MODELOPT_FP8 = "FP8"
# Expected values of a group's `weights` section, in compressed-tensors and in ModelOpt.
FP8_WEIGHTS = {"num_bits": 8, "type": "float"}
NVFP4_WEIGHTS = {"num_bits": 4, "type": "float", "group_size": NVFP4_GROUP}


# ---- config.json


def stated_quantization(config: Config, where: str) -> Config:
    """Return the quantization_config, or an empty mapping if there is none.

    Raise ModelError if the value is not a mapping.

    A vision-language model can have the key at the top level or in its text_config.
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
    """Return the storage format of the weights: "bnb-nf4", one of KEEPABLE, or None if unquantized.

    Raise ModelError for any other format.
    """
    stored = stated_quantization(config, where)
    if not stored:
        return None
    form = shipped_form(config, where)
    if form is not None:
        return form.method
    method = str(stored.get("quant_method", ""))
    # These two methods have many formats, so the error message also names the format.
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
        why="plain weights, bitsandbytes nf4, fp8, mxfp4 and nvfp4 are supported; other formats "
        "are for serving, not for training",
        fix="use the unquantized model and set model.quantize: nf4",
    )


def shipped_form(config: Config, where: str) -> ShippedForm | None:
    """Return the stored form of the weights in fp8, nvfp4 or mxfp4 from a parsed config.json.

    Return None for unquantized weights and for other methods. Raise ModelError if the method is
    known, but its settings are not supported.

    Args:
        where: the name of the config in error messages.
    """
    stored = stated_quantization(config, where)
    reader = FORM_READERS.get(str(stored.get("quant_method")))
    if reader is None:
        return None
    with errors_at(where):
        return reader(stored)


def _transformers_form(stored: Config) -> ShippedForm:
    """Read fp8 and mxfp4 as written by Transformers, and fp8 as written by AutoFP8."""
    _check_value(stored, "modules_to_convert", ())
    # Some checkpoints have another format for their experts.
    _check_value(stored, "expert_dtype", ("fp8",))
    skipped = tuple(_names(stored, ("modules_to_not_convert", "ignored_layers")))
    if stored["quant_method"] == "mxfp4":
        return ShippedForm("mxfp4", not_converted=skipped)
    # AutoFP8 uses the same method name as Transformers, but other keys. It stores one scale per
    # matrix.
    is_autofp8 = "weight_block_size" not in stored and "modules_to_not_convert" not in stored
    if is_autofp8:
        return ShippedForm("fp8", not_converted=skipped, scale_suffix=WEIGHT_SCALE)
    # A missing block size means the default, and null means one scale per matrix.
    block = stored.get("weight_block_size", DEFAULT_FP8_BLOCK)
    if block is None:
        return ShippedForm("fp8", None, skipped)
    return ShippedForm("fp8", _block_size(block, "weight_block_size"), skipped)


def _compressed_tensors_form(stored: Config) -> ShippedForm | None:
    """Read fp8 and nvfp4 as written by compressed-tensors (llm-compressor, `export --quant`)."""
    stated = stored.get("format")
    is_fp8 = stated in COMPRESSED_FP8
    if is_fp8:
        group = _only_group(stored, FP8_WEIGHTS)
        _check_value(group, "format", COMPRESSED_FP8)
    elif stated == COMPRESSED_NVFP4:
        group = _only_group(stored, NVFP4_WEIGHTS)
        _check_value(group, "format", (COMPRESSED_NVFP4,))
    else:
        return None
    # These keys describe rotated or sparse weights, which are not supported.
    _check_value(stored, "transform_config", ())
    sparsity = stored.get("sparsity_config")
    if not isinstance(sparsity, Mapping) or sparsity.get("format") != "dense":
        _check_value(stored, "sparsity_config", ())
    weights = group["weights"]
    _check_value(weights, "symmetric", (True,))
    targets = _names(group, ("targets",))
    # The class name "Linear" means all linear layers. An empty list has the same meaning below.
    if "Linear" in targets:
        targets = []
    converted = _expressions(targets)
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
    """Convert compressed-tensors' quantization strategy to `ShippedForm.block`."""
    _check_value(weights, "dynamic", (False,))
    _check_value(weights, "strategy", ("tensor", "channel", "block"))
    strategy = weights.get("strategy")
    if strategy == "block":
        return _block_size(weights.get("block_structure"), "block_structure")
    if strategy == "channel":
        return ROW
    return None


def _modelopt_form(stored: Config) -> ShippedForm | None:
    """Read fp8 (one scale per matrix) and nvfp4 as written by NVIDIA's ModelOpt.

    ModelOpt's names of excluded modules can contain wildcards.
    """
    algorithm = stored.get("quant_algo")
    is_fp8 = algorithm == MODELOPT_FP8
    if is_fp8:
        expected = FP8_WEIGHTS
        _check_value(stored, "group_size", ())
    elif algorithm in MODELOPT_NVFP4:
        expected = NVFP4_WEIGHTS
        _check_value(stored, "group_size", (NVFP4_GROUP,))
    else:
        return None
    if "config_groups" in stored:
        _only_group(stored, expected)
    _check_value(stored, "pre_quant_scale", (False,))
    names = _names(stored, ("ignore", "exclude_modules"))
    skipped = tuple(fnmatch.translate(name) for name in names)
    if is_fp8:
        return ShippedForm(
            "fp8", not_converted=skipped, has_expressions=True, scale_suffix=WEIGHT_SCALE
        )
    return ShippedForm("nvfp4", not_converted=skipped, has_expressions=True, names=MODELOPT)


FORM_READERS: dict[str, Callable[[Config], ShippedForm | None]] = {
    "fp8": _transformers_form,
    "mxfp4": _transformers_form,
    "compressed-tensors": _compressed_tensors_form,
    "modelopt": _modelopt_form,
}


def _only_group(stored: Config, expected: Config) -> Config:
    """Return the only entry of `config_groups`, after checking its weights against `expected`."""
    groups = stored.get("config_groups")
    group = None
    if isinstance(groups, Mapping) and len(groups) == 1:
        [group] = groups.values()
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise ModelError(
            f"quantization_config.config_groups is {groups!r:.100}",
            why="only one group of weights, in fp8 or nvfp4, is supported",
            fix=UNQUANTIZED,
        )
    for key, value in expected.items():
        _check_value(group["weights"], key, (value,))
    return group


def _check_value(stored: Config, key: str, supported: Sequence[object]) -> None:
    """Raise ModelError unless the value of the key is empty or one of the `supported` values."""
    value = stored.get(key)
    if value in (None, [], {}) or value in supported:
        return
    raise ModelError(
        f"quantization_config: {key} is {value!r:.100}, which is not supported",
        why="only linear layers and experts in fp8 (e4m3) or nvfp4 (groups of 16) are supported",
        fix=UNQUANTIZED,
    )


def _names(stored: Config, keys: Sequence[str]) -> Sequence[str]:
    """Return the list of names from the first of these keys that is not empty."""
    names: object = []
    for key in keys:
        names = stored.get(key)
        if names:
            break
    names = names or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"quantization_config.{key} is {names!r:.100}: it must be a list of names",
            fix=FETCH_CONFIG,
        )
    return names


def _expressions(names: Sequence[str]) -> tuple[str, ...]:
    """Convert compressed-tensors' names to regular expressions.

    The prefix `re:` marks an expression.
    """
    expressions = []
    for name in names:
        expression = name.removeprefix("re:")
        if expression == name:
            expression = f"{re.escape(name)}$"
        try:
            re.compile(expression)
        except re.error as error:
            raise ModelError(
                f"quantization_config has {name!r:.100}, which is not a valid regular expression",
                why=str(error),
                fix=FETCH_CONFIG,
            ) from error
        expressions.append(expression)
    return tuple(expressions)


def check_quantize(quantize: str, config: Config, where: str) -> None:
    """Raise ModelError if `model.quantize` does not fit the quantization in config.json."""
    stored = stored_quantization(config, where)
    if stored == "bnb-nf4" and quantize != "nf4":
        why = f"the recipe has model.quantize: {quantize}" if quantize != "auto" else ""
        raise ModelError(
            "the checkpoint is already in bitsandbytes nf4",
            where=where,
            why=why,
            fix="set model.quantize: nf4, or use the unquantized model",
        )
    if quantize == AS_SHIPPED and stored not in KEEPABLE:
        why = (
            f"its weights are in {stored}, but only {', '.join(KEEPABLE)} can be kept"
            if stored
            else "its weights are not quantized"
        )
        raise ModelError(
            "model.quantize is as-shipped, but this base model is not stored in a "
            "supported quantized format",
            where=where,
            why=why,
            fix="set model.quantize=none, or model.quantize=nf4 to save memory",
        )


def resolve_quantize(model: Model, stored: str | None) -> Model:
    """Return the recipe's `model` section with `quantize: auto` replaced by the resolved value.

    Args:
        stored: the storage format of the weights, from `stored_quantization`.
    """
    if model.quantize != "auto":
        return model
    if stored in KEEPABLE:
        return replace(model, quantize=AS_SHIPPED)
    return replace(model, quantize="none")


def check_frozen(run: Run) -> None:
    """Raise RecipeError if full fine-tuning is combined with a base that is kept quantized."""
    if run.model.quantize == AS_SHIPPED and run.adapter.kind == "none":
        raise RecipeError(
            "adapter.kind is none, but the base is kept quantized (as-shipped)",
            where="model.quantize",
            why="full fine-tuning trains the base weights, but quantized weights are frozen",
            fix="set model.quantize=none, which dequantizes the base and trains its "
            f"{run.model.dtype} weights",
        )


def _block_size(block: Any, key: str) -> tuple[int, int]:
    is_pair = isinstance(block, list | tuple) and len(block) == 2
    if not is_pair or any(type(size) is not int or size < 1 for size in block):
        raise ModelError(
            f"quantization_config: {key} is {block!r:.100}: it must be two whole numbers above 0",
            why="they are the numbers of rows and columns of a weight that share a scale",
            fix=FETCH_CONFIG,
        )
    return block[0], block[1]


def form_of_folder(folder: Path) -> ShippedForm | None:
    """Return the stored form from a folder's config.json, or None if there is no such file."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    return shipped_form(read_model_config(folder), str(file))
