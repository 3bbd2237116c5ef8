"""Linear layers with a quantized weight that is not trained, and what a model asks about them."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.model.weights import SCALES, Hook, StoredTensor
from tunesmith.quant.expert_stack import ExpertStack
from tunesmith.quant.frozen_matmul import grouped_matmul
from tunesmith.quant.frozen_weight import FrozenWeight


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


class FrozenLinear(nn.Module, ABC):
    """y = x W^T + b with a quantized W that gets no gradient.

    One layer is quantized without knowing of the others. What is as large as W is a parameter:
    FSDP shards parameters, and leaves buffers whole on every rank.

    Attributes:
        encoding: of its frozen weight.
        compute_dtype: of the matmuls' results, and of `dense`.
        bias: compute_dtype [out_features], or None.
        tensor_shard: which part of the layer this rank of a tensor group has; `in_features` and
            `out_features` are those of the part. None: all of it.
    """

    in_features: int
    out_features: int
    encoding: str
    compute_dtype: torch.dtype
    bias: nn.Parameter | None
    tensor_shard: TensorShard | None = None

    @abstractmethod
    def allocate(self, device: torch.device) -> None:
        """Make the tensors of the weight, empty, for the layer's sizes; the bias stays as it is."""

    @abstractmethod
    def load(self, stored: Mapping[str, StoredTensor | Tensor], name: str) -> None:
        """Take the weight, called `name`, of a checkpoint: a hook of `load_weights`.

        It may be a collective call.
        """

    @abstractmethod
    def frozen_weight(self) -> FrozenWeight:
        """The weight as the operators take it."""

    def part_of(self, dense: Tensor | StoredTensor, rows: slice) -> Tensor:
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
        """The weight that the layer stands for: a new tensor in the compute dtype."""
        return self.frozen_weight().dense(self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        return grouped_matmul(x, [self.frozen_weight()], [local_part(self.bias)])[0]

    def extra_repr(self) -> str:
        has_bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={has_bias}, {self.encoding}"


def load_hooks(model: nn.Module) -> dict[str, Hook]:
    """For `load_weights(convert=...)`: what quantizes each frozen weight as it is read.

    A weight that was quantized before is used as it is.
    """
    hooks: dict[str, Hook] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, FrozenLinear):
            hooks[f"{name}.weight"] = partial(layer.load, name=f"{name}.weight")
        elif isinstance(layer, ExpertStack):
            hooks[name] = partial(layer.load, name=name)
    return hooks


BYPASSED = "is_bypassed"  # an attribute of a linear layer


def is_bypassed(module: nn.Module) -> bool:
    """Whether other code reads the weight of a linear layer past its forward."""
    return BYPASSED in vars(module)


def set_bypassed(model: nn.Module, targets: Collection[str]) -> None:
    """Mark the linear layers whose weight other code reads past their forward.

    `targets` are names within a decoder layer, without the numbers in them ("mixer.dt_proj").
    """
    endings = tuple(f".{target}" for target in targets)
    for name, module in model.named_modules():
        words = ".".join(word for word in name.split(".") if not word.isdigit())
        if isinstance(module, nn.Linear) and words.endswith(endings):
            vars(module)[BYPASSED] = True


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is y = x W^T + b and nothing else, so that another may stand in for it.

    Routers and stacks of Transformers derive from `nn.Linear` too, with a forward of their own; and
    of some linear layers only the weight is read (`set_bypassed`).
    """
    if isinstance(module, FrozenLinear):
        return True
    if not isinstance(module, nn.Linear) or is_bypassed(module):
        return False
    # The class whose forward runs: the first of the method resolution order that defines one.
    [owner, *_] = (base for base in type(module).__mro__ if "forward" in vars(base))
    if owner is nn.Linear or owner.__module__.startswith("tunesmith."):
        return True
    return _computes_linear(owner)


@cache
def _computes_linear(owner: type[nn.Module]) -> bool:
    """Whether a forward is that of `nn.Linear`, tried on a small layer: Falcon writes its own."""
    small = nn.Linear(3, 2, device="meta")
    # Whole numbers: no rounding, in whatever order a product is summed.
    small.weight = nn.Parameter(torch.arange(6.0, device="cpu").view(2, 3))
    small.bias = nn.Parameter(torch.arange(2.0, device="cpu"))
    x = torch.arange(12.0, device="cpu").view(4, 3)
    try:
        y = owner.forward(small, x)
    # What a router wants of itself, which this layer does not have, in many forms.
    except Exception:
        return False
    return isinstance(y, Tensor) and torch.equal(y, F.linear(x, small.weight, small.bias))


def linear_names(model: nn.Module, *, head: bool) -> list[str]:
    """Full names of the plain linear layers, dense and quantized, in the model's order.

    With the output layer if `head`.
    """
    from transformers import PreTrainedModel

    left_out = None
    if isinstance(model, PreTrainedModel) and not head:
        left_out = model.get_output_embeddings()
    names = []
    for name, module in model.named_modules():
        if is_plain_linear(module) and module is not left_out:
            names.append(name)
    return names


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model; tied ones count once.

    A quantized weight counts as the dense one that it stands for, which a tensor group shares.
    """
    count = sum(p.numel() for p in model.parameters())
    for layer in model.modules():
        if isinstance(layer, ExpertStack):
            count += layer.stored_shape.numel()
            count -= sum(parameter.numel() for parameter in layer.parameters())
        elif isinstance(layer, FrozenLinear):
            for name, parameter in layer.named_parameters(recurse=False):
                # Out with the stored elements (nf4 has two weights in each), in with out * in
                # below.
                if name in ("weight", f"weight{SCALES}"):
                    count -= parameter.numel()
            parts = layer.tensor_shard.parts if layer.tensor_shard else 1
            count += layer.in_features * layer.out_features * parts
    return count
