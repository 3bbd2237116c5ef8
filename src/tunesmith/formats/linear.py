"""A linear layer with a frozen weight in any storage format."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.formats.base import Format, Forms, FrozenWeight, TensorForm, TensorShard
from tunesmith.formats.dense import DENSE_FORMAT
from tunesmith.formats.matmul import grouped_matmul
from tunesmith.formats.stored import Stored, StoredParts, StoredTensor


class FrozenTensors(nn.Module):
    """Module that holds the tensors of a frozen weight. The tensors are uninitialized until the
    weight is loaded.

    Attributes:
        compute_dtype: dtype of the result of `dense`.
    """

    format: Format
    compute_dtype: torch.dtype
    weight: nn.Parameter
    _forms: Mapping[str, TensorForm] = MappingProxyType({})

    @abstractmethod
    def tensor_forms(self) -> Forms:
        """Return the shape and dtype of each tensor of the weight."""

    def allocate(self, device: torch.device) -> None:
        """Allocate uninitialized tensors for the weight."""
        forms = self.tensor_forms()
        self.hold(forms, empty_tensors(forms, device))

    def hold(self, forms: Mapping[str, TensorForm], tensors: Sequence[Tensor]) -> None:
        """Replace the module's tensors by `tensors`."""
        for name in self._forms.keys() - forms.keys():
            delattr(self, name)
        self._forms = forms
        for (name, form), tensor in zip(forms.items(), tensors, strict=True):
            if not form.is_shared:
                self.register_buffer(name, tensor, persistent=False)
            elif isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def stored_tensors(self) -> list[Tensor]:
        """Return all tensors of the weight, in the order of the format. Tensors with `is_shared`
        may be DTensors.
        """
        return [getattr(self, name) for name in self._forms]

    def read_tensors(self) -> list[Tensor]:
        """Return this rank's part of the tensors, with the dtypes that the matmuls use."""
        tensors = []
        for name, form in self._forms.items():
            tensor = local_part(getattr(self, name))
            tensors.append(tensor if form.read_as is None else tensor.view(form.read_as))
        return tensors


def empty_tensors(forms: Forms, device: torch.device) -> list[Tensor]:
    return [torch.empty(form.shape, dtype=form.dtype, device=device) for form in forms.values()]


class FrozenLinear(FrozenTensors):
    """A layer y = x W^T + b with a frozen W.

    Each layer is quantized independently of the others.

    Attributes:
        bias: compute_dtype [out_features], or None.
        tensor_shard: this rank's shard in a tensor-parallel group. `in_features` and `out_features`
            then are the sizes of the shard. None if the layer is not sharded.
        rounded_from: the dense weight in the file, if fp8 codes were computed from it.
        read_dense: function that returns the dense weight. If set, the layer computes with the
            dense weight instead of the codes.
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
        """Use the tensors of `base` in this layer, so that tied weights are still tied."""
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

    def tensor_forms(self) -> Forms:
        return self.format.matrix_forms(*self.shape)

    def store(self, kind: Format, tensors: Sequence[Tensor]) -> None:
        """Replace the weight by `tensors`, which are in the format `kind`."""
        self.format = kind
        self.hold(kind.matrix_forms(*self.shape), tensors)

    def load(self, stored: StoredParts, name: str) -> None:
        """Load the weight `name` from a checkpoint. `load_weights` calls this method.

        This can be a collective call.
        """
        self.format.load_matrix(self, stored, name)

    def frozen_weight(self) -> FrozenWeight:
        """Return the weight in the form in which the operators use it."""
        if self.read_dense is not None:
            return FrozenWeight(DENSE_FORMAT, [self.read_dense()], self.shape)
        return FrozenWeight(self.format, self.read_tensors(), self.shape)

    def part_of(self, dense: Stored, rows: slice) -> Tensor:
        """Return the given rows of this rank's shard of the weight.

        If the weight is in a file, the rows are read into a new tensor.
        """
        # `rows` are relative to the first row of this rank's shard, but `dense` is the weight of
        # the entire layer.
        first_row, first_column = self.origin
        columns = slice(first_column, first_column + self.in_features)
        return dense[slice(first_row + rows.start, first_row + rows.stop), columns]

    @property
    def origin(self) -> tuple[int, int]:
        """Row and column of the entire weight at which this rank's shard starts."""
        shard = self.tensor_shard
        if shard is None:
            return 0, 0
        if shard.dim == 0:
            return shard.part * self.out_features, 0
        return 0, shard.part * self.in_features

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the dense weight in the compute dtype.

        It is a new tensor if the weight is quantized.
        """
        return self.frozen_weight().dense(self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer's output.

        Args:
            x: [..., in_features].

        Returns:
            [..., out_features].
        """
        if self.format is DENSE_FORMAT:
            return F.linear(x, local_part(self.weight), local_part(self.bias))
        return grouped_matmul(x, [self.frozen_weight()], [local_part(self.bias)])[0]


def has_codes(module: nn.Module) -> bool:
    """Return whether a module has a quantized frozen weight or stack of weights."""
    return isinstance(module, FrozenTensors) and module.format is not DENSE_FORMAT
