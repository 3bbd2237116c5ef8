"""Frozen weights in NF4, the 4-bit format of QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

The format is bitsandbytes': blocks of 64 weights as 4-bit codes, one scale a block, and the scales
themselves in 8 bits (double quantization). Its own layer is not used: it repacks its weight inside
a forward on some CPUs. An expert of a stack is quantized by itself, as a linear layer is: a rank
that holds some of them, or a reader of one, has the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.distributed.torch_private import collective, local_slices
from tunesmith.distributed.vocab_parallel import local_part, sharding_groups
from tunesmith.errors import MachineError, ModelError, first_line
from tunesmith.formats.base import Format, Forms, FrozenStack, FrozenWeight, TensorForm
from tunesmith.host import packages
from tunesmith.units import ceil_div

if TYPE_CHECKING:
    from tunesmith.formats.base import Stored, StoredParts
    from tunesmith.formats.linear import FrozenLinear
    from tunesmith.formats.stack import ExpertStack

NF4_BLOCK = 64  # weights that share a scale
NESTED_BLOCK = 256  # scales that share a scale
WEIGHTS_PER_BYTE = 2
# Weights quantized at a time: bitsandbytes' code for CPUs takes some 20 bytes for each.
MAX_NF4_ROUNDED_WEIGHTS = 1 << 21
# Rows for which bitsandbytes reads 4-bit weights inside the product. To make W dense first moves
# nine times as many bytes.
MAX_FUSED_ROWS = 16
QUANT_STATE_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def nf4_functions() -> Any:
    """`bitsandbytes.functional`, or a MachineError that says how to install it."""
    return packages.bnb_functional("nf4 weights", "model.quantize")


@torch.no_grad()
def check_nf4(device: torch.device) -> None:
    """MachineError unless a small weight can be quantized and dequantized on this device.

    Called before anything is downloaded or loaded: a wheel of bitsandbytes is built for some
    versions of CUDA, and says so in the first call only.
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
            fix="pip install --upgrade bitsandbytes, or model.quantize=none; "
            "`python -m bitsandbytes` shows more",
        ) from error


class Nf4(Format):
    """tensors (n = weights of the matrix, of an expert filled up to whole blocks):

        weight: uint8 [(n + 1) // 2, 1], or [experts, n / 2]: two codes a byte.
        absmax: uint8 [blocks], the scale of each block of 64: a code, or fp32 without double
            quantization.
        code: fp32 [16], the value of each 4-bit code.
        nested_absmax: fp32 [ceil(blocks / 256)]; nested_code: fp32 [256]; nested_offset: fp32 [].
            They are there with double quantization. Those of experts have the experts first, but
            for the values of codes.

    The rows of a layer that a tensor group shards, and the parts of its rows, are blocks of 64.

    Attributes:
        dtype: of the weight before, in which it is quantized.
        block: weights that share a scale; nested_block: scales that do, 0: they are in fp32.
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

    @classmethod
    def parse(cls, dtype: str, block: int, nested_block: int) -> Nf4:
        return cls(QUANT_STATE_DTYPES[dtype], block, nested_block)

    def matrix_forms(self, rows: int, columns: int) -> Forms:
        count = rows * columns
        blocks = ceil_div(count, self.block)
        codes = (ceil_div(count, WEIGHTS_PER_BYTE), 1)
        forms = {"weight": TensorForm(codes, torch.uint8, is_shared=True)}
        # Not persistent: a dense checkpoint does not hold them, and its reader would miss them.
        if not self.nested_block:
            return forms | {"absmax": TensorForm((blocks,)), "code": TensorForm((16,))}
        return forms | {
            "absmax": TensorForm((blocks,), torch.uint8),
            "code": TensorForm((16,)),
            "nested_absmax": TensorForm((ceil_div(blocks, self.nested_block),)),
            "nested_code": TensorForm((256,)),
            "nested_offset": TensorForm(()),
        }

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
        codes, absmax, code, *nested = weight.tensors
        if _has_kernel(codes):
            return self._decode_by_kernel(codes, absmax, code, nested, weight.shape).to(dtype)
        dense: Tensor = nf4_functions().dequantize_4bit(codes, self._quant_state(weight))
        return dense.to(dtype)

    def _decode_by_kernel(
        self,
        codes: Tensor,
        scales: Tensor,
        values: Tensor,
        nested: Sequence[Tensor],
        shape: tuple[int, int],
    ) -> Tensor:
        from tunesmith.formats import nf4_kernel  # Triton comes with torch for CUDA alone

        dense = torch.empty(shape, dtype=self.dtype, device=codes.device)
        blocks = {"block": self.block, "nested_block": self.nested_block}
        nf4_kernel.decode_nf4(codes, scales, values, nested, dense, **blocks)
        return dense

    def few_rows_matmul(self, weight: FrozenWeight, x: Tensor) -> Tensor | None:
        if len(x) > MAX_FUSED_ROWS:
            return None
        from bitsandbytes import matmul_4bit

        product: Tensor = matmul_4bit(x, weight.tensors[0], self._quant_state(weight))
        return product

    def _quant_state(self, weight: FrozenWeight) -> Any:
        """bitsandbytes' QuantState: what it needs beside the codes."""
        # The codes, their scales, and where these are in 8 bits the scales of the scales.
        _, absmax, code, *nested = weight.tensors
        if not nested:
            return self._state(absmax, weight.shape, code)
        nested_absmax, nested_code, offset = nested
        state2 = nested_state(nested_absmax, nested_code, self.nested_block)
        return self._state(absmax, weight.shape, code, offset=offset, state2=state2)

    def _state(self, absmax: Tensor, shape: tuple[int, int], code: Tensor, **nested: Any) -> Any:
        return nf4_functions().QuantState(
            absmax,
            shape=torch.Size(shape),
            code=code,
            blocksize=self.block,
            quant_type="nf4",
            dtype=self.dtype,
            **nested,
        )

    def decode_experts(self, stack: FrozenStack, experts: slice, dtype: torch.dtype) -> Tensor:
        codes, _, code, *_ = stack.tensors
        scales = self.scales_of_experts(stack.tensors, experts)
        count, blocks = scales.shape
        # One call for all of them: blocks do not reach from one expert into the next.
        shape = (count, blocks * self.block)
        weights: Tensor
        if _has_kernel(codes):
            weights = self._decode_by_kernel(codes[experts], scales, code, (), shape)
        else:
            state = self._state(scales.flatten(), shape, code)
            weights = nf4_functions().dequantize_4bit(codes[experts].reshape(-1, 1), state)
        # Without what fills up an expert's last block.
        return weights.to(dtype)[:, : math.prod(stack.matrix)].unflatten(1, stack.matrix)

    def scales_of_experts(self, tensors: Sequence[Tensor], experts: slice) -> Tensor:
        """The scale of each block of some experts: fp32 [experts, blocks]."""
        _, absmax, _, nested_absmax, nested_code, nested_offset = tensors
        scales = nested_code[absmax[experts].int()]
        of_scales = nested_absmax[experts].repeat_interleave(self.nested_block, 1)
        scales.mul_(of_scales[:, : scales.shape[1]])
        return scales.add_(nested_offset[experts, None])

    # ---- a matrix

    def load_matrix(self, layer: FrozenLinear, stored: StoredParts, name: str) -> None:
        if len(stored) == 1:
            self.quantize(layer, stored[""])
            return
        parts = {}
        for suffix, part in stored.items():
            tensor = part if isinstance(part, Tensor) else part.read()
            # Where the matmuls are: a shard may lie on the host.
            parts[suffix] = tensor.to(layer.get_buffer("absmax").device)
        self.load_quantized(layer, parts, where=name)

    @torch.no_grad()
    def quantize(self, layer: FrozenLinear, dense: Stored) -> None:
        """Store the whole layer's `dense` [out_features, in_features].

        It is rounded to the compute dtype first, as Transformers does. A rank reads and quantizes
        the blocks that it holds. Where ranks share the layer it is a collective call: the scales of
        all blocks are quantized together. Where those of a tensor-parallel part are not whole
        groups in one piece they are stored in fp32 (4.5 bits a weight in place of 4.13).
        """
        device = layer.get_buffer("absmax").device
        width = layer.in_features
        # Codes lie in one row, byte by byte. FSDP2 cuts it into equal parts, wherever rows end.
        codes = local_part(layer.weight).view(-1)
        local_bytes = local_slices(layer.weight)[0]
        # The scales of the part's blocks; 0 where other ranks hold the block.
        scales = torch.zeros(ceil_div(layer.out_features * width, NF4_BLOCK), device=device)
        for rows in _pieces_of_rows(layer, local_bytes):
            weights = layer.part_of(dense, rows).flatten().to(device, self.dtype)
            _quantize_piece(weights, rows.start * width, codes, local_bytes, scales)
        scales = _gather_scales(layer, scales, dense.shape)
        self._quantize_scales(layer, scales, rows=dense.shape[0])

    def _quantize_scales(self, layer: FrozenLinear, scales: Tensor, rows: int) -> None:
        """Store this rank's part of the whole layer's scales, in 8 bits with scales of their own.

        Args:
            rows: number of the whole layer's rows.
        """
        functional = nf4_functions()
        code = functional.get_4bit_type("nf4", device=scales.device)
        absmax, nested_absmax, nested_code, offset = quantize_scales(scales)
        nested_block = NESTED_BLOCK
        shard = layer.tensor_shard
        if shard is not None:
            # A shard of whole rows has its scales in one piece. If that is whole groups of 256, a
            # part of the codes of scales is cut, and the same part of the groups' own scales.
            has_whole_blocks = len(absmax) // shard.parts % NESTED_BLOCK == 0
            if shard.dim == 0 and has_whole_blocks:
                absmax = absmax.chunk(shard.parts)[shard.part].clone()
                nested_absmax = nested_absmax.chunk(shard.parts)[shard.part].clone()
            else:
                # Of a shard of columns, or of rows that end within a group, no groups can be cut:
                # the scales are stored in fp32, rounded to 8 bits before as one process has them.
                nested_block = 0  # not nested
                nested = nested_state(nested_absmax, nested_code, NESTED_BLOCK)
                absmax = functional.dequantize_blockwise(absmax, nested) + offset
                absmax = shard.shard_of(absmax, rows).flatten().clone()
        nested_scales = (nested_absmax, nested_code, offset) if nested_block else ()
        kind = Nf4(self.dtype, NF4_BLOCK, nested_block)
        layer.store(kind, [layer.weight, absmax, code, *nested_scales])

    @torch.no_grad()
    def load_quantized(
        self, layer: FrozenLinear, parts: Mapping[str, Tensor], *, where: str
    ) -> None:
        """Store a weight that bitsandbytes has quantized, else a ModelError that names `where`.

        parts: the checkpoint's tensors of this weight, by the rest of their names; "" is for the
        codes.
        """
        codes = parts[""]
        scales = {name: tensor for name, tensor in parts.items() if name}
        try:
            # "" is the codes; absmax, quant_map and the rest describe them.
            state = nf4_functions().QuantState.from_dict(scales, device=codes.device)
        except (KeyError, ValueError, AssertionError) as error:
            what = f"its bitsandbytes tensors are not complete: {error}"
            fix = "copy the files again; of a model on the Hub: tunesmith fetch MODEL"
            raise ModelError(what, where=where, fix=fix) from error
        if state.quant_type != "nf4" or tuple(state.shape) != layer.shape:
            what = f"stored as {state.quant_type} of shape {tuple(state.shape)}"
            what += f", and nf4 of shape {layer.shape} is needed"
            raise ModelError(what, where=where, fix="use the unquantized model")
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
        # It depends on no scale.
        nested_code.copy_(quantize_scales(nested_offset.new_zeros(1))[2])
        of_experts = (absmax, nested_absmax, nested_offset)
        for scales in of_experts:
            scales.zero_()
        local_codes = local_part(codes)
        span = local_slices(codes)[0]
        for expert in range(span.start, span.stop):
            number = first + expert
            # Only this expert is read.
            dense = weight[slice(number, number + 1), slice(0, stack.rows), slice(0, stack.columns)]
            flat = dense.flatten().to(absmax.device, self.dtype)
            expert_codes = local_codes[expert - span.start]
            scales = torch.empty(absmax.shape[1], device=absmax.device)
            for start in range(0, len(flat), MAX_NF4_ROUNDED_WEIGHTS):
                piece = flat[start : start + MAX_NF4_ROUNDED_WEIGHTS]
                _quantize_piece(piece, start, expert_codes, slice(0, len(expert_codes)), scales)
            of_blocks, of_scales, _, offset = quantize_scales(scales)
            for place, value in zip(of_experts, (of_blocks, of_scales, offset), strict=True):
                place[expert] = value
        for group in sharding_groups(codes):
            for scales in of_experts:
                # The largest: none is negative, and ranks have 0 for the experts of others.
                scales.copy_(collective("all_reduce", scales, "max", group.group_name))


def _has_kernel(codes: Tensor) -> bool:
    """Tell whether codes are on a GPU on which `nf4_kernel` was measured: H100 and H200."""
    return codes.is_cuda and torch.cuda.get_device_capability(codes.device) == (9, 0)


def _pieces_of_rows(layer: FrozenLinear, local_bytes: slice) -> Iterator[slice]:
    """The rows that have these bytes of the codes, in pieces of whole blocks."""
    # The fewest rows that are whole blocks: their weights are lcm(NF4_BLOCK, in_features).
    rows_per_group = NF4_BLOCK // math.gcd(NF4_BLOCK, layer.in_features)  # whole blocks together
    group_weights = rows_per_group * layer.in_features
    # From bytes to weights to groups, rounded outward: all bytes lie in the groups between.
    first_group = WEIGHTS_PER_BYTE * local_bytes.start // group_weights
    end_group = ceil_div(WEIGHTS_PER_BYTE * local_bytes.stop, group_weights)
    end_row = min(end_group * rows_per_group, layer.out_features)
    rows_per_piece = max(1, MAX_NF4_ROUNDED_WEIGHTS // group_weights) * rows_per_group
    for row in range(first_group * rows_per_group, end_row, rows_per_piece):
        yield slice(row, min(row + rows_per_piece, end_row))


def _gather_scales(layer: FrozenLinear, scales: Tensor, shape: torch.Size) -> Tensor:
    """The scales of the whole layer of that shape, of what each rank has of them."""
    groups: list[str] = [group.group_name for group in sharding_groups(layer.weight)]
    shard = layer.tensor_shard
    # [rows of the part, blocks of a row] goes to its place in [rows, blocks of a row]; the rest
    # stays 0 until the reduction.
    if shard is not None:
        of_shard = scales.view(layer.out_features, -1)
        scales = torch.zeros(shape.numel() // NF4_BLOCK, device=scales.device)
        shard.shard_of(scales, shape[0]).copy_(of_shard)
        groups.append(shard.group)
    for group in groups:
        # The largest: a block may reach over the edge of two shards, and other ranks have 0.
        scales = collective("all_reduce", scales, "max", group)
    return scales


def _quantize_piece(
    weights: Tensor, first: int, codes: Tensor, local_bytes: slice, scales: Tensor
) -> None:
    """Store the codes of weights [n] that a rank holds, and their blocks' scales.

    Args:
        first: the number of the first weight, at the edge of a block.
        codes: those of `local_bytes`. The weights may begin before them, and end after them.
        scales: of all blocks.
    """
    packed, state = nf4_functions().quantize_4bit(weights, blocksize=NF4_BLOCK, quant_type="nf4")
    first_block = first // NF4_BLOCK
    scales[first_block : first_block + len(state.absmax)] = state.absmax
    first_byte = first // WEIGHTS_PER_BYTE
    start = max(first_byte, local_bytes.start)
    stop = min(first_byte + len(packed), local_bytes.stop)
    local_codes = packed.view(-1)[start - first_byte : stop - first_byte]
    codes[start - local_bytes.start : stop - local_bytes.start] = local_codes


def nested_state(scales: Tensor, code: Tensor, block: int) -> Any:
    """The QuantState of scales in 8 bits."""
    return nf4_functions().QuantState(scales, blocksize=block, code=code, dtype=torch.float32)


def quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scales of a matrix's blocks, fp32 [blocks], in 8 bits with scales of their own.

    As in bitsandbytes and QLoRA: scales are positive, their 8-bit codes symmetric around zero.

    Returns:
        absmax, nested_absmax, nested_code and nested_offset of an `Nf4`.
    """
    offset = scales.mean()
    absmax, nested = nf4_functions().quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
    return absmax, nested.absmax, nested.code, offset
