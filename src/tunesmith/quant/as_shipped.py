"""Frozen linear layers that keep the codes and scales which a checkpoint ships: FP8.

A weight is e4m3 codes, and a scale for each block of them or one of all (`model/shipped.py`). It is
made dense for one product at a time, in the forward and again in the backward: in memory is what is
on the disk, and it computes what the dense weight computes.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import ModelError
from tunesmith.model.names import names_on_disk
from tunesmith.model.shipped import ShippedForm
from tunesmith.model.weights import ScaledTensor, StoredTensor
from tunesmith.quant.frozen_linear import FrozenLinear, linear_names
from tunesmith.quant.frozen_weight import FrozenWeight, ShippedEncoding, ShippedWeight
from tunesmith.quant.scaled_matmul import E4M3, E4M3_MAX, LEAST_SCALE


class ShippedLinear(FrozenLinear):
    """A linear layer with W in fp8 as its checkpoint has it; empty until `load`.

    Attributes (frozen):
        form: of the checkpoint.
        weight: uint8 [out_features, in_features], the e4m3 codes: torch and FSDP move integers as
            they are.
        scale: fp32, one for each block, [block rows, block columns], or [1, 1]; whole on every
            rank. Not persistent: a checkpoint of the base holds dense weights.
    """

    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        form: ShippedForm,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias = bias
        self.form = form
        self.compute_dtype = compute_dtype
        self.encoding = str(ShippedEncoding(*(form.block or (0, 0))))
        self.allocate(torch.device("meta"))

    def allocate(self, device: torch.device) -> None:
        codes = torch.empty(self.out_features, self.in_features, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        shape = self.form.scale_shape(self.out_features, self.in_features) or (1, 1)
        self.register_buffer("scale", torch.empty(shape, device=device), persistent=False)

    def share(self, other: "ShippedLinear") -> None:
        """Store the very tensors of another layer of the same shape."""
        self.weight = other.weight
        self.bias = other.bias
        self.register_buffer("scale", other.scale, persistent=False)

    @torch.no_grad()
    def load(self, stored: Mapping[str, StoredTensor | Tensor], name: str) -> None:
        weight = stored[""]
        if isinstance(weight, Tensor):
            self._round(weight)  # one that was drawn
            return
        if not isinstance(weight, ScaledTensor):
            raise ModelError(
                "its weight is stored without scales",
                where=name,
                why=f"config.json says that it is in {self.form.describe()}",
                fix="name its module in quantization_config.modules_to_not_convert of config.json,"
                " or model.quantize=none",
            )
        if weight.shape != self._shape:
            what = f"it is stored as {list(weight.shape)}, and {list(self._shape)} is needed"
            raise ModelError(what, where=name, fix="fetch the model again: tunesmith fetch MODEL")
        self.scale.copy_(weight.scales)
        weight.codes.into_part(self.weight)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _round(self, dense: Tensor) -> None:
        """Store a dense weight, each block scaled to the largest code."""
        block = self.form.block or self._shape
        self.scale.copy_(block_scales(dense.float(), block))
        rows = local_slices(self.weight)[0]
        scale = spread_blocks(self.scale, block, dense.shape)[rows]
        codes = (dense[rows].float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
        local_part(self.weight).copy_(codes.view(torch.uint8))

    def frozen_weight(self) -> FrozenWeight:
        codes = local_part(self.weight).view(E4M3)
        return ShippedWeight(self.encoding, [codes, self.scale], self._shape)


def block_scales(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """The scale of each block of a weight [out, in]: its largest value has the largest code."""
    height, width = block
    rows, columns = weight.shape
    whole = F.pad(weight.abs(), (0, -columns % width, 0, -rows % height))
    blocks = whole.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    return (blocks.amax((1, 3)) / E4M3_MAX).clamp_(min=LEAST_SCALE)


def spread_blocks(scales: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """The scale of each weight, of the scales of blocks: [*shape]."""
    height, width = block
    of_columns = scales.repeat_interleave(width, 1)[:, : shape[1]]
    return of_columns.repeat_interleave(height, 0)[: shape[0]]


def replace_shipped(model: nn.Module, form: ShippedForm, compute_dtype: torch.dtype) -> list[str]:
    """Replace every linear layer of a model on meta that its checkpoint has in codes by an empty
    `ShippedLinear` of its shape. The output layer stays dense.

    Returns their names.
    """
    names = []
    for name in linear_names(model, head=False):
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        if not has_codes(form, model, name):
            continue
        layer = ShippedLinear(
            dense.in_features, dense.out_features, dense.bias, form, compute_dtype
        )
        model.set_submodule(name, layer)
        names.append(name)
    return names


def has_codes(form: ShippedForm, model: nn.Module, name: str) -> bool:
    """Whether the checkpoint has the weight of a module in codes, as its config.json says."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    patterns = list(form.not_converted)
    return all(should_convert_module(word, patterns) for word in names_on_disk(model, name))
