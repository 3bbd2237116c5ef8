"""The base of formats that keep the codes and scales which a checkpoint ships.

In memory is what is on the disk. A weight is dequantized for one product at a time, in the forward
and again in the backward, and computes what the dense weight computes. Experts are stored as one
stack, or one by one, and then an expert in one part or two (gate and up).
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
from tunesmith.formats.base import Format, Forms
from tunesmith.formats.form import FETCH, ShippedForm

if TYPE_CHECKING:
    from tunesmith.formats.base import Stored, StoredParts
    from tunesmith.formats.linear import FrozenLinear
    from tunesmith.formats.stack import ExpertStack
    from tunesmith.model.weights import StoredTensor


class AsShipped(Format):
    """Tensors that are shared have rows of a matrix, and come first; another one has its scales.

    Attributes:
        drawn_scales: each tensor's value but the codes', of drawn weights: these are of about 0.02.
    """

    drawn_scales: Sequence[float]

    def __init__(self, form: ShippedForm, *options: str | float | None) -> None:
        super().__init__(*options)
        self.form = form

    def stack_forms(self, experts: int, rows: int, columns: int, parts: int) -> Forms:
        of_part = self.matrix_forms(rows // parts, columns)
        forms = {}
        for name, form in self.matrix_forms(rows, columns).items():
            shape = (experts, *form.shape)
            if not form.is_shared:
                shape = (experts, parts, *of_part[name].shape)
            forms[name] = form._replace(shape=shape)
        return forms

    def draw(self, tensors: Sequence[Tensor]) -> None:
        """Fill the tensors of a weight to measure speed with: random codes, equal scales."""
        codes, *scales = tensors
        generator = torch.Generator(codes.device).manual_seed(0)
        codes.random_(0, 256, generator=generator)
        # Without the highest bit of the exponent: no code is NaN, and few are large.
        codes.bitwise_and_(0b10111111)
        for scale, value in zip(scales, self.drawn_scales, strict=True):
            scale.fill_(value)

    @abstractmethod
    def decode_rows(self, codes: Sequence[Tensor], scale: Tensor | None, first: int) -> Tensor:
        """Rows of a matrix from `first` on, as they are read of a file: in fp32.

        scale: of the whole matrix, as of `read_scale`.
        """

    def read_scale(self, stored: StoredTensor, weight: str) -> Tensor:
        """The scales of the whole weight of this name; ModelError where one is no finite number."""
        raise NotImplementedError

    def has_nan_scale(self, codes: Sequence[Tensor]) -> bool:
        """Tell whether a scale of some rows is no number."""
        return False

    @torch.no_grad()
    def load_matrix(self, layer: FrozenLinear, stored: StoredParts, name: str) -> None:
        weight = stored[""]
        targets = layer.stored_tensors()
        if isinstance(weight, Tensor):
            self.draw([local_part(target) for target in targets])
            return
        if not self._is_of(weight):
            raise self._without_scales(name, "its weight is")
        if weight.shape != layer.shape:
            what = f"it is stored as {list(weight.shape)}, and {list(layer.shape)} is needed"
            raise ModelError(what, where=name, fix=FETCH)
        for target, codes in zip(targets, weight.codes, strict=False):
            codes.into_part(target)
        if weight.scale is not None:
            targets[-1].copy_(weight.scale)
        weight.check_rows([local_part(target) for target in targets[: len(weight.codes)]])

    @torch.no_grad()
    def load_stack(self, stack: ExpertStack, weight: Stored, first: int) -> None:
        if isinstance(weight, Tensor):
            self.draw([local_part(tensor) for tensor in stack.stored_tensors()])
            return
        if self._is_of(weight):
            self._load_whole_stack(stack, weight, first)
            return
        pieces = list(weight.pieces(slice(first, first + stack.stored_shape[0])))
        if not pieces:
            raise self._without_scales(weight.name, "these experts are")
        for piece, stored in pieces:
            if not self._is_of(stored):
                raise self._without_scales(stored.name, "an expert is")
            of_expert, rows, _ = piece.region
            part = rows.start * stack.parts // stack.rows
            *places, scale = stack.places_of(of_expert.start - first, part)
            assert scale is not None
            assert stored.scale is not None
            scale.copy_(stored.scale)
            local = [place for place in places if place is not None]
            for place, codes in zip(local, stored.codes, strict=False):
                codes.into(place)
            if local:
                stored.check_rows(local)

    def _load_whole_stack(self, stack: ExpertStack, weight: StoredTensor, first: int) -> None:
        """Take the experts of a stack that is stored as one weight, in a run of the file each."""
        targets = stack.stored_tensors()
        expert = first + local_slices(targets[0])[0].start
        shared = [local_part(target) for target in targets[: len(weight.codes)]]
        for target, codes in zip(shared, weight.codes, strict=True):
            codes.into(target, expert * codes.shape[1:].numel())
        for place, of_expert in enumerate(zip(*shared, strict=True)):
            weight.check_rows(of_expert, f": that of expert {expert + place}")
        if weight.scale is not None:
            scales = weight.scale[first : first + len(targets[-1])]
            # A single scale of an expert is that of each of its parts.
            parts = min(stack.parts, scales.shape[1])
            targets[-1].copy_(scales.unflatten(1, (parts, -1)))

    def _is_of(self, weight: StoredTensor) -> bool:
        return weight.format is not None and weight.format.name == self.name

    def _without_scales(self, name: str, what: str) -> ModelError:
        """The error for a plain weight called `name` where config.json says that it is in codes."""
        return ModelError(
            f"{what} stored without scales",
            where=name,
            why=f"config.json says that it is in {self.form.describe()}",
            fix=f"name its module in quantization_config.{self.form.plain_key} of config.json,"
            " or model.quantize=none",
        )


def not_finite(name: str, where: str, more: str = "") -> ModelError:
    """The error for a scale of the weight `name`."""
    return ModelError(
        f"a scale of {name} is not finite{more}",
        where=where,
        why="codes times scales are the weight: the file is damaged, or the model was broken when "
        "it was quantized",
        fix=FETCH,
    )
