"""Which classes count as copies of each other: modules of Transformers, and small ones that differ
in one thing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.glm4.modeling_glm4 import Glm4Attention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeMLP,
    Qwen3MoeRMSNorm,
)

from tunesmith.model.same_code import forward_code


@pytest.mark.parametrize(
    ("copy", "original"),
    [
        (Qwen3MoeAttention, Qwen3Attention),
        (Qwen3MoeMLP, LlamaMLP),
        (Qwen3MoeRMSNorm, LlamaRMSNorm),
    ],
)
def test_copies_of_transformers(copy: type, original: type) -> None:
    code = forward_code(copy)
    assert code is not None
    assert code == forward_code(original)
    assert hash(code) == hash(forward_code(original))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # The same text: GLM's `apply_rotary_pos_emb` turns pairs.
        (Glm4Attention, LlamaAttention),
        (Qwen3Attention, LlamaAttention),
        (Olmo2RMSNorm, LlamaRMSNorm),
    ],
)
def test_neighbors_that_differ(one: type, other: type) -> None:
    assert forward_code(one) != forward_code(other)


def shift(x: Tensor, by: float = 1.0) -> Tensor:
    return torch.add(x, by)


def move(x: Tensor, by: float = 1.0) -> Tensor:
    """As `shift`."""
    return torch.add(x, by)


def move_far(x: Tensor, by: float = 2.0) -> Tensor:
    return torch.add(x, by)


def repeat(x: Tensor) -> Tensor:
    return repeat(x) if x.sum() > 9 else x


class Original(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        moved = shift(repeat(x))
        return self._scale(moved) * 2

    def _scale(self, x: Tensor) -> Tensor:
        return x * self.factor


class Renamed(nn.Module):
    """Other names of function and local variable, a docstring and an annotation."""

    def forward(self, x):
        """Text."""
        result = move(repeat(x))
        return self._scale(result) * 2

    def _scale(self, x: Tensor) -> Tensor:
        return x * self.factor


class OtherFunction(Original):
    def forward(self, x: Tensor) -> Tensor:
        moved = move_far(repeat(x))
        return self._scale(moved) * 2


class OtherConstant(Original):
    def forward(self, x: Tensor) -> Tensor:
        moved = shift(repeat(x))
        return self._scale(moved) * 2.0


class OtherArgument(Original):
    def forward(self, y: Tensor) -> Tensor:
        moved = shift(repeat(y))
        return self._scale(moved) * 2


class OtherMethod(Original):
    def _scale(self, x: Tensor) -> Tensor:
        return x + self.factor


class OtherAttribute(Original):
    def _scale(self, x: Tensor) -> Tensor:
        return x * self.other


def test_names_do_not_count() -> None:
    assert forward_code(Renamed) == forward_code(Original)


@pytest.mark.parametrize(
    "changed",
    [OtherFunction, OtherConstant, OtherArgument, OtherMethod, OtherAttribute],
)
def test_each_change_counts(changed: type) -> None:
    assert forward_code(changed) is not None
    assert forward_code(changed) != forward_code(Original)


def test_a_decorator_that_names_what_it_wraps_counts_by_what_it_was_given() -> None:
    """As `deprecate_kwarg` of Transformers 5.24, around the forward of attentions."""

    def renamed(old: str) -> Callable[[Any], Any]:
        def decorate(forward: Any) -> Any:
            @functools.wraps(forward)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                return forward(*args, **{"y" if k == old else k: v for k, v in kwargs.items()})

            return wrapper

        return decorate

    def of(old: str, sign: int) -> Any:
        class Module(nn.Module):
            if sign > 0:

                @renamed(old)
                def forward(self, y: Any) -> Any:
                    return y + 1

            else:

                @renamed(old)
                def forward(self, y: Any) -> Any:
                    return y - 1

        return forward_code(Module)

    assert of("x", 1) is not None
    assert of("x", 1) == of("x", 1)
    assert of("x", 1) != of("x", -1)
    assert of("x", 1) != of("z", 1)


def test_a_decorated_forward_is_not_read() -> None:
    """All wrappers of one decorator have one bytecode."""

    def wrapped(forward: Callable) -> Callable:
        return lambda self, x: forward(self, x) + 1

    class Wrapped(Original):
        forward = wrapped(Original.forward)

    assert forward_code(Wrapped) is None
    assert forward_code(nn.Linear) != forward_code(nn.Bilinear)
