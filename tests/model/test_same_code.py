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

# Two classes, and whether one is a copy of the other.
PAIRS: list[tuple[type, type, bool]] = [
    (Qwen3MoeAttention, Qwen3Attention, True),
    (Qwen3MoeMLP, LlamaMLP, True),
    (Qwen3MoeRMSNorm, LlamaRMSNorm, True),
    # The same text: GLM's `apply_rotary_pos_emb` turns pairs.
    (Glm4Attention, LlamaAttention, False),
    (Qwen3Attention, LlamaAttention, False),
    (Olmo2RMSNorm, LlamaRMSNorm, False),
]


@pytest.mark.parametrize(("one", "other", "same"), PAIRS)
def test_classes_of_transformers(one: type, other: type, same: bool) -> None:
    code = forward_code(one)
    assert code is not None
    assert (code == forward_code(other)) == same
    assert not same or hash(code) == hash(forward_code(other))


def shift(x: Tensor, by: float = 1.0) -> Tensor:
    return torch.add(x, by)


def move(x: Tensor, by: float = 1.0) -> Tensor:
    """As `shift`."""
    return torch.add(x, by)


def move_far(x: Tensor, by: float = 2.0) -> Tensor:
    return torch.add(x, by)


def repeat(x: Tensor) -> Tensor:
    return repeat(x) if x.sum() > 9 else x


ORIGINAL = """
def forward(self, x: Tensor) -> Tensor:
    moved = shift(repeat(x))
    return self._scale(moved) * 2

def _scale(self, x: Tensor) -> Tensor:
    return x * self.factor
"""


def written(*changes: tuple[str, str]) -> Any:
    """The code of a module whose text is that of `ORIGINAL` with these changes."""
    text = ORIGINAL
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    members: dict[str, Any] = {}
    exec(text, globals(), members)
    code = forward_code(type("Module", (nn.Module,), members))
    assert code is not None
    return code


@pytest.mark.parametrize(
    "changes",
    [
        [("shift", "move_far")],
        [("* 2", "* 2.0")],
        [("self, x: Tensor) -> Tensor:\n    moved", "self, y: Tensor) -> Tensor:\n    moved"),
         ("repeat(x)", "repeat(y)")],
        [("x * self", "x + self")],
        [("self.factor", "self.other")],
    ],
    ids=["function", "constant", "argument", "method", "attribute"],
)  # fmt: skip
def test_each_change_counts(changes: list[tuple[str, str]]) -> None:
    assert written() == written()
    assert written(*changes) != written()


def test_names_texts_and_annotations_do_not_count() -> None:
    renamed = [("shift", "move"), ("moved", "result"), ("-> Tensor:", ":\n    'Text.'\n")]
    assert written(*renamed) == written()


def renamed(old: str) -> Callable[[Any], Any]:
    """As `deprecate_kwarg` of Transformers 5.24, around the forward of attentions."""

    def decorate(forward: Any) -> Any:
        @functools.wraps(forward)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **{"y" if k == old else k: v for k, v in kwargs.items()})

        return wrapper

    return decorate


def test_a_decorator_that_names_what_it_wraps_counts_by_what_it_was_given() -> None:
    by_x, by_z = (("def forward", f"@renamed('{name}')\ndef forward") for name in "xz")
    assert written(by_x) == written(by_x)
    assert written(by_x) != written(by_z)
    assert written(by_x) != written(by_x, ("* 2", "* 3"))


def test_a_decorated_forward_is_not_read() -> None:
    """All wrappers of one decorator have one bytecode."""

    def wrapped(forward: Callable) -> Callable:
        return lambda self, x: forward(self, x) + 1

    class Wrapped(nn.Linear):
        forward = wrapped(nn.Linear.forward)

    assert forward_code(Wrapped) is None
    assert forward_code(nn.Linear) != forward_code(nn.Bilinear)
