"""Frozen weights that are not quantized."""

import torch
from torch import Tensor

from tunesmith.formats.base import Format, Forms, FrozenStack, FrozenWeight, TensorForm


class Dense(Format):
    """Format of a frozen weight that is stored unquantized, in the dtype of x."""

    name = "dense"

    def matrix_forms(self, rows: int, columns: int) -> Forms:
        return {"weight": TensorForm((rows, columns), is_shared=True)}

    def decode(self, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        return weight.tensors[0]

    def decode_experts(self, stack: FrozenStack, experts: slice, dtype: torch.dtype) -> Tensor:
        return stack.tensors[0][experts].to(dtype)


DENSE_FORMAT = Dense()


def dense_stack(weight: Tensor, *, is_transposed: bool) -> FrozenStack:
    """Return a `FrozenStack` for the experts in `weight`, a parameter of a Transformers module."""
    experts, rows, columns = weight.shape
    shape = (experts, rows, columns) if is_transposed else (experts, columns, rows)
    return FrozenStack(DENSE_FORMAT, [weight], shape, is_transposed)
