"""Base class of the formats that keep the codes and scales of a quantized checkpoint.

The tensors in memory are those of the file. A weight is dequantized for one matmul at a time, in
the forward and again in the backward pass. The result of the matmul is the same as with the dense
weight. A checkpoint stores the experts of a layer as one stack or as separate weights. If gate and
up are separate weights, they become two parts of the expert's matrix in the stack.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import ModelError
from tunesmith.formats.base import (
    Format,
    Forms,
    FrozenStack,
    FrozenWeight,
)
from tunesmith.formats.form import FETCH, ShippedForm
from tunesmith.formats.stored import Stored, StoredParts, StoredTensor, whole_slices

if TYPE_CHECKING:  # these modules import the formats
    from tunesmith.formats.linear import FrozenLinear
    from tunesmith.formats.stack import ExpertStack


class AsShipped(Format):
    """A format of quantized checkpoints.

    The first tensors of a weight have values for each row of the matrix (`TensorForm.is_shared`). A
    last tensor can follow, which contains the scales of the entire matrix.

    Attributes:
        form: the storage format of the checkpoint.
        drawn_scales: values with which `draw` fills the tensors after the codes. With these scales,
            the random weights are about 0.02.
    """

    drawn_scales: Sequence[float]

    def __init__(self, form: ShippedForm, *options: str | float | None) -> None:
        super().__init__(*options)
        self.form = form

    def stack_forms(self, experts: int, rows: int, columns: int, parts: int) -> Forms:
        part_forms = self.matrix_forms(rows // parts, columns)
        forms = {}
        for name, form in self.matrix_forms(rows, columns).items():
            if form.is_shared:
                shape = (experts, *form.shape)
            else:
                shape = (experts, parts, *part_forms[name].shape)
            forms[name] = form._replace(shape=shape)
        return forms

    def decode_experts(self, stack: FrozenStack, experts: slice, dtype: torch.dtype) -> Tensor:
        # A group of weights that share a scale is within one row, so the rows of all experts can be
        # dequantized as one matrix.
        tensors = [tensor[experts].flatten(0, 1) for tensor in stack.tensors]
        shape = (len(tensors[0]), stack.matrix[1])
        return FrozenWeight(self, tensors, shape).dense(dtype).view(-1, *stack.matrix)

    def draw(self, tensors: Sequence[Tensor]) -> None:
        """Fill the tensors of a weight with random codes and constant scales, for speed
        measurements.
        """
        codes, *scales = tensors
        codes.random_(0, 256, generator=torch.Generator(codes.device).manual_seed(0))
        # Clear the highest bit of the exponent, so that no code is NaN and few values are large.
        codes.bitwise_and_(0b10111111)

        for scale, value in zip(scales, self.drawn_scales, strict=True):
            scale.fill_(value)

    @abstractmethod
    def decode_rows(self, codes: Sequence[Tensor], scale: Tensor | None, first: int) -> Tensor:
        """Return rows of a matrix in fp32, dequantized from codes that were read from a file.

        Args:
            scale: result of `read_scale` for the entire matrix.
            first: index of the first row.
        """

    def read_scale(self, stored: StoredTensor, weight: str) -> Tensor:
        """Read the scales of the entire weight `weight`.

        Raise ModelError if a scale is not finite.
        """
        raise NotImplementedError

    def has_nan_scale(self, codes: Sequence[Tensor]) -> bool:
        """Return whether one of these tensors is a scale tensor that contains NaN."""
        return False

    @torch.no_grad()
    def load_matrix(self, layer: FrozenLinear, stored: StoredParts, name: str) -> None:
        weight = stored[""]
        targets = layer.stored_tensors()
        local = [local_part(target) for target in targets]
        if isinstance(weight, Tensor):
            self.draw(local)
            return

        if weight.format_name != self.name:
            raise self._missing_scales(name, "the weight is")
        if weight.shape != layer.shape:
            raise ModelError(
                f"it is stored as {list(weight.shape)}, but {list(layer.shape)} is needed",
                where=name,
                fix=FETCH,
            )

        for target, codes in zip(targets, weight.codes, strict=False):
            codes.into_part(target)
        if weight.scale is not None:
            targets[-1].copy_(weight.scale)
        weight.check_rows(local[: len(weight.codes)])

    @torch.no_grad()
    def load_stack(self, stack: ExpertStack, weight: Stored, first: int) -> None:
        if isinstance(weight, Tensor):
            self.draw([local_part(tensor) for tensor in stack.stored_tensors()])
            return
        if weight.format_name == self.name:
            self._load_whole_stack(stack, weight, first)
            return

        pieces = list(weight.pieces(slice(first, first + stack.stored_shape[0])))
        if not pieces:
            raise self._missing_scales(weight.name, "these experts are")

        for region, stored in pieces:
            if stored.format_name != self.name:
                raise self._missing_scales(stored.name, "an expert is")
            expert_slice, rows, _ = region
            part = rows.start * stack.parts // stack.rows
            *places, scale = stack.tensors_of_part(expert_slice.start - first, part)
            assert scale is not None
            assert stored.scale is not None
            scale.copy_(stored.scale)
            # Skip the tensors that are on other ranks. `tensors_of_part` returns None for them.
            local = [place for place in places if place is not None]
            for place, codes in zip(local, stored.codes, strict=False):
                codes.read_into(place, whole_slices(codes.shape))
            if local:
                stored.check_rows(local)

    def _load_whole_stack(self, stack: ExpertStack, weight: StoredTensor, first: int) -> None:
        """Load the experts of a stack that the checkpoint stores as one weight. Each tensor is read
        in one contiguous read.
        """
        targets = stack.stored_tensors()
        # Index in the file of the first expert on this rank.
        first_local = first + local_slices(targets[0])[0].start
        # The first tensors are sharded by experts. A last scale tensor is complete on each rank.
        shared = [local_part(target) for target in targets[: len(weight.codes)]]
        for target, codes in zip(shared, weight.codes, strict=True):
            experts = slice(first_local, first_local + len(target))
            codes.read_into(target, (experts, *whole_slices(codes.shape[1:])))

        for expert, expert_codes in enumerate(zip(*shared, strict=True), start=first_local):
            weight.check_rows(expert_codes, expert)

        if weight.scale is not None:
            place = targets[-1]
            scales = weight.scale[first : first + len(place)]
            # If an expert has a single scale, all of its parts use this scale.
            place.copy_(scales.unflatten(1, (min(stack.parts, scales.shape[1]), -1)))

    def _missing_scales(self, name: str, what: str) -> ModelError:
        """Build the error for a weight that config.json declares as quantized but that has no
        scales.
        """
        return ModelError(
            f"{what} stored without scales",
            where=name,
            why=f"config.json says that this module is quantized to {self.form.describe()}",
            fix=f"add the module's name to quantization_config.{self.form.plain_key} in "
            "config.json, or set model.quantize=none",
        )


def not_finite(name: str, where: str, more: str = "") -> ModelError:
    """Build the error for a scale of the weight `name` that is not finite."""
    return ModelError(
        f"a scale of {name} is not finite{more}",
        where=where,
        why="each weight is a code times a scale, so the file is damaged or the model was already "
        "broken when it was quantized",
        fix=FETCH,
    )
