"""Frozen weights in NF4, the 4-bit format of QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

The tensors have bitsandbytes' format: 4-bit codes in blocks of 64 weights, one scale per block, and
the scales in 8 bits (double quantization). bitsandbytes' own layer is not used, because on some
CPUs it repacks its weight in the forward. Each expert of a stack is quantized separately, like a
linear layer. The codes of an expert are therefore the same, whether a rank has all experts or only
some of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.distributed.torch_private import collective, local_slices
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import MachineError, ModelError, first_line
from tunesmith.formats.base import (
    Format,
    Forms,
    FrozenStack,
    FrozenWeight,
    TensorForm,
    max_over_ranks,
)
from tunesmith.formats.stored import Stored, StoredParts, whole_slices
from tunesmith.host import packages
from tunesmith.units import ceil_div

if TYPE_CHECKING:  # these modules import the formats
    from tunesmith.formats.linear import FrozenLinear
    from tunesmith.formats.stack import ExpertStack

NF4_BLOCK = 64  # number of weights that share a scale
NESTED_BLOCK = 256  # number of scales that share a second scale
WEIGHTS_PER_BYTE = 2
# Maximum number of weights that are quantized in one step. bitsandbytes' CPU code takes about 20
# bytes per weight.
MAX_NF4_ROUNDED_WEIGHTS = 1 << 21
# Maximum number of rows for which bitsandbytes dequantizes inside the matmul kernel. Dequantization
# in a separate kernel would read and write nine times as many bytes.
MAX_FUSED_ROWS = 16


def nf4_functions() -> Any:
    """Return `bitsandbytes.functional`.

    Raise a MachineError with the install command if it is missing.
    """
    return packages.bnb_functional("nf4 weights", "model.quantize")


@torch.no_grad()
def check_nf4(device: torch.device) -> None:
    """Raise MachineError unless a small weight can be quantized and dequantized on this device.

    Call this before a model is downloaded or loaded. A wheel of bitsandbytes supports only some
    versions of CUDA, and an unsupported version causes an error only at the first call.
    """
    functional = nf4_functions()
    weights = torch.ones(NF4_BLOCK, NF4_BLOCK, device=device, dtype=torch.bfloat16)
    try:
        codes, state = functional.quantize_4bit(weights, blocksize=NF4_BLOCK, quant_type="nf4")
        quantize_scales(state.absmax)
        functional.dequantize_4bit(codes, state)
    except RuntimeError as error:
        raise MachineError(
            f"the installed bitsandbytes has no nf4 for {device.type}",
            where="model.quantize",
            why=first_line(error),
            fix="run `pip install --upgrade bitsandbytes`, or set model.quantize=none; "
            "`python -m bitsandbytes` shows more",
        ) from error


class Nf4(Format):
    """NF4 format. n is the number of weights of the matrix. For experts, n is rounded up to
    complete blocks. The tensors are:

        weight: uint8 [(n + 1) // 2, 1] or [experts, n / 2], two codes per byte.
        absmax: the scale of each block of 64 weights: uint8 [blocks] with double quantization, else
            fp32 [blocks].
        code: fp32 [16], the value of each 4-bit code.
        nested_absmax: fp32 [ceil(blocks / 256)], only with double quantization.
        nested_code: fp32 [256], only with double quantization.
        nested_offset: fp32 [], only with double quantization.

    For experts, all tensors except code and nested_code have the experts as first dimension. If a
    layer is sharded by tensor parallelism, each shard consists of complete blocks of 64 weights.

    Attributes:
        dtype: dtype of the weight before its quantization.
        block: number of weights that share a scale.
        nested_block: number of scales that share a second scale. 0 means that the scales are fp32.
    """

    name = "nf4"
    rounds = True

    def __init__(
        self, dtype: torch.dtype, block: int = NF4_BLOCK, nested_block: int = NESTED_BLOCK
    ) -> None:
        super().__init__(str(dtype), block, nested_block)
        self.dtype = dtype
        self.block = block
        self.nested_block = nested_block

    def matrix_forms(self, rows: int, columns: int) -> Forms:
        count = rows * columns
        blocks = ceil_div(count, self.block)
        codes = (ceil_div(count, WEIGHTS_PER_BYTE), 1)
        forms = {"weight": TensorForm(codes, torch.uint8, is_shared=True)}

        # The buffers are not persistent, because a dense checkpoint does not contain them. The code
        # that loads the checkpoint would otherwise report them as missing.
        forms["absmax"] = TensorForm((blocks,))
        forms["code"] = TensorForm((16,))
        if self.nested_block:
            forms["absmax"] = TensorForm((blocks,), torch.uint8)
            forms["nested_absmax"] = TensorForm((ceil_div(blocks, self.nested_block),))
            forms["nested_code"] = TensorForm((256,))
            forms["nested_offset"] = TensorForm(())
        return forms

    def stack_forms(self, experts: int, rows: int, columns: int, parts: int) -> Forms:
        blocks = ceil_div(rows * columns, self.block)
        forms = self.matrix_forms(blocks, self.block)
        codes = (experts, blocks * self.block // WEIGHTS_PER_BYTE)
        forms["weight"] = TensorForm(codes, torch.uint8, is_shared=True)
        for name in ("absmax", "nested_absmax", "nested_offset"):
            forms[name] = forms[name]._replace(shape=(experts, *forms[name].shape))
        return forms

    # ---- decode

    def decode(self, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        return self._decode_codes(weight.tensors, weight.shape).to(dtype)

    def _decode_codes(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
        """Return the weights [rows, columns] in `self.dtype`.

        Args:
            tensors: those of `matrix_forms`. They have no `nested_...` if the scales are fp32.
        """
        codes, scales, code, *nested = tensors
        if _has_kernel(codes):
            return self._decode_by_kernel(codes, scales, code, nested, shape)
        dense: Tensor = nf4_functions().dequantize_4bit(codes, self._quant_state(tensors, shape))
        return dense

    def _decode_by_kernel(
        self,
        codes: Tensor,
        scales: Tensor,
        values: Tensor,
        nested: Sequence[Tensor],
        shape: tuple[int, int],
    ) -> Tensor:
        from tunesmith.formats import nf4_kernel  # only torch for CUDA includes Triton

        dense = torch.empty(shape, dtype=self.dtype, device=codes.device)
        sizes = {"block": self.block, "nested_block": self.nested_block}
        nf4_kernel.decode_nf4(codes, scales, values, nested, dense, **sizes)
        return dense

    def few_rows_matmul(self, weight: FrozenWeight, x: Tensor) -> Tensor | None:
        if len(x) > MAX_FUSED_ROWS:
            return None
        from bitsandbytes import matmul_4bit

        state = self._quant_state(weight.tensors, weight.shape)
        product: Tensor = matmul_4bit(x, weight.tensors[0], state)
        return product

    def _quant_state(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Any:
        """Return bitsandbytes' QuantState, which describes the codes."""
        _, absmax, code, *nested = tensors
        offset = None
        state2 = None
        if nested:
            nested_absmax, nested_code, offset = nested
            state2 = nested_state(nested_absmax, nested_code, self.nested_block)
        return nf4_functions().QuantState(
            absmax,
            shape=torch.Size(shape),
            code=code,
            blocksize=self.block,
            quant_type="nf4",
            dtype=self.dtype,
            offset=offset,
            state2=state2,
        )

    def decode_experts(self, stack: FrozenStack, experts: slice, dtype: torch.dtype) -> Tensor:
        # Scale of each block of the experts: fp32 [experts, blocks].
        codes, absmax, code, nested_absmax, nested_code, nested_offset = stack.tensors
        scales = nested_code[absmax[experts].int()]
        nested_scales = nested_absmax[experts].repeat_interleave(self.nested_block, 1)
        scales.mul_(nested_scales[:, : scales.shape[1]])
        scales = scales.add_(nested_offset[experts, None])
        count, blocks = scales.shape
        # Dequantize all experts in one call. This is possible because no block contains weights of
        # two experts.
        tensors = [codes[experts].reshape(-1, 1), scales.flatten(), code]
        weights = self._decode_codes(tensors, (count, blocks * self.block))
        # Remove the padding in the last block of each expert.
        weights = weights.to(dtype)[:, : math.prod(stack.matrix)]
        return weights.unflatten(1, stack.matrix)

    # ---- a matrix

    def load_matrix(self, layer: FrozenLinear, stored: StoredParts, name: str) -> None:
        if len(stored) == 1:
            self.quantize(layer, stored[""])
            return

        parts = {}
        for suffix, part in stored.items():
            tensor = part if isinstance(part, Tensor) else part.read()
            # Copy the tensor to the device of the matmuls, because a shard may be on the host.
            parts[suffix] = tensor.to(layer.get_buffer("absmax").device)
        self.load_quantized(layer, parts, where=name)

    @torch.no_grad()
    def quantize(self, layer: FrozenLinear, dense: Stored) -> None:
        """Quantize and store the entire layer's `dense` [out_features, in_features].

        The weight is rounded to the compute dtype first, as Transformers does. A rank reads and
        quantizes only its own blocks. This is a collective call if the layer is sharded, because
        the scales of all blocks are quantized together. If the scales of a tensor-parallel shard
        are not complete contiguous groups of 256, they are stored in fp32 (4.5 bits per weight
        instead of 4.13).
        """
        device = layer.get_buffer("absmax").device
        width = layer.in_features
        # The codes are one sequence of bytes, which FSDP2 splits into equal parts regardless of the
        # rows.
        codes = local_part(layer.weight).view(-1)
        local_bytes = local_slices(layer.weight)[0]
        # Scales of the blocks of this shard. They are 0 for blocks on other ranks.
        scales = torch.zeros(ceil_div(layer.out_features * width, NF4_BLOCK), device=device)
        for rows in _pieces_of_rows(layer, local_bytes):
            weights = layer.part_of(dense, rows).flatten().to(device, self.dtype)
            _quantize_piece(weights, rows.start * width, codes, local_bytes, scales)

        scales = _gather_scales(layer, scales, dense.shape)
        self._quantize_scales(layer, scales, rows=dense.shape[0])

    def _quantize_scales(self, layer: FrozenLinear, scales: Tensor, rows: int) -> None:
        """Quantize the scales of the entire layer to 8 bits, and store this rank's part.

        Args:
            scales: scales of the entire layer, fp32 [blocks].
            rows: number of rows of the entire layer.
        """
        functional = nf4_functions()
        code = functional.get_4bit_type("nf4", device=scales.device)
        absmax, nested_absmax, nested_code, offset = quantize_scales(scales)

        nested_block = NESTED_BLOCK
        shard = layer.tensor_shard
        if shard is not None:
            # A shard of rows has contiguous scales. If they are complete groups of 256, the scales
            # and the scales of the groups can be split in the same way.
            has_whole_blocks = len(absmax) // shard.parts % NESTED_BLOCK == 0
            if shard.dim == 0 and has_whole_blocks:
                absmax = absmax.chunk(shard.parts)[shard.part].clone()
                nested_absmax = nested_absmax.chunk(shard.parts)[shard.part].clone()
            else:
                # Groups cannot be split for a shard of columns, or for rows that end within a
                # group. Store these scales in fp32, but quantize and dequantize them first, so that
                # the values are the same as in one process.
                nested_block = 0  # no double quantization
                nested = nested_state(nested_absmax, nested_code, NESTED_BLOCK)
                absmax = functional.dequantize_blockwise(absmax, nested) + offset
                absmax = shard.shard_of(absmax, rows).flatten().clone()

        tensors = [layer.weight, absmax, code]
        if nested_block:
            tensors += [nested_absmax, nested_code, offset]
        layer.store(Nf4(self.dtype, NF4_BLOCK, nested_block), tensors)

    @torch.no_grad()
    def load_quantized(
        self, layer: FrozenLinear, parts: Mapping[str, Tensor], *, where: str
    ) -> None:
        """Store a weight that bitsandbytes has quantized. Raise ModelError if it does not fit the
        layer.

        Args:
            parts: the checkpoint's tensors of this weight, by the suffix of their names. The codes
                are under "".
            where: location for the error.
        """
        # Separate the codes, which are under "", from the tensors that describe them (absmax, ...).
        scales = dict(parts)
        codes = scales.pop("")
        try:
            state = nf4_functions().QuantState.from_dict(scales, device=codes.device)
        except (KeyError, ValueError, AssertionError) as error:
            raise ModelError(
                f"its bitsandbytes tensors are not complete: {error}",
                where=where,
                fix="copy the files again; for a model on the Hub: tunesmith fetch MODEL",
            ) from error

        shape = tuple(state.shape)
        if state.quant_type != "nf4" or shape != layer.shape:
            raise ModelError(
                f"stored as {state.quant_type} of shape {shape}, and nf4 of shape {layer.shape} is "
                "needed",
                where=where,
                fix="use the unquantized model",
            )

        codes = codes.contiguous().view(torch.uint8).view(-1, 1)
        local_part(layer.weight).copy_(codes[local_slices(layer.weight)])

        tensors = [layer.weight, state.absmax, state.code]
        nested_block = 0
        if state.nested:
            nested = state.state2
            nested_block = nested.blocksize
            tensors += [nested.absmax, nested.code, state.offset]
        layer.store(Nf4(state.dtype, state.blocksize, nested_block), tensors)

    # ---- a stack

    @torch.no_grad()
    def load_stack(self, stack: ExpertStack, weight: Stored, first: int) -> None:
        codes, absmax, code, nested_absmax, nested_code, nested_offset = stack.stored_tensors()
        code.copy_(nf4_functions().get_4bit_type("nf4", device=code.device))
        # nested_code does not depend on the scales, so compute it from an arbitrary scale.
        nested_code.copy_(quantize_scales(nested_offset.new_zeros(1))[2])
        expert_scales = (absmax, nested_absmax, nested_offset)
        for scales in expert_scales:
            scales.zero_()

        matrix = whole_slices((stack.rows, stack.columns))
        first_local = local_slices(codes)[0].start
        for expert, expert_codes in enumerate(local_part(codes), start=first_local):
            # The slice reads only this expert from the file.
            dense = weight[(slice(first + expert, first + expert + 1), *matrix)]
            dense = dense.flatten().to(absmax.device, self.dtype)
            all_bytes = slice(0, len(expert_codes))
            scales = torch.empty(absmax.shape[1], device=absmax.device)
            for start in range(0, len(dense), MAX_NF4_ROUNDED_WEIGHTS):
                piece = dense[start : start + MAX_NF4_ROUNDED_WEIGHTS]
                _quantize_piece(piece, start, expert_codes, all_bytes, scales)
            expert_absmax, expert_nested_absmax, _, offset = quantize_scales(scales)
            absmax[expert] = expert_absmax
            nested_absmax[expert] = expert_nested_absmax
            nested_offset[expert] = offset

        for scales in expert_scales:
            scales.copy_(max_over_ranks(scales, codes))


def _has_kernel(codes: Tensor) -> bool:
    """Return whether the codes are on an H100 or H200, the GPUs on which `nf4_kernel` was
    measured.
    """
    return codes.is_cuda and torch.cuda.get_device_capability(codes.device) == (9, 0)


def _pieces_of_rows(layer: FrozenLinear, local_bytes: slice) -> Iterator[slice]:
    """Yield slices of the rows that contain these bytes of the codes.

    Each slice has complete blocks.
    """
    # A group is the smallest number of rows that consists of complete blocks.
    group_weights = math.lcm(NF4_BLOCK, layer.in_features)
    group_rows = group_weights // layer.in_features
    # Convert bytes to weights and to groups, rounded outward, so that the groups contain all bytes.
    first_group = WEIGHTS_PER_BYTE * local_bytes.start // group_weights
    end_group = ceil_div(WEIGHTS_PER_BYTE * local_bytes.stop, group_weights)
    first_row = first_group * group_rows
    # The last group may end after the last row of the matrix.
    end_row = min(end_group * group_rows, layer.out_features)
    groups_per_piece = max(1, MAX_NF4_ROUNDED_WEIGHTS // group_weights)
    piece_rows = groups_per_piece * group_rows
    for row in range(first_row, end_row, piece_rows):
        yield slice(row, min(row + piece_rows, end_row))


def _gather_scales(layer: FrozenLinear, scales: Tensor, shape: torch.Size) -> Tensor:
    """Return the scales of the entire layer from the scales that each rank has computed.

    Args:
        shape: shape of the entire layer.
    """
    # Use the maximum, not the sum: a block at the border of two shards has its scale on both ranks.
    shard = layer.tensor_shard
    if shard is None:
        return max_over_ranks(scales, layer.weight)
    # Copy the shard's scales to their position in [rows, blocks per row]. The other scales are 0
    # until the reduction.
    all_scales = torch.zeros(shape.numel() // NF4_BLOCK, device=scales.device)
    shard.shard_of(all_scales, shape[0]).copy_(scales.view(layer.out_features, -1))
    return collective("all_reduce", max_over_ranks(all_scales, layer.weight), "max", shard.group)


def _quantize_piece(
    weights: Tensor, first: int, codes: Tensor, local_bytes: slice, scales: Tensor
) -> None:
    """Quantize weights [n]. Store the codes of this rank and the scales of all blocks.

    Args:
        first: index of the first weight. It must be the start of a block.
        codes: this rank's codes, which are the range `local_bytes` of all codes. Codes of `weights`
            outside of this range are not stored.
        scales: scales of all blocks.
    """
    packed, state = nf4_functions().quantize_4bit(weights, blocksize=NF4_BLOCK, quant_type="nf4")
    first_block = first // NF4_BLOCK
    end_block = first_block + len(state.absmax)
    scales[first_block:end_block] = state.absmax

    # Bytes that are both in this piece and in this rank's codes.
    first_byte = first // WEIGHTS_PER_BYTE
    start = max(first_byte, local_bytes.start)
    stop = min(first_byte + len(packed), local_bytes.stop)
    local_codes = packed.view(-1)[start - first_byte : stop - first_byte]
    # Position of these bytes in this rank's codes.
    place = start - local_bytes.start
    codes[place : place + len(local_codes)] = local_codes


def nested_state(scales: Tensor, code: Tensor, block: int) -> Any:
    """Return the QuantState of 8-bit scales."""
    return nf4_functions().QuantState(scales, blocksize=block, code=code, dtype=torch.float32)


def quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize the scales of a matrix's blocks, fp32 [blocks], to 8 bits.

    As in bitsandbytes and QLoRA, the mean is subtracted first, because scales are positive but
    their 8-bit codes are symmetric around zero.

    Returns:
        absmax, nested_absmax, nested_code and nested_offset of an `Nf4`.
    """
    offset = scales.mean()
    absmax, nested = nf4_functions().quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
    return absmax, nested.absmax, nested.code, offset
