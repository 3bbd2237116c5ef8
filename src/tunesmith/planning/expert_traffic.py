"""Bytes that the kernels around the products of experts move.

A mixture has k copies of each token, and each product is small: on a chip with slow memory the
gathers, activations and sums of the copies take as long as the products. Large products are not
among these bytes, as they are bound by arithmetic; those of an adapter's low rank are: they read
and write as much, and compute little.

Where experts are multiplied one after the other, an expert's rows come from memory once, where they
are gathered, and are in the cache for the products of its turn, whose small kernels then take as
long as a kernel takes at least.

`benchmarks/speed/count_kernels.py` counts the same on the graphs of the compiler; a test compares.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import nn

# Small products of an expert's turn with an adapter: x A, and its product with B, of both stacks;
# backward these, and the gradients of A and B.
SMALL_PRODUCTS_FORWARD = 4
SMALL_PRODUCTS_BACKWARD = 8
# What a GB10 moves while its shortest kernel runs, some 2.5 microseconds; faster memory moves more,
# of which a plan takes no account.
SHORTEST_KERNEL_BYTES = 0.5e6


class CopyWidths(NamedTuple):
    """Elements of a token's copies in all layers.

    Attributes:
        hidden: of the rows that are gathered and added up.
        first: of the outputs of the first stacks; second: of the inputs of the second ones.
        adapted: of `hidden`, in layers whose experts have an adapter: on both stacks, or on none.
    """

    hidden: int
    first: int
    second: int
    adapted: int

    @property
    def adapted_share(self) -> float:
        return self.adapted / self.hidden if self.hidden else 0.0


def copy_widths(layers: "Iterable[nn.Module]", per_token: Iterable[int]) -> CopyWidths:
    """The widths of layers on meta, without those whose experts train in full.

    Args:
        per_token: how many experts of each layer a token goes to.
    """
    from tunesmith.quant.experts import (
        UPDATE,
        expert_modules,
        stack_names,
        stack_of,
        trains_in_full,
    )

    hidden = first = second = adapted = 0
    for layer, chosen in zip(layers, per_token, strict=True):
        for experts in expert_modules(layer).values():
            if trains_in_full(experts):
                continue
            name_of_first, name_of_second = stack_names(experts)
            _, width, first_out = stack_of(experts, name_of_first).shape
            _, second_in, _ = stack_of(experts, name_of_second).shape
            hidden += chosen * width
            first += chosen * first_out
            second += chosen * second_in
            if getattr(experts, name_of_first + UPDATE, None) is not None:
                adapted += chosen * width
    return CopyWidths(hidden, first, second, adapted)


def copied_elements(widths: CopyWidths, *, compiled: bool, grouped: bool) -> float:
    """Elements of a token that a forward and backward read and write.

    Args:
        compiled: the activations are kernels of the compiler.
        grouped: all experts are multiplied by one kernel.
    """
    hidden, first, second, _ = widths
    adapted = widths.adapted_share
    # Sums of the outputs, and of the gradients of the inputs.
    moved = 2.0 * hidden
    # Copies of the tokens and of the output's gradient; of the tokens once more for that of A.
    # In turns the products find them in the cache.
    moved += (2 if grouped else 1) * (2 + adapted) * hidden
    # Activations and weights: forward, and backward with the activation computed again.
    moved += 6 * first + 5 * second if compiled else 11 * first + 7 * second
    if grouped:
        # Each of the products of low rank reads or writes one such row; the sum of its update and
        # the large product reads two and writes one.
        moved += adapted * (12 * hidden + 6 * first + 6 * second)
    return moved
