"""Frozen stacks of experts that keep the codes and scales which a checkpoint ships: MXFP4, FP8 and
NVFP4.

As `as_shipped` is for linear layers: in memory is what is on the disk, dequantized for some experts
at a time. MXFP4 (gpt-oss) has the experts of a layer in one tensor. FP8 and NVFP4 have them one by
one, which are joined here as Transformers does (gate over up).
"""

import re
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.model.fp4 import encode_mxfp4, encode_nvfp4, nvfp4_scale
from tunesmith.model.names import names_on_disk
from tunesmith.model.shipped import NVFP4_GROUP, ShippedForm
from tunesmith.model.shipped_entries import GROUP, GROUP_BYTES
from tunesmith.model.weights import (
    DecodedTensor,
    JoinedTensor,
    Nvfp4Tensor,
    PackedTensor,
    ScaledTensor,
    StoredTensor,
)
from tunesmith.quant.as_shipped import (
    block_scales,
    has_codes,
    nvfp4_encoding,
    spread_blocks,
    stored_nvfp4_scale,
    without_scales,
)
from tunesmith.quant.expert_stack import ExpertStack
from tunesmith.quant.experts import replace_stacks, stack_names
from tunesmith.quant.frozen_stack import Mxfp4Stack, Nvfp4Stack, ShippedStack
from tunesmith.quant.frozen_weight import ShippedEncoding
from tunesmith.quant.scaled_matmul import E4M3, E4M3_MAX

MXFP4 = ShippedForm("mxfp4")


class Mxfp4Experts(ExpertStack):
    """A stack of experts in MXFP4; [experts, in, out] when dense.

    Attributes (frozen):
        blocks: uint8 [experts, out, groups, 16], two codes a byte.
        exponents: uint8 [experts, out, groups]. A parameter too: it is a sixteenth of the blocks.
    """

    encoding = "mxfp4"

    def allocate(self, device: torch.device) -> None:
        experts, in_features, out_features = self.shape
        groups = in_features // GROUP
        shape = (experts, out_features, groups)
        blocks = torch.empty(*shape, GROUP_BYTES, dtype=torch.uint8, device=device)
        exponents = torch.empty(shape, dtype=torch.uint8, device=device)
        self.blocks = nn.Parameter(blocks, requires_grad=False)
        self.exponents = nn.Parameter(exponents, requires_grad=False)

    @torch.no_grad()
    def store(self, weight: StoredTensor | Tensor, first: int = 0) -> None:
        span = local_slices(self.blocks)[0]
        blocks = local_part(self.blocks)
        exponents = local_part(self.exponents)
        if isinstance(weight, Tensor):  # one that was drawn
            for place, expert in enumerate(range(first + span.start, first + span.stop)):
                blocks[place], exponents[place] = encode_mxfp4(weight[expert].T)
            return
        if not isinstance(weight, PackedTensor):
            raise without_scales(weight.name, MXFP4, "these experts are")
        expert = first + span.start
        # One run of the file each, straight into its place.
        weight.blocks.into(blocks, expert * weight.blocks.shape[1:].numel())
        weight.exponents.into(exponents, expert * weight.exponents.shape[1:].numel())
        for place, of_expert in enumerate(exponents):
            weight.check_exponents(of_expert, expert + place)

    def frozen_stack(self) -> Mxfp4Stack:
        tensors = [local_part(self.blocks), local_part(self.exponents)]
        return Mxfp4Stack(self.encoding, tensors, self.shape)


class ShippedExperts(ExpertStack):
    """A stack of experts that a checkpoint has one by one; [experts, out, in] when dense.

    Attributes (frozen):
        form: of the checkpoint.
        parts: that an expert is stored in, one over the other.
        stored_class: of what the checkpoint has of a part.
        codes: uint8, experts first.
        scales: of each part of an expert.
    """

    stored_class: ClassVar[type[DecodedTensor]]
    codes: nn.Parameter
    scales: Tensor

    def __init__(
        self, stored_shape: torch.Size, *, form: ShippedForm, parts: int, compute_dtype: torch.dtype
    ) -> None:
        self.form = form
        self.parts = parts
        super().__init__(stored_shape, is_transposed=False, compute_dtype=compute_dtype)

    @torch.no_grad()
    def store(self, weight: StoredTensor | Tensor, first: int = 0) -> None:
        experts, out_features, _ = self.stored_shape
        height = out_features // self.parts
        if isinstance(weight, Tensor):  # one that was drawn
            for expert in range(experts):
                for part, dense in enumerate(weight[first + expert].float().split(height)):
                    self._round(dense, expert, part)
            return
        if not isinstance(weight, JoinedTensor):
            raise without_scales(weight.name, self.form, "these experts are")
        for piece, stored in weight.pieces(slice(first, first + experts)):
            if not isinstance(stored, self.stored_class):
                raise without_scales(stored.name, self.form, "an expert is")
            of_expert, rows, _ = piece.region
            self._take(stored, of_expert.start - first, rows.start // height)

    @abstractmethod
    def _take(self, stored: Any, expert: int, part: int) -> None:
        """Read codes and scales of a part, of `stored_class`, if this rank holds the expert."""

    @abstractmethod
    def _round(self, dense: Tensor, expert: int, part: int) -> None:
        """Store a dense part, fp32 [out / parts, in], if this rank holds the expert."""

    def _local_rows(self, codes: Tensor, expert: int, part: int) -> Tensor | None:
        """This rank's rows of a part in `codes` [experts, out, ...]; None: another has them."""
        span = local_slices(codes)[0]
        if not span.start <= expert < span.stop:
            return None
        height = codes.shape[1] // self.parts
        return local_part(codes)[expert - span.start, part * height : (part + 1) * height]


class Fp8Experts(ShippedExperts):
    """`ShippedExperts` in FP8.

    Attributes (frozen):
        codes: uint8 [experts, out, in], e4m3 values: torch and FSDP move integers as they are.
        scales: fp32 [experts, parts, block rows, block columns], or with one column where each row
            has one, [..., 1, 1] where a part shares it; whole on every rank.
    """

    stored_class = ScaledTensor

    def allocate(self, device: torch.device) -> None:
        self.encoding = str(ShippedEncoding(*(self.form.block or (0, 0))))
        experts, out_features, in_features = self.stored_shape
        codes = torch.empty(self.stored_shape, dtype=torch.uint8, device=device)
        self.codes = nn.Parameter(codes, requires_grad=False)
        blocks = self.form.scale_shape(out_features // self.parts, in_features)
        scales = torch.empty(experts, self.parts, *blocks, device=device)
        # Not persistent: a checkpoint of the base holds dense weights.
        self.register_buffer("scales", scales, persistent=False)

    def _take(self, stored: ScaledTensor, expert: int, part: int) -> None:
        self.scales[expert, part] = stored.scales
        codes = self._local_rows(self.codes, expert, part)
        if codes is not None:
            stored.codes.into(codes)

    def _round(self, dense: Tensor, expert: int, part: int) -> None:
        # Each block scaled to the largest code.
        block = self.form.block_of(dense.shape[0], dense.shape[1])
        scales = block_scales(dense, block)
        self.scales[expert, part] = scales
        codes = self._local_rows(self.codes, expert, part)
        if codes is not None:
            scaled = dense / spread_blocks(scales, block, dense.shape)
            codes.copy_(scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3).view(torch.uint8))

    def frozen_stack(self) -> ShippedStack:
        codes = local_part(self.codes).view(E4M3)
        return ShippedStack(self.encoding, [codes, self.scales], self.shape)


class Nvfp4Experts(ShippedExperts):
    """`ShippedExperts` in NVFP4.

    Attributes (frozen):
        codes: uint8 [experts, out, in / 2], two a byte.
        group_scales: uint8 [experts, out, in / 16], in e4m3. A parameter too: it is an eighth of
            the codes.
        scales: fp32 [experts, parts]; whole on every rank.
    """

    stored_class = Nvfp4Tensor
    group_scales: nn.Parameter

    def allocate(self, device: torch.device) -> None:
        self.encoding = str(nvfp4_encoding(self.form))
        experts, out_features, in_features = self.stored_shape
        for name, share in (("codes", 2), ("group_scales", NVFP4_GROUP)):
            shape = (experts, out_features, in_features // share)
            tensor = torch.empty(shape, dtype=torch.uint8, device=device)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        scales = torch.empty(experts, self.parts, device=device)
        self.register_buffer("scales", scales, persistent=False)

    def _take(self, stored: Nvfp4Tensor, expert: int, part: int) -> None:
        self.scales[expert, part] = stored.scale.squeeze()
        codes = self._local_rows(self.codes, expert, part)
        scales = self._local_rows(self.group_scales, expert, part)
        if codes is not None and scales is not None:
            stored.codes.into(codes)
            stored.scales.into(scales)
            stored.check_scales(scales)

    def _round(self, dense: Tensor, expert: int, part: int) -> None:
        scale = nvfp4_scale(dense.abs().max().item())
        self.scales[expert, part] = stored_nvfp4_scale(scale, self.form)
        codes = self._local_rows(self.codes, expert, part)
        scales = self._local_rows(self.group_scales, expert, part)
        if codes is not None and scales is not None:
            packed, of_groups = encode_nvfp4(dense, scale)
            codes.copy_(packed)
            scales.copy_(of_groups.view(torch.uint8))

    def frozen_stack(self) -> Nvfp4Stack:
        scales = local_part(self.group_scales).view(E4M3)
        return Nvfp4Stack(self.encoding, [local_part(self.codes), scales, self.scales], self.shape)


def replace_shipped_stacks(
    model: nn.Module, form: ShippedForm, compute_dtype: torch.dtype
) -> list[str]:
    """Replace the stacks of experts that a checkpoint has in codes by empty ones of their shapes.

    Returns their names. Stacks stored as the form is not (MXFP4 as [experts, out, in], FP8 and
    NVFP4 as [experts, in, out]) stay dense.
    """

    def empty(name: str, module: nn.Module, weight: Tensor) -> ExpertStack | None:
        transposed = bool(module.is_transposed)
        if not _have_codes(form, model, name):
            return None
        if form.method == "mxfp4":
            if not transposed:
                return None
            return Mxfp4Experts(weight.shape, is_transposed=True, compute_dtype=compute_dtype)
        if transposed:
            return None
        first, _ = stack_names(module)
        parts = 2 if module.has_gate and weight is getattr(module, first) else 1
        stack_class = Fp8Experts if form.method == "fp8" else Nvfp4Experts
        return stack_class(weight.shape, form=form, parts=parts, compute_dtype=compute_dtype)

    return replace_stacks(model, empty)


def _have_codes(form: ShippedForm, model: nn.Module, name: str) -> bool:
    """As `has_codes`, for all experts of a layer."""
    first = f"{name}.0"
    if not has_codes(form, model, name) or not has_codes(form, model, first):
        return False
    # A list may have the layers of each expert.
    prefixes = tuple(re.escape(f"{word}.") for word in names_on_disk(model, first))
    return not any(pattern.startswith(prefixes) for pattern in form.not_converted)
