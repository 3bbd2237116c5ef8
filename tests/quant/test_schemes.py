"""What a scheme says of itself is what its layers are."""

from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn

from tunesmith.config.schema import Model
from tunesmith.model.shipped import MODELOPT, ShippedForm
from tunesmith.quant.as_shipped import Fp8Linear, Nvfp4Linear
from tunesmith.quant.eight_bit import EightBitLinear
from tunesmith.quant.frozen_linear import parameter_count
from tunesmith.quant.nf4 import BLOCK, Nf4Linear
from tunesmith.quant.nf4_experts import Nf4Experts
from tunesmith.quant.scaled_matmul import TENSOR_WISE
from tunesmith.quant.schemes import DENSE, FP8, NF4, SCHEMES, SHIPPED, SHIPPED_NVFP4, scheme_of
from tunesmith.quant.shipped_experts import Fp8Experts, Mxfp4Experts, Nvfp4Experts

NVFP4 = ShippedForm("nvfp4", names=MODELOPT)


def test_each_word_of_the_recipe_is_a_scheme() -> None:
    words = get_args(get_type_hints(Model)["quantize"])
    assert ("auto", *SCHEMES) == words
    assert scheme_of(Model(name="a")) is DENSE
    assert scheme_of(Model(name="a", quantize="nf4")) is NF4


def test_the_estimate_counts_the_bytes_that_a_layer_has() -> None:
    """fp8's scales are not counted: one of the whole matrix here."""
    n_in, n_out = 512, 1024
    packed = Nf4Linear(n_in, n_out, False, torch.bfloat16)
    scales = packed.absmax.nbytes + packed.nested_absmax.nbytes
    assert packed.weight.nbytes == NF4.weight_bytes * n_in * n_out
    assert scales == NF4.scale_bytes * n_in * n_out
    assert NF4.block == BLOCK
    dense = nn.Linear(n_in, n_out, bias=False, device="meta")
    assert EightBitLinear(dense, TENSOR_WISE).weight.nbytes == FP8.weight_bytes * n_in * n_out
    form = ShippedForm("fp8", (128, 128))
    kept = Fp8Linear(n_in, n_out, None, form, torch.bfloat16)
    assert kept.weight.nbytes == SHIPPED.weight_bytes * n_in * n_out
    assert kept.scale.nbytes == SHIPPED.scale_bytes * n_in * n_out
    half = Nvfp4Linear(n_in, n_out, None, NVFP4, torch.bfloat16)
    stored = half.weight.nbytes + half.weight_scales.nbytes
    assert stored == SHIPPED_NVFP4.weight_bytes * n_in * n_out
    assert parameter_count(nn.Sequential(half)) == n_in * n_out


def test_the_estimate_counts_the_bytes_that_a_stack_has() -> None:
    shape = torch.Size((4, 1024, 512))
    count = shape.numel()
    options: dict[str, Any] = {"compute_dtype": torch.bfloat16}
    packed = Nf4Experts(shape, is_transposed=False, **options)
    scales = packed.absmax.nbytes + packed.nested_absmax.nbytes
    assert packed.codes.nbytes == NF4.expert_bytes * count
    assert scales == NF4.expert_scale_bytes * count
    form = ShippedForm("fp8", (128, 128))
    kept = Fp8Experts(shape, form=form, parts=2, **options)
    assert kept.codes.nbytes == SHIPPED.expert_bytes * count
    assert kept.scales.nbytes == SHIPPED.expert_scale_bytes * count
    of_gpt_oss = scheme_of(Model(name="a", quantize="as-shipped"), "mxfp4")
    halves = Mxfp4Experts(shape, is_transposed=True, **options)
    assert halves.blocks.nbytes + halves.exponents.nbytes == of_gpt_oss.expert_bytes * count
    of_nvfp4 = scheme_of(Model(name="a", quantize="as-shipped"), "nvfp4")
    fours = Nvfp4Experts(shape, form=NVFP4, parts=2, **options)
    assert fours.codes.nbytes + fours.group_scales.nbytes == of_nvfp4.expert_bytes * count


@pytest.mark.parametrize("scheme", [DENSE, FP8])
def test_only_nf4_puts_its_layers_in_before_the_adapter(scheme) -> None:
    model = nn.Sequential(nn.Linear(64, 64, device="meta"))
    scheme.replace_linears(model, torch.bfloat16)
    assert type(model[0]) is nn.Linear
    NF4.replace_linears(model, torch.bfloat16)
    assert type(model[0]) is Nf4Linear
