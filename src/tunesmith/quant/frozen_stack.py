"""Frozen weights of all experts of a layer, in one tensor: made dense for some experts at a time.

As `frozen_weight` is for a linear layer: `encoding` and `tensors` describe a stack in full, and
`frozen_stack` builds it again from them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class FrozenStack(ABC):
    """The weights that the rows of each expert are multiplied with; they get no gradient.

    Attributes:
        encoding: a key of STACK_CLASSES, and the options of its class after it.
        tensors: what stores the weights.
        shape: (experts, in_features, out_features).
    """

    def __init__(
        self, encoding: str, tensors: Sequence[Tensor], shape: tuple[int, int, int]
    ) -> None:
        self.encoding = encoding
        self.tensors = tensors
        self.shape = shape

    @abstractmethod
    def dense(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """The experts from `first` to before `last`: [last - first, in, out], y = x W.

        A view where it is stored so, and transposed where it is stored as [experts, out, in].
        """


class DenseStack(FrozenStack):
    """tensors: W [experts, out, in], or [experts, in, out]: "transposed" is in the encoding."""

    @classmethod
    def of(cls, weight: Tensor, *, is_transposed: bool) -> "DenseStack":
        """`weight` as a module of Transformers has it."""
        if is_transposed:
            experts, in_features, out_features = weight.shape
            return cls("dense transposed", [weight], (experts, in_features, out_features))
        experts, out_features, in_features = weight.shape
        return cls("dense", [weight], (experts, in_features, out_features))

    def dense(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        weight = self.tensors[0][first:last].to(dtype)
        if self.encoding == "dense transposed":
            return weight
        return weight.mT


STACK_CLASSES: dict[str, type[FrozenStack]] = {"dense": DenseStack}


def frozen_stack(
    encoding: str, tensors: Sequence[Tensor], shape: tuple[int, int, int]
) -> FrozenStack:
    """The stack of this encoding; see `FrozenStack`."""
    name = encoding.split(maxsplit=1)[0]
    return STACK_CLASSES[name](encoding, tensors, shape)
