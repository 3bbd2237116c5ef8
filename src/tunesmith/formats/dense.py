"""Frozen weights as they are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.formats.base import Format, Forms, FrozenStack, FrozenWeight, TensorForm


class Dense(Format):
    """A weight in the dtype of x."""

    name = "dense"

    def matrix_forms(self, rows: int, columns: int) -> Forms:
        return {"weight": TensorForm((rows, columns), is_shared=True)}

    def decode(self, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        return weight.tensors[0]

    def decode_experts(self, stack: FrozenStack, experts: slice, dtype: torch.dtype) -> Tensor:
        return stack.tensors[0][experts].to(dtype)

    def is_dense(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
        return tensors[0].dtype == dtype


DENSE_FORMAT = Dense()


def dense_stack(weight: Tensor, *, is_transposed: bool) -> FrozenStack:
    """A stack `weight` as a module of Transformers has it."""
    experts, rows, columns = weight.shape
    shape = (experts, rows, columns) if is_transposed else (experts, columns, rows)
    return FrozenStack(DENSE_FORMAT, [weight], shape, is_transposed)
