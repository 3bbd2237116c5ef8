"""Replace layers and stacks of experts of a model by frozen ones in codes."""

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
from tunesmith.model.experts import find_experts
from tunesmith.model.names import names_on_disk
from tunesmith.model.shipped import AS_SHIPPED
from tunesmith.quant.experts import use_grouped_experts
from tunesmith.quant.linear_layers import linear_names

ALIGNED = 16  # the GPU's 8-bit matmuls take widths that are a multiple of 16


def replace_by_codes(
    model: nn.Module, kind: Format, compute_dtype: torch.dtype, form: ShippedForm | None = None
) -> None:
    """Replace linear layers and stacks of experts of a model on meta by empty ones of a format.

    The output layer stays dense, and so do experts that Transformers does not call by its
    interface.

    Args:
        form: of the checkpoint, of a format that keeps its codes: what it has plain stays dense,
            and so do stacks stored as the form is not: MXFP4, in which there are experts alone, as
            [experts, out, in], FP8 and NVFP4 as [experts, in, out].
    """
    if not kind.is_output_major:
        for name in linear_names(model, head=False):
            if form is None or ships_codes(form, model, name):
                _replace_linear(model, name, kind, compute_dtype)
    is_changed = False
    for name, experts in find_experts(model).items():
        transposed = bool(experts.is_transposed)
        if form is not None:
            is_other_way = transposed != kind.is_output_major
            if is_other_way or not _experts_have_codes(form, model, name):
                continue
        is_changed = True
        for key in experts.stacks_in_order():
            is_joined = experts.has_gate and key == experts.stack_names[0] and not transposed
            stack = ExpertStack(
                kind,
                experts.get_parameter(key).shape,
                is_transposed=transposed,
                compute_dtype=compute_dtype,
                parts=2 if is_joined else 1,
            )
            experts.store(key, stack)
    if is_changed:
        use_grouped_experts(model)  # with an adapter on them or without: Transformers wants tensors


def _replace_linear(model: nn.Module, name: str, kind: Format, dtype: torch.dtype) -> None:
    dense = model.get_submodule(name)
    assert isinstance(dense, nn.Linear)
    layer = FrozenLinear(kind, dense.in_features, dense.out_features, dense.bias, dtype)
    model.set_submodule(name, layer)


# ---- what a checkpoint has in codes


def ships_codes(form: ShippedForm, model: nn.Module, name: str) -> bool:
    """Tell whether the checkpoint has the weight of a module in codes, as its config.json says."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = names_on_disk(model, name)
    if form.has_expressions:
        return all(form.has_codes(word) for word in names)
    patterns = list(form.not_converted)
    return all(should_convert_module(word, patterns) for word in names)


def _experts_have_codes(form: ShippedForm, model: nn.Module, name: str) -> bool:
    """Tell whether the checkpoint has the weights of all experts of a layer in codes."""
    first = f"{name}.0"
    if not ships_codes(form, model, name) or not ships_codes(form, model, first):
        return False
    # A list may have the layers of each expert.
    prefixes = tuple(re.escape(f"{word}.") for word in names_on_disk(model, first))
    return not any(pattern.startswith(prefixes) for pattern in form.not_converted)


# ---- fp8


def convert_to_eight_bit(model: nn.Module, recipe: str, skip: Collection[nn.Module] = ()) -> int:
    """Convert the layers of `eight_bit_names` to 8 bits, one at a time; return how many.

    Those on meta become empty ones.

    Args:
        recipe: one of `scaled_matmul.SCALING_RECIPES`.
        skip: as of `eight_bit_names`.
    """
    kind = Fp8(recipe)
    # By name: a list of the layers would keep every dense weight alive.
    names = eight_bit_names(model, skip)
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            _replace_linear(model, name, DENSE_FORMAT, torch.bfloat16)
            frozen = model.get_submodule(name)
            assert isinstance(frozen, FrozenLinear)
            frozen.take_over(layer)
            layer = frozen
        assert isinstance(layer, FrozenLinear)
        dense = layer.weight
        layer.format = kind
        layer.compute_dtype = torch.bfloat16
        layer.allocate(dense.device)
        if not dense.is_meta:
            kind.quantize(layer, dense)
    return len(names)


def eight_bit_names(model: nn.Module, skip: Collection[nn.Module] = ()) -> list[str]:
    """Full names of the linear layers that can be converted to 8 bits; without the output layer.

    These are dense and frozen, and of widths that the matmuls take.

    Args:
        skip: layers that will be trained in full, which a model on meta does not tell.
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
    """(out_features, in_features) of the layers of `eight_bit_names`, each once; on meta or not."""
    shapes = set()
    for name in eight_bit_names(model):
        out_features, in_features = model.get_parameter(f"{name}.weight").shape
        shapes.add((out_features, in_features))
    return sorted(shapes)


def check_plain(model: nn.Module, names: Sequence[str], form: ShippedForm | None) -> None:
    """ModelError where layers of a model that fp8 is to round ship in codes.

    Args:
        names: of these layers.
        form: of the checkpoint; None: it is plain. Of MXFP4 experts alone are in codes.
    """
    if form is None or form.method == "mxfp4":
        return
    for name in names:
        if ships_codes(form, model, name):
            raise ModelError(
                f"model.quantize is fp8, but this base ships in {form.describe()}",
                where=f"{name}.weight",
                why="fp8 rounds plain weights",
                fix=f"model.quantize={AS_SHIPPED}, or model.quantize=none",
            )
