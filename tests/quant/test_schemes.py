"""What a scheme says of itself is what its layers are."""

from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn

from tunesmith.config.schema import Model
from tunesmith.formats.base import Format
from tunesmith.formats.form import MODELOPT, ShippedForm
from tunesmith.formats.fp8 import Fp8
from tunesmith.formats.linear import FrozenLinear
from tunesmith.formats.nf4 import NF4_BLOCK, Nf4
from tunesmith.formats.registry import shipped_format
from tunesmith.formats.scaled_matmul import TENSOR_WISE
from tunesmith.formats.stack import ExpertStack
from tunesmith.quant.linear_layers import parameter_count
from tunesmith.quant.schemes import DENSE, FP8, NF4, SCHEMES, SHIPPED, SHIPPED_NVFP4, scheme_of

NVFP4 = ShippedForm("nvfp4", names=MODELOPT)


def test_each_word_of_the_recipe_is_a_scheme() -> None:
    words = get_args(get_type_hints(Model)["quantize"])
    assert ("auto", *SCHEMES) == words
    assert scheme_of(Model(name="a")) is DENSE
    assert scheme_of(Model(name="a", quantize="nf4")) is NF4


def layer_bytes(kind: Format, rows: int, columns: int) -> dict[str, int]:
    layer = FrozenLinear(kind, columns, rows, None, torch.bfloat16)
    return {
        name: tensor.nbytes for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
    }


def test_the_estimate_counts_the_bytes_that_a_layer_has() -> None:
    """fp8's scales are not counted: one of the whole matrix here."""
    shape = (1024, 512)
    count = 1024 * 512
    packed = layer_bytes(Nf4(torch.bfloat16), *shape)
    assert packed["weight"] == NF4.weight_bytes * count
    assert packed["absmax"] + packed["nested_absmax"] == NF4.scale_bytes * count
    assert NF4.block == NF4_BLOCK
    assert layer_bytes(Fp8(TENSOR_WISE), *shape)["weight"] == FP8.weight_bytes * count
    kept = layer_bytes(shipped_format(ShippedForm("fp8", (128, 128))), *shape)
    assert kept["weight"] == SHIPPED.weight_bytes * count
    assert kept["scale"] == SHIPPED.scale_bytes * count
    half = layer_bytes(shipped_format(NVFP4), *shape)
    assert half["weight"] + half["weight_scales"] == SHIPPED_NVFP4.weight_bytes * count
    layer = FrozenLinear(shipped_format(NVFP4), 512, 1024, None, torch.bfloat16)
    assert parameter_count(nn.Sequential(layer)) == count


def stack_bytes(kind: Format, **options: Any) -> dict[str, int]:
    shape = torch.Size((4, 1024, 512))
    stack = ExpertStack(kind, shape, compute_dtype=torch.bfloat16, **options)
    return {
        name: tensor.nbytes for name, tensor in (*stack.named_parameters(), *stack.named_buffers())
    }


def test_the_estimate_counts_the_bytes_that_a_stack_has() -> None:
    count = 4 * 1024 * 512
    packed = stack_bytes(Nf4(torch.bfloat16), is_transposed=False)
    assert packed["weight"] == NF4.expert_bytes * count
    assert packed["absmax"] + packed["nested_absmax"] == NF4.expert_scale_bytes * count
    form = ShippedForm("fp8", (128, 128))
    kept = stack_bytes(shipped_format(form), parts=2, is_transposed=False)
    assert kept["weight"] == SHIPPED.expert_bytes * count
    assert kept["scale"] == SHIPPED.expert_scale_bytes * count
    for form, is_transposed in ((ShippedForm("mxfp4"), True), (NVFP4, False)):
        scheme = scheme_of(Model(name="a", quantize="as-shipped"), form.method)
        fours = stack_bytes(shipped_format(form), is_transposed=is_transposed)
        assert fours["weight"] + fours["weight_scales"] == scheme.expert_bytes * count


@pytest.mark.parametrize("scheme", [DENSE, FP8])
def test_only_nf4_puts_its_layers_in_before_the_adapter(scheme) -> None:
    model = nn.Sequential(nn.Linear(64, 64, device="meta"))
    scheme.replace_linears(model, torch.bfloat16)
    assert type(model[0]) is nn.Linear
    NF4.replace_linears(model, torch.bfloat16)
    assert isinstance(model[0].format, Nf4)
