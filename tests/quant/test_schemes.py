"""What a scheme says of itself is what its layers are."""

from typing import Any

import torch
from torch import nn

from tunesmith.config.schema import Model
from tunesmith.formats.base import Format
from tunesmith.formats.form import MODELOPT, ShippedForm
from tunesmith.formats.fp8 import Fp8
from tunesmith.formats.linear import FrozenLinear
from tunesmith.formats.nf4 import Nf4
from tunesmith.formats.registry import shipped_format
from tunesmith.formats.scaled_matmul import TENSOR_WISE
from tunesmith.formats.stack import ExpertStack
from tunesmith.quant.schemes import FP8, NF4, SHIPPED, SHIPPED_NVFP4, scheme_of

NVFP4 = ShippedForm("nvfp4", names=MODELOPT)


def bytes_of(layer: nn.Module) -> dict[str, int]:
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def layer_bytes(kind: Format, rows: int, columns: int) -> dict[str, int]:
    return bytes_of(FrozenLinear(kind, columns, rows, None, torch.bfloat16))


def test_the_estimate_counts_the_bytes_that_a_layer_has() -> None:
    """fp8's scales are not counted: one of the whole matrix here."""
    shape = (1024, 512)
    count = 1024 * 512
    packed = layer_bytes(Nf4(torch.bfloat16), *shape)
    assert packed["weight"] == NF4.weight_bytes * count
    assert packed["absmax"] + packed["nested_absmax"] == NF4.scale_bytes * count
    assert layer_bytes(Fp8(TENSOR_WISE), *shape)["weight"] == FP8.weight_bytes * count
    kept = layer_bytes(shipped_format(ShippedForm("fp8", (128, 128))), *shape)
    assert kept["weight"] == SHIPPED.weight_bytes * count
    assert kept["scale"] == SHIPPED.scale_bytes * count
    half = layer_bytes(shipped_format(NVFP4), *shape)
    assert half["weight"] + half["weight_scales"] == SHIPPED_NVFP4.weight_bytes * count


def stack_bytes(kind: Format, **options: Any) -> dict[str, int]:
    shape = torch.Size((4, 1024, 512))
    return bytes_of(ExpertStack(kind, shape, compute_dtype=torch.bfloat16, **options))


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
