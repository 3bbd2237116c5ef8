"""Frozen stacks of quantized experts, which replace a parameter of a Transformers module.

A Transformers module has its experts in two parameters, each [experts, out, in] or [experts, in,
out]. If the experts are quantized, a module with the name of the parameter replaces the parameter.
The experts are read and rounded one by one, so a dense stack is never in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import ModelError
from tunesmith.formats.base import Format, Forms, FrozenStack
from tunesmith.formats.form import FETCH
from tunesmith.formats.linear import FrozenTensors
from tunesmith.formats.stored import Stored, StoredParts


class ExpertStack(FrozenTensors):
    """A stack of quantized experts. Its tensors are uninitialized until `load`.

    Attributes:
        stored_shape: shape of the dense stack in Transformers and in checkpoints.
        is_transposed: whether `stored_shape` is [experts, in, out] instead of [experts, out, in].
        is_turned: whether the codes of an expert are transposed relative to `stored_shape`.
        rows, columns: shape of the matrix that the codes of an expert represent.
        parts: number of parts of an expert's matrix. The rows of the second part follow the rows of
            the first part.
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
        """Shape of the stack: (experts, in_features, out_features)."""
        experts, rows, columns = self.stored_shape
        if self.is_transposed:
            return experts, rows, columns
        return experts, columns, rows

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def tensor_forms(self) -> Forms:
        experts = self.stored_shape[0]
        return self.format.stack_forms(experts, self.rows, self.columns, self.parts)

    def tensors_of_part(self, expert: int, part: int) -> list[Tensor | None]:
        """Return views of the tensors for one part of an expert's matrix.

        An entry is None if another rank has this expert's rows of the tensor.
        """
        height = self.rows // self.parts
        rows = slice(part * height, (part + 1) * height)
        places: list[Tensor | None] = []
        for tensor, form in zip(self.stored_tensors(), self._forms.values(), strict=True):
            if not form.is_shared:
                places.append(tensor[expert, part])
                continue

            # Experts on this rank.
            span = local_slices(tensor)[0]
            place = None
            if span.start <= expert < span.stop:
                place = local_part(tensor)[expert - span.start][rows]
            places.append(place)
        return places

    def frozen_stack(self) -> FrozenStack:
        """Return the stack in the form in which the matmuls use it."""
        is_transposed = self.is_transposed and not self.is_turned
        return FrozenStack(self.format, self.read_tensors(), self.shape, is_transposed)

    def store(self, weight: Stored, first: int = 0) -> None:
        """Load the experts of a dense or quantized stack, starting at expert `first` of
        `weight`.
        """
        self.format.load_stack(self, weight, first)

    def load(self, stored: StoredParts, name: str) -> None:
        """Load the stack `name` from a checkpoint. `load_weights` calls this method."""
        weight = stored[""]
        # Codes and scales of a supported format are one entry, so a second entry is of another
        # format.
        if len(stored) > 1:
            raise ModelError(
                "the experts are already quantized in an unsupported format",
                where=name,
                why="their weights are stored together with "
                f"{', '.join(sorted(key for key in stored if key))}",
                fix="use the unquantized model; model.quantize: nf4 quantizes it during loading",
            )
        if tuple(weight.shape) != tuple(self.stored_shape):
            raise ModelError(
                f"it is stored as {list(weight.shape)}, but {list(self.stored_shape)} is needed",
                where=name,
                fix=FETCH,
            )
        self.store(weight)

    def rounded(self, weight: Stored, first: int, last: int) -> Tensor:
        """Return the dense values that the experts from `first` to `last` (exclusive) have after
        they were rounded to this stack's format.

        The result is dense and on the CPU: [last - first, *stored_shape[1:]] in the compute dtype.
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
        """Return the dense stack [*stored_shape] in the compute dtype."""
        weight = self.frozen_stack().dense(0, self.stored_shape[0], self.compute_dtype)
        return weight if self.is_transposed else weight.mT
