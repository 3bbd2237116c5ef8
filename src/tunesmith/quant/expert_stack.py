"""Frozen stacks of experts that are stored in codes, in the place of a parameter.

A module of Transformers has its experts in two parameters, each [experts, out, in], or [experts,
in, out]. Where they are in codes, a module of the parameter's name stands in its place. One expert
is read, and rounded, at a time: a dense stack is never in memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.model.weights import StoredTensor
from tunesmith.quant.frozen_stack import TRANSPOSED, FrozenStack

FETCH = "fetch the model again: tunesmith fetch MODEL"


class ExpertStack(nn.Module, ABC):
    """A stack of experts in codes; empty until `load`.

    What is as large as the stack is a parameter whose first dimension are the experts: FSDP gives
    each rank whole ones, and leaves buffers whole on every rank.

    Attributes:
        stored_shape: of the dense stack as Transformers has it, and as checkpoints do.
        is_transposed: that is [experts, in, out], not [experts, out, in].
        encoding: of its frozen stack.
        compute_dtype: of `dense`.
    """

    encoding: str

    def __init__(
        self, stored_shape: torch.Size, *, is_transposed: bool, compute_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.stored_shape = stored_shape
        self.is_transposed = is_transposed
        self.compute_dtype = compute_dtype
        self.allocate(torch.device("meta"))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, in_features, out_features)."""
        experts, rows, columns = self.stored_shape
        if self.is_transposed:
            return experts, rows, columns
        return experts, columns, rows

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @abstractmethod
    def allocate(self, device: torch.device) -> None:
        """Make the tensors of the stack, empty."""

    @abstractmethod
    def store(self, weight: StoredTensor | Tensor, first: int = 0) -> None:
        """Take the experts of a dense or stored stack, of which this one's begin at `first`.

        A rank takes those that it holds. Where ranks share the stack it is a collective call.
        """

    @abstractmethod
    def frozen_stack(self) -> FrozenStack:
        """The stack as the products take it."""

    def load(self, stored: Mapping[str, StoredTensor | Tensor], name: str) -> None:
        """Take the stack, called `name`, of a checkpoint: a hook of `load_weights`."""
        weight = stored[""]
        if len(stored) > 1:
            raise ModelError(
                "its experts are already quantized, in an unsupported format",
                where=name,
                why=f"it is stored with {', '.join(sorted(key for key in stored if key))}",
                fix="take the unquantized model; model.quantize: nf4 quantizes it as it is loaded",
            )
        if tuple(weight.shape) != tuple(self.stored_shape):
            what = f"it is stored as {list(weight.shape)}, and {list(self.stored_shape)} is needed"
            raise ModelError(what, where=name, fix=FETCH)
        with torch.no_grad():
            self.store(weight)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The stack that this stands for: [*stored_shape] in the compute dtype."""
        weight = self.frozen_stack().dense(0, self.stored_shape[0], self.compute_dtype)
        return weight if self.is_transposed else weight.mT

    def named(self, encoding: str) -> str:
        """The encoding with how the stack is stored."""
        return f"{encoding} {TRANSPOSED}" if self.is_transposed else encoding

    def extra_repr(self) -> str:
        experts, in_features, out_features = self.shape
        return f"{experts} x {in_features}, {out_features}, {self.encoding}"
