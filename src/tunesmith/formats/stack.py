"""Frozen stacks of experts that are stored in codes, in the place of a parameter.

A module of Transformers has its experts in two parameters, each [experts, out, in], or [experts,
in, out]. Where they are in codes, a module of the parameter's name stands in its place. One expert
is read, and rounded, at a time: a dense stack is never in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import ModelError
from tunesmith.formats.base import Format, FrozenStack
from tunesmith.formats.form import FETCH
from tunesmith.formats.linear import FrozenTensors, empty_tensors

if TYPE_CHECKING:
    from tunesmith.formats.base import Stored, StoredParts


class ExpertStack(FrozenTensors):
    """A stack of experts in codes; empty until `load`.

    Attributes:
        stored_shape: of the dense stack as Transformers has it, and as checkpoints do.
        is_transposed: that is [experts, in, out], not [experts, out, in].
        is_turned: an expert's codes lie the other way around.
        rows, columns: of the matrix that an expert's codes are of.
        parts: that an expert is stored in, one over the other.
    """

    def __init__(
        self,
        kind: Format,
        stored_shape: torch.Size,
        *,
        is_transposed: bool,
        compute_dtype: torch.dtype,
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.format = kind
        self.stored_shape = stored_shape
        self.is_transposed = is_transposed
        self.is_turned = is_transposed and kind.is_output_major
        _, self.rows, self.columns = stored_shape
        if self.is_turned:
            self.rows, self.columns = self.columns, self.rows
        self.parts = parts
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
        return self.weight.device

    def allocate(self, device: torch.device) -> None:
        """Make the tensors of the stack, empty."""
        experts = self.stored_shape[0]
        forms = self.format.stack_forms(experts, self.rows, self.columns, self.parts)
        self.hold(forms, empty_tensors(forms, device))

    def places_of(self, expert: int, part: int) -> list[Tensor | None]:
        """Find where the tensors of an expert's part are stored; None: on another rank."""
        height = self.rows // self.parts
        places: list[Tensor | None] = []
        for tensor, form in zip(self.stored_tensors(), self._forms.values(), strict=True):
            if not form.is_shared:
                places.append(tensor[expert, part])
                continue
            span = local_slices(tensor)[0]
            place = None
            if span.start <= expert < span.stop:
                of_expert = local_part(tensor)[expert - span.start]
                place = of_expert[part * height : (part + 1) * height]
            places.append(place)
        return places

    def frozen_stack(self) -> FrozenStack:
        """The stack as the products take it."""
        is_transposed = self.is_transposed and not self.is_turned
        return FrozenStack(self.format, self.read_tensors(), self.shape, is_transposed)

    def store(self, weight: Stored, first: int = 0) -> None:
        """Take the experts of a dense or stored stack, of which this one's begin at `first`."""
        self.format.load_stack(self, weight, first)

    def load(self, stored: StoredParts, name: str) -> None:
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
        self.store(weight)

    def rounded(self, weight: Stored, first: int, last: int) -> Tensor:
        """The experts of a stack from `first` to before `last`, rounded as this stack does, dense
        on the CPU: [last - first, *stored_shape[1:]] in the compute dtype.
        """
        shape = torch.Size((last - first, *self.stored_shape[1:]))
        part = ExpertStack(
            self.format, shape, is_transposed=self.is_transposed, compute_dtype=self.compute_dtype
        )
        part.allocate(torch.device("cpu"))
        part.store(weight, first)
        return part.dense()

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The stack that this stands for: [*stored_shape] in the compute dtype."""
        weight = self.frozen_stack().dense(0, self.stored_shape[0], self.compute_dtype)
        return weight if self.is_transposed else weight.mT

    def extra_repr(self) -> str:
        experts, in_features, out_features = self.shape
        return f"{experts} x {in_features}, {out_features}, {self.format.name}"
