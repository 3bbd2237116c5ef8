"""The functions of the faster parts, with their gradients, beside Transformers' formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.glm4 import modeling_glm4 as glm4
from transformers.models.helium.modeling_helium import HeliumRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from tunesmith.model.layers.fused_functions import geglu, rms_norm, rotate, swiglu


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


torch.manual_seed(0)
ANGLES = torch.randn(5, 4, dtype=torch.float64).repeat(1, 2)
COS, SIN = ANGLES.cos(), ANGLES.sin()
PAIRS = [t[:, :2].repeat_interleave(2, -1) for t in (COS[:, :4], SIN[:, :4])]


def turned(width: int, code: object = qwen3_next) -> Callable[[Tensor], Tensor]:
    """Transformers' rotation of the first `width` channels."""
    cos, sin = (torch.cat([t[:, : width // 2]] * 2, -1) for t in (COS, SIN))
    return lambda x: code.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=1)[0]


HEADS = (5, 3, 8)
# Our function, the formula, and the shapes of what they take.
FORMULAS = {
    "swiglu": (swiglu, lambda g, u: F.silu(g) * u, [(5, 7), (5, 7)]),
    "geglu": (geglu, lambda g, u: F.gelu(g, approximate="tanh") * u, [(5, 7), (5, 7)]),
    "norm around one": (
        lambda x, w: rms_norm(x, w, 1e-5, wide=True, offset=1.0),
        lambda x, w: normed(x) * (1 + w),
        [(2, 5, 7), (7,)],
    ),
    "rotation of half a head": (
        lambda x: rotate(x, *(torch.cat([t[:, :2]] * 2, -1) for t in (COS, SIN))),
        turned(4),
        [HEADS],
    ),
    "rotation of pairs": (lambda x: rotate(x, *PAIRS, pairs=True), turned(4, glm4), [HEADS]),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradients_are_those_of_the_formula(name: str) -> None:
    ours, theirs, shapes = FORMULAS[name]
    torch.manual_seed(0)
    leaves = [leaf(*shape) for shape in shapes]
    a, b = ours(*leaves), theirs(*leaves)
    weight = torch.randn_like(b)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    got = torch.autograd.grad((a * weight).sum(), leaves)
    wanted = torch.autograd.grad((b * weight).sum(), leaves)
    for x, y in zip(got, wanted, strict=True):
        assert y.abs().max() > 1e-3, "a zero reference proves nothing"
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("norm", "form"),
    [
        (LlamaRMSNorm(64, eps=1e-5), {}),
        (HeliumRMSNorm(64, eps=1e-5), {"wide": True}),
        (GemmaRMSNorm(64, eps=1e-5), {"wide": True, "offset": 1.0}),
    ],
    ids=["llama", "helium", "gemma"],
)
def test_rms_norm_rounds_as_transformers_does(norm, form):
    torch.manual_seed(0)
    norm = norm.bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(40, 64).bfloat16()
    assert torch.equal(rms_norm(x, norm.weight, 1e-5, **form), norm(x))
