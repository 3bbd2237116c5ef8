"""Frozen linear layers that keep the codes and scales which a checkpoint ships: FP8 and NVFP4.

`model/shipped_entries.py` has what they are. A weight is dequantized for one product at a time, in
the forward and again in the backward: in memory is what is on the disk, and it computes what the
dense weight computes.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import ModelError
from tunesmith.model.fp4 import encode_nvfp4, nvfp4_scale
from tunesmith.model.names import names_on_disk
from tunesmith.model.shipped import AS_SHIPPED, FETCH, NVFP4_GROUP, ShippedForm
from tunesmith.model.weights import DecodedTensor, Nvfp4Tensor, ScaledTensor, StoredTensor
from tunesmith.quant.frozen_linear import FrozenLinear, linear_names
from tunesmith.quant.frozen_weight import (
    FrozenWeight,
    Nvfp4Encoding,
    Nvfp4Weight,
    ShippedEncoding,
    ShippedWeight,
)
from tunesmith.quant.scaled_matmul import E4M3, E4M3_MAX, LEAST_SCALE


class ShippedLinear(FrozenLinear):
    """A linear layer with W as its checkpoint has it; empty until `load`.

    Attributes (frozen):
        form: of the checkpoint.
        stored_class: of what the checkpoint has of W.
        weight: uint8, the codes.
        scale: fp32; whole on every rank. Not persistent: a checkpoint of the base holds dense
            weights.
    """

    stored_class: ClassVar[type[DecodedTensor]]
    weight: nn.Parameter
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
        self.allocate(torch.device("meta"))

    def share(self, other: "ShippedLinear") -> None:
        """Store the very tensors of another layer of the same class and shape."""
        for name, parameter in other.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.register_buffer("scale", other.scale, persistent=False)

    @torch.no_grad()
    def load(self, stored: Mapping[str, StoredTensor | Tensor], name: str) -> None:
        weight = stored[""]
        if isinstance(weight, Tensor):
            self._round(weight)  # one that was drawn
            return
        if not isinstance(weight, self.stored_class):
            raise without_scales(name, self.form, "its weight is")
        if weight.shape != self._shape:
            what = f"it is stored as {list(weight.shape)}, and {list(self._shape)} is needed"
            raise ModelError(what, where=name, fix=FETCH)
        self._take(weight)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @abstractmethod
    def _take(self, stored: Any) -> None:
        """Read the codes and scales of a weight, of `stored_class`."""

    @abstractmethod
    def _round(self, dense: Tensor) -> None:
        """Store a dense weight in the form of the checkpoint."""


class Fp8Linear(ShippedLinear):
    """A `ShippedLinear` in FP8.

    Attributes (frozen):
        weight: uint8 [out_features, in_features], the e4m3 codes: torch and FSDP move integers as
            they are.
        scale: one for each block, [block rows, block columns]; [out_features, 1] where each row has
            one, [1, 1] where all share it.
    """

    stored_class = ScaledTensor

    def allocate(self, device: torch.device) -> None:
        self.encoding = str(ShippedEncoding(*(self.form.block or (0, 0))))
        codes = torch.empty(self.out_features, self.in_features, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        shape = self.form.scale_shape(self.out_features, self.in_features)
        self.register_buffer("scale", torch.empty(shape, device=device), persistent=False)

    def _take(self, stored: ScaledTensor) -> None:
        self.scale.copy_(stored.scales)
        stored.codes.into_part(self.weight)

    def _round(self, dense: Tensor) -> None:
        # Each block scaled to the largest code.
        block = self.form.block_of(*self._shape)
        self.scale.copy_(block_scales(dense.float(), block))
        rows = local_slices(self.weight)[0]
        scale = spread_blocks(self.scale, block, dense.shape)[rows]
        codes = (dense[rows].float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
        local_part(self.weight).copy_(codes.view(torch.uint8))

    def frozen_weight(self) -> FrozenWeight:
        codes = local_part(self.weight).view(E4M3)
        return ShippedWeight(self.encoding, [codes, self.scale], self._shape)


class Nvfp4Linear(ShippedLinear):
    """A `ShippedLinear` in NVFP4.

    Attributes (frozen):
        weight: uint8 [out_features, in_features / 2], two codes a byte.
        weight_scales: uint8 [out_features, in_features / 16], in e4m3. A parameter too: it is an
            eighth of the codes.
        scale: [1, 1], of all.
    """

    stored_class = Nvfp4Tensor
    weight_scales: nn.Parameter

    def allocate(self, device: torch.device) -> None:
        self.encoding = str(nvfp4_encoding(self.form))
        for name, share in (("weight", 2), ("weight_scales", NVFP4_GROUP)):
            shape = (self.out_features, self.in_features // share)
            tensor = torch.empty(shape, dtype=torch.uint8, device=device)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_buffer("scale", torch.empty(1, 1, device=device), persistent=False)

    def _take(self, stored: Nvfp4Tensor) -> None:
        self.scale.copy_(stored.scale)
        stored.codes.into_part(self.weight)
        stored.scales.into_part(self.weight_scales)
        stored.check_scales(local_part(self.weight_scales))

    def _round(self, dense: Tensor) -> None:
        scale = nvfp4_scale(dense.abs().max().item())
        self.scale.fill_(stored_nvfp4_scale(scale, self.form))
        codes, scales = encode_nvfp4(dense[local_slices(self.weight)[0]], scale)
        local_part(self.weight).copy_(codes)
        local_part(self.weight_scales).copy_(scales.view(torch.uint8))

    def frozen_weight(self) -> FrozenWeight:
        scales = local_part(self.weight_scales).view(E4M3)
        tensors = [local_part(self.weight), scales, self.scale]
        return Nvfp4Weight(self.encoding, tensors, self._shape)


def nvfp4_encoding(form: ShippedForm) -> Nvfp4Encoding:
    """How a checkpoint in NVFP4 puts its scales together."""
    assert form.names is not None
    return Nvfp4Encoding(form.names.divides)


def stored_nvfp4_scale(scale: float, form: ShippedForm) -> float:
    """What a checkpoint has for a scale that groups' scales are divided by."""
    return scale if nvfp4_encoding(form).divides else 1 / scale


def without_scales(name: str, form: ShippedForm, what: str) -> ModelError:
    """The error for a plain weight called `name` where `form` says that it is in codes."""
    return ModelError(
        f"{what} stored without scales",
        where=name,
        why=f"config.json says that it is in {form.describe()}",
        fix=f"name its module in quantization_config.{form.plain_key} of config.json,"
        " or model.quantize=none",
    )


def check_plain(model: nn.Module, names: Sequence[str], form: ShippedForm | None) -> None:
    """ModelError where layers of a model that fp8 is to round ship in codes.

    Args:
        names: of these layers.
        form: of the checkpoint; None: it is plain. Of MXFP4 experts alone are in codes.
    """
    if form is None or form.method == "mxfp4":
        return
    for name in names:
        if has_codes(form, model, name):
            raise ModelError(
                f"model.quantize is fp8, but this base ships in {form.describe()}",
                where=f"{name}.weight",
                why="fp8 rounds plain weights",
                fix=f"model.quantize={AS_SHIPPED}, or model.quantize=none",
            )


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
        layer_class = Fp8Linear if form.method == "fp8" else Nvfp4Linear
        layer = layer_class(dense.in_features, dense.out_features, dense.bias, form, compute_dtype)
        model.set_submodule(name, layer)
        names.append(name)
    return names


def has_codes(form: ShippedForm, model: nn.Module, name: str) -> bool:
    """Whether the checkpoint has the weight of a module in codes, as its config.json says."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = names_on_disk(model, name)
    if form.has_expressions:
        return all(form.has_codes(word) for word in names)
    patterns = list(form.not_converted)
    return all(should_convert_module(word, patterns) for word in names)
