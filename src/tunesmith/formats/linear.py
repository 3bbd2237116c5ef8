"""A linear layer with a weight that is not trained, however that is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.formats.base import Format, Forms, FrozenWeight, TensorForm
from tunesmith.formats.dense import DENSE_FORMAT
from tunesmith.formats.matmul import grouped_matmul

if TYPE_CHECKING:
    from tunesmith.formats.base import Stored, StoredParts
    from tunesmith.model.weights import StoredTensor


class TensorShard(NamedTuple):
    """Number `part` of `parts` equal ones along a dimension of a weight [out, in].

    The others are on the ranks of the process group named `group`.
    """

    dim: int
    part: int
    parts: int
    group: str

    def shard_of(self, blocks: Tensor, rows: int) -> Tensor:
        """The shard [its rows, its blocks of a row] of [rows * blocks of a row], as a view."""
        # Along dimension 0 whole rows, along dimension 1 a span of blocks of every row.
        return blocks.view(rows, -1).chunk(self.parts, self.dim)[self.part]


class FrozenTensors(nn.Module):
    """A module that holds the tensors of a format: empty until they are loaded.

    Attributes:
        compute_dtype: of `dense`.
    """

    format: Format
    compute_dtype: torch.dtype
    weight: nn.Parameter
    _forms: Mapping[str, TensorForm] = MappingProxyType({})

    def hold(self, forms: Mapping[str, TensorForm], tensors: Sequence[Tensor]) -> None:
        """Store these tensors, in place of those that are there."""
        for name in self._forms.keys() - forms.keys():
            delattr(self, name)
        self._forms = forms
        for (name, form), tensor in zip(forms.items(), tensors, strict=True):
            if not form.is_shared:
                self.register_buffer(name, tensor, persistent=False)
                continue
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def stored_tensors(self) -> list[Tensor]:
        """All tensors of the format, in its order; of shared ones perhaps a part is here."""
        return [getattr(self, name) for name in self._forms]

    def read_tensors(self) -> list[Tensor]:
        """Return those tensors that are here, as the products read them."""
        tensors = []
        for name, form in self._forms.items():
            tensor = local_part(getattr(self, name))
            tensors.append(tensor if form.read_as is None else tensor.view(form.read_as))
        return tensors


def empty_tensors(forms: Forms, device: torch.device) -> list[Tensor]:
    """Tensors of these forms without values."""
    return [torch.empty(form.shape, dtype=form.dtype, device=device) for form in forms.values()]


class FrozenLinear(FrozenTensors):
    """y = x W^T + b with a W that gets no gradient.

    One layer is quantized without knowing of the others.

    Attributes:
        bias: compute_dtype [out_features], or None.
        tensor_shard: which part of the layer this rank of a tensor group has; `in_features` and
            `out_features` are those of the part. None: all of it.
        rounded_from: the dense weight in the file that it was read from, of fp8.
        read_dense: gives the dense weight, which the layer then computes with instead.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    tensor_shard: TensorShard | None = None
    rounded_from: StoredTensor | None = None
    read_dense: Callable[[], Tensor] | None = None

    def __init__(
        self,
        kind: Format,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        compute_dtype: torch.dtype,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.format = kind
        self.in_features = in_features
        self.out_features = out_features
        self.bias = bias
        self.compute_dtype = compute_dtype
        self.allocate(torch.device(device))

    def take_over(self, base: nn.Linear | FrozenLinear) -> None:
        """Have the very tensors of another layer: tied weights stay tied."""
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.bias = base.bias
        if isinstance(base, FrozenLinear):
            self.format = base.format
            self.compute_dtype = base.compute_dtype
            self.hold(base._forms, base.stored_tensors())
        else:
            self.format = DENSE_FORMAT
            self.compute_dtype = base.weight.dtype
            self.hold(DENSE_FORMAT.matrix_forms(base.out_features, base.in_features), [base.weight])

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def allocate(self, device: torch.device) -> None:
        """Make the tensors of the weight, empty, for the layer's sizes; the bias stays as it is."""
        forms = self.format.matrix_forms(*self.shape)
        self.hold(forms, empty_tensors(forms, device))

    def store(self, kind: Format, tensors: Sequence[Tensor]) -> None:
        """Have these tensors of a weight in this format."""
        self.format = kind
        self.hold(kind.matrix_forms(*self.shape), tensors)

    def load(self, stored: StoredParts, name: str) -> None:
        """Take the weight, called `name`, of a checkpoint: a hook of `load_weights`.

        It may be a collective call.
        """
        self.format.load_matrix(self, stored, name)

    def frozen_weight(self) -> FrozenWeight:
        """The weight as the operators take it."""
        if self.read_dense is not None:
            return FrozenWeight(DENSE_FORMAT, [self.read_dense()], self.shape)
        return FrozenWeight(self.format, self.read_tensors(), self.shape)

    def part_of(self, dense: Stored, rows: slice) -> Tensor:
        """Rows of this rank's part of the whole weight; a new tensor where read from a file."""
        # `rows` count from the first row of this rank's part, `dense` is the whole layer.
        first_row, first_column = self.origin
        columns = slice(first_column, first_column + self.in_features)
        return dense[slice(first_row + rows.start, first_row + rows.stop), columns]

    @property
    def origin(self) -> tuple[int, int]:
        """The first row and column of the whole weight that this rank has."""
        shard = self.tensor_shard
        if shard is None:
            return 0, 0
        if shard.dim == 0:
            return shard.part * self.out_features, 0
        return 0, shard.part * self.in_features

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The weight that the layer stands for, in the compute dtype; new where it is in codes."""
        return self.frozen_weight().dense(self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        if self.format is DENSE_FORMAT:
            return F.linear(x, local_part(self.weight), local_part(self.bias))
        return grouped_matmul(x, [self.frozen_weight()], [local_part(self.bias)])[0]

    def extra_repr(self) -> str:
        has_bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={has_bias}, {self.format.name}"


def has_codes(module: nn.Module) -> bool:
    """Tell whether a module has a frozen weight, or a stack of them, in codes."""
    return isinstance(module, FrozenTensors) and module.format is not DENSE_FORMAT
