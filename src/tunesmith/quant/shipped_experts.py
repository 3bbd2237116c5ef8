"""Frozen stacks of experts that keep the codes and scales which a checkpoint ships: MXFP4 and FP8.

As `as_shipped` is for linear layers: in memory is what is on the disk, made dense for some experts
at a time. MXFP4 (gpt-oss) has the experts of a layer in one tensor. FP8 has them one by one, which
are put together here as Transformers does (gate over up).
"""

import torch
from torch import Tensor, nn

from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import ModelError
from tunesmith.model.fp4 import encode_mxfp4
from tunesmith.model.shipped import GROUP, GROUP_BYTES, ShippedForm
from tunesmith.model.weights import JoinedTensor, PackedTensor, ScaledTensor, StoredTensor
from tunesmith.quant.as_shipped import block_scales, has_codes, spread_blocks
from tunesmith.quant.expert_stack import ExpertStack
from tunesmith.quant.experts import replace_stacks, stack_names
from tunesmith.quant.frozen_stack import Mxfp4Stack, ShippedStack
from tunesmith.quant.frozen_weight import ShippedEncoding
from tunesmith.quant.scaled_matmul import E4M3, E4M3_MAX

UNCONVERTED = (
    "name its module in quantization_config.modules_to_not_convert of config.json,"
    " or model.quantize=none"
)


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
            raise _without_scales(weight.name, "MXFP4")
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
    """A stack of experts in FP8; [experts, out, in] when dense.

    Attributes (frozen):
        form: of the checkpoint.
        parts: that an expert is stored in, one over the other.
        codes: uint8 [experts, out, in], e4m3 values: torch and FSDP move integers as they are.
        scales: fp32 [experts, parts, block rows, block columns], or [experts, parts, 1, 1]; whole
            on every rank.
    """

    scales: Tensor

    def __init__(
        self, stored_shape: torch.Size, *, form: ShippedForm, parts: int, compute_dtype: torch.dtype
    ) -> None:
        self.form = form
        self.parts = parts
        self.encoding = str(ShippedEncoding(*(form.block or (0, 0))))
        super().__init__(stored_shape, is_transposed=False, compute_dtype=compute_dtype)

    def allocate(self, device: torch.device) -> None:
        experts, out_features, in_features = self.stored_shape
        codes = torch.empty(self.stored_shape, dtype=torch.uint8, device=device)
        self.codes = nn.Parameter(codes, requires_grad=False)
        blocks = self.form.scale_shape(out_features // self.parts, in_features) or (1, 1)
        scales = torch.empty(experts, self.parts, *blocks, device=device)
        # Not persistent: a checkpoint of the base holds dense weights.
        self.register_buffer("scales", scales, persistent=False)

    @torch.no_grad()
    def store(self, weight: StoredTensor | Tensor, first: int = 0) -> None:
        if isinstance(weight, Tensor):
            self._round(weight, first)  # one that was drawn
            return
        if not isinstance(weight, JoinedTensor):
            raise _without_scales(weight.name, self.form.describe())
        experts, out_features, _ = self.stored_shape
        height = out_features // self.parts
        span = local_slices(self.codes)[0]
        codes = local_part(self.codes)
        for piece, stored in weight.pieces(slice(first, first + experts)):
            if not isinstance(stored, ScaledTensor):
                raise _without_scales(stored.name, self.form.describe())
            of_expert, rows, _ = piece.region
            expert = of_expert.start - first
            self.scales[expert, rows.start // height] = stored.scales
            if span.start <= expert < span.stop:
                stored.codes.into(codes[expert - span.start, rows])

    def _round(self, dense: Tensor, first: int) -> None:
        """Store a dense stack, each block scaled to the largest code."""
        experts, out_features, in_features = self.stored_shape
        height = out_features // self.parts
        block = self.form.block or (height, in_features)
        span = local_slices(self.codes)[0]
        for expert in range(experts):
            for part, weight in enumerate(dense[first + expert].float().split(height)):
                scales = block_scales(weight, block)
                self.scales[expert, part] = scales
                if span.start <= expert < span.stop:
                    scaled = weight / spread_blocks(scales, block, weight.shape)
                    codes = scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3).view(torch.uint8)
                    rows = slice(part * height, (part + 1) * height)
                    local_part(self.codes)[expert - span.start, rows] = codes

    def frozen_stack(self) -> ShippedStack:
        codes = local_part(self.codes).view(E4M3)
        return ShippedStack(self.encoding, [codes, self.scales], self.shape)


def _without_scales(name: str, form: str) -> ModelError:
    return ModelError(
        "these experts are stored without scales",
        where=name,
        why=f"config.json says that they are in {form}",
        fix=UNCONVERTED,
    )


def replace_shipped_stacks(
    model: nn.Module, form: ShippedForm, compute_dtype: torch.dtype
) -> list[str]:
    """Replace the stacks of experts that a checkpoint has in codes by empty ones of their shapes.

    Returns their names. Stacks stored as the form is not (MXFP4 as [experts, out, in], FP8 as
    [experts, in, out]) stay dense.
    """

    def empty(name: str, module: nn.Module, weight: Tensor) -> ExpertStack | None:
        transposed = bool(module.is_transposed)
        # All experts of a layer, and one of them.
        if not all(has_codes(form, model, whole) for whole in (name, f"{name}.0")):
            return None
        if form.method == "mxfp4":
            if not transposed:
                return None
            return Mxfp4Experts(weight.shape, is_transposed=True, compute_dtype=compute_dtype)
        if transposed:
            return None
        first, _ = stack_names(module)
        parts = 2 if module.has_gate and weight is getattr(module, first) else 1
        return ShippedExperts(weight.shape, form=form, parts=parts, compute_dtype=compute_dtype)

    return replace_stacks(model, empty)
