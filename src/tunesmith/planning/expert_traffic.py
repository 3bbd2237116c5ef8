"""Bytes that the kernels around the products of experts move, seen on meta.

A mixture has k copies of each token, and each product is small: on a chip with slow memory the
gathers, activations, biases and weighted sums of the copies take longer than the products. Large
products are not among these bytes, as they are bound by arithmetic; those of an adapter's low rank
are: they read and write as much, and compute little.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.distributed.torch_private import DispatchMode
from tunesmith.quant.experts import (
    UPDATE,
    expert_modules,
    experts_forward,
    stack_names,
    stack_of,
    trains_in_full,
)

# Operators that launch no kernel: memory without values, and another name for a tensor.
NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view")
# They read the rows that they return, not the whole of their first input.
GATHERS = ("index", "index_select", "gather")


TOKENS = 256


def expert_traffic(
    layers: Iterable[nn.Module], per_token: Iterable[int], dtype: torch.dtype
) -> list[float]:
    """Bytes of a token in each layer on meta, forward and backward.

    0 for a layer without experts that Transformers calls by its interface, and for one whose
    experts train in full.

    Args:
        per_token: how many experts of each layer a token goes to.
    """
    # Most models have one kind of experts in many layers: each is counted once.
    sizes: dict[Any, float] = {}
    traffic = []
    for layer, chosen in zip(layers, per_token, strict=True):
        size = 0.0
        for experts in expert_modules(layer).values():
            if trains_in_full(experts):
                continue
            shapes = tuple((name, *weight.shape) for name, weight in experts.named_parameters())
            key = (type(experts), shapes, chosen)
            if key not in sizes:
                sizes[key] = _bytes_of_token(experts, chosen, dtype)
            size += sizes[key]
        traffic.append(size)
    return traffic


def _bytes_of_token(experts: nn.Module, per_token: int, dtype: torch.dtype) -> float:
    """Those of one module; two forwards show what does not depend on the tokens."""
    short = _bytes_of_pass(experts, per_token, dtype, TOKENS)
    long = _bytes_of_pass(experts, per_token, dtype, 2 * TOKENS)
    return (long - short) / TOKENS + per_token * _bytes_of_update(experts, dtype)


def _bytes_of_pass(experts: nn.Module, per_token: int, dtype: torch.dtype, tokens: int) -> int:
    """Those of a forward and backward of `tokens`, without any product."""
    first, _ = stack_names(experts)
    _, hidden_size, _ = stack_of(experts, first).shape
    options: dict[str, Any] = {"dtype": dtype, "device": "meta", "requires_grad": True}
    hidden = torch.empty(tokens, hidden_size, **options)
    weights = torch.empty(tokens, per_token, **options)
    index = torch.empty(tokens, per_token, dtype=torch.long, device="meta")
    with MovedBytes() as moved:
        y = experts_forward(experts, hidden, index, weights)
        torch.autograd.grad(y, (hidden, weights), torch.empty_like(y))
    return moved.count


def _bytes_of_update(experts: nn.Module, dtype: torch.dtype) -> int:
    """Those of the products of an adapter's low rank, for a row of an expert.

    Forward x A^T reads x, and its product with B^T writes y, to which the large product is added.
    Backward there are two of each kind, and a sum for the gradient of x.
    """
    elements = 0
    for name in stack_names(experts):
        if getattr(experts, name + UPDATE, None) is None:
            continue
        _, in_features, out_features = stack_of(experts, name).shape
        elements += 3 * (in_features + out_features) + 3 * out_features + 3 * in_features
    return elements * dtype.itemsize


class MovedBytes(DispatchMode):
    """Counts the bytes of all inputs and outputs of the kernels that run below it, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        schema = func._schema
        is_view = any(
            argument.alias_info is not None and not argument.alias_info.is_write
            for argument in schema.arguments
        )
        name = schema.name.rpartition("::")[2]
        if is_view or schema.name.startswith("prim::") or name in NO_KERNEL:
            return output
        values = (output, output) if name in GATHERS else (args, (kwargs or {}).values(), output)
        self.count += sum(tensor.numel() * tensor.itemsize for tensor in _tensors(values))
        return output


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operator, and in their lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Iterable) and not isinstance(value, str):
            yield from _tensors(value)
