"""Functions that replace a model's linear layers and experts by frozen quantized modules."""

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from tunesmith.errors import ModelError
from tunesmith.formats.base import Format
from tunesmith.formats.dense import DENSE_FORMAT
from tunesmith.formats.form import ShippedForm
from tunesmith.formats.fp8 import Fp8
from tunesmith.formats.linear import FrozenLinear
from tunesmith.formats.stack import ExpertStack
from tunesmith.model.layers.experts import find_experts
from tunesmith.model.weights.names import names_on_disk
from tunesmith.model.weights.shipped import AS_SHIPPED
from tunesmith.quant.experts import use_grouped_experts
from tunesmith.quant.linear_layers import linear_names

ALIGNED = 16  # 8-bit matmuls on GPUs require widths that are multiples of 16


def replace_by_codes(
    model: nn.Module, kind: Format, compute_dtype: torch.dtype, form: ShippedForm | None = None
) -> None:
    """Replace linear layers and stacks of experts of a model on the meta device by modules of a
    format. The tensors of the new modules are not loaded yet.

    The output layer is not replaced. Experts are only replaced if Transformers calls them through
    its experts interface.

    Args:
        form: the stored form of the checkpoint if the format keeps the checkpoint's codes. Then
            only weights that are quantized in the checkpoint are replaced. With mxfp4, these are
            only experts, which must be [experts, in, out] in the model. With fp8 and nvfp4, experts
            must be [experts, out, in] in the model. Stacks with another layout are not replaced.
    """
    if not kind.is_output_major:
        for name in linear_names(model, head=False):
            if form is None or ships_codes(form, model, name):
                _replace_linear(model, name, kind, compute_dtype)
    is_changed = False
    for name, experts in find_experts(model).items():
        transposed = bool(experts.is_transposed)
        if form is not None:
            has_other_orientation = transposed != kind.is_output_major
            if has_other_orientation or not _experts_have_codes(form, model, name):
                continue
        is_changed = True
        for key in experts.stacks_in_order():
            parts = 1
            # If the stacks are [experts, out, in], the rows of an expert's first matrix have two
            # parts: gate and up.
            if experts.has_gate and key == experts.stack_names[0] and not transposed:
                parts = 2
            stack = ExpertStack(
                kind,
                experts.get_parameter(key).shape,
                is_transposed=transposed,
                compute_dtype=compute_dtype,
                parts=parts,
            )
            experts.store(key, stack)
    if is_changed:
        use_grouped_experts(model)  # Transformers' own implementation requires unquantized weights


def _replace_linear(model: nn.Module, name: str, kind: Format, dtype: torch.dtype) -> FrozenLinear:
    """Replace a linear layer by a layer of the format whose weight is not loaded yet. Return the
    new layer.
    """
    dense: Any = model.get_submodule(name)
    layer = FrozenLinear(kind, dense.in_features, dense.out_features, dense.bias, dtype)
    model.set_submodule(name, layer)
    return layer


# ---- selection of the weights that are quantized in a checkpoint


def ships_codes(form: ShippedForm, model: nn.Module, name: str) -> bool:
    """Return whether the module's weight is quantized in the checkpoint, based on config.json."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = names_on_disk(model, name)
    if form.has_expressions:
        return all(form.has_codes(word) for word in names)
    patterns = list(form.not_converted)
    return all(should_convert_module(word, patterns) for word in names)


def _experts_have_codes(form: ShippedForm, model: nn.Module, name: str) -> bool:
    """Return whether the weights of all experts of a layer are quantized in the checkpoint."""
    first = f"{name}.0"
    if not ships_codes(form, model, name) or not ships_codes(form, model, first):
        return False
    # If config.json excludes layers of the first expert, not all experts are quantized.
    prefixes = tuple(re.escape(f"{word}.") for word in names_on_disk(model, first))
    return not any(pattern.startswith(prefixes) for pattern in form.not_converted)


# ---- fp8


def convert_to_eight_bit(model: nn.Module, recipe: str, skip: Collection[nn.Module] = ()) -> int:
    """Convert the layers of `eight_bit_names` to 8 bits, one at a time.

    Layers on the meta device are replaced by layers without values.

    Args:
        recipe: one of `scaled_matmul.SCALING_RECIPES`.
        skip: as in `eight_bit_names`.

    Returns:
        The number of converted layers.
    """
    kind = Fp8(recipe)
    # Iterate over names, because a list of layers would keep all unquantized weights in memory.
    names = eight_bit_names(model, skip)
    for name in names:
        layer: Any = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            frozen = _replace_linear(model, name, DENSE_FORMAT, torch.bfloat16)
            frozen.take_over(layer)
            layer = frozen
        dense = layer.weight
        layer.format = kind
        layer.compute_dtype = torch.bfloat16
        layer.allocate(dense.device)
        if not dense.is_meta:
            kind.quantize(layer, dense)
    return len(names)


def eight_bit_names(model: nn.Module, skip: Collection[nn.Module] = ()) -> list[str]:
    """Return the full names of the linear layers that can be converted to 8 bits.

    These are frozen and unquantized layers whose widths are supported by 8-bit matmuls. The output
    layer is not included.

    Args:
        skip: layers that will be fully trained. Their weights can still be frozen when this
            function is called.
    """
    names = []
    for name in linear_names(model, head=False):
        layer: Any = model.get_submodule(name)
        is_coded = isinstance(layer, FrozenLinear) and layer.format is not DENSE_FORMAT
        if is_coded or layer.weight.requires_grad or layer in skip:
            continue
        if layer.in_features % ALIGNED == 0 and layer.out_features % ALIGNED == 0:
            names.append(name)
    return names


def eight_bit_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """Return the sorted distinct (out_features, in_features) of the `eight_bit_names` layers."""
    shapes = set()
    for name in eight_bit_names(model):
        out_features, in_features = model.get_parameter(f"{name}.weight").shape
        shapes.add((out_features, in_features))
    return sorted(shapes)


def check_plain(model: nn.Module, names: Sequence[str], form: ShippedForm | None) -> None:
    """Raise ModelError if layers that fp8 would quantize are already quantized in the checkpoint.

    Args:
        names: names of these layers.
        form: the stored form of the checkpoint, or None if the checkpoint is not quantized. In
            mxfp4 checkpoints only experts are quantized, so linear layers need no check.
    """
    if form is None or form.method == "mxfp4":
        return
    for name in names:
        if ships_codes(form, model, name):
            raise ModelError(
                f"model.quantize is fp8, but the base model is already stored in {form.describe()}",
                where=f"{name}.weight",
                why="fp8 can only quantize weights that are not quantized yet",
                fix=f"set model.quantize={AS_SHIPPED}, or model.quantize=none",
            )
