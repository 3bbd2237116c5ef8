"""Frozen linear layers with a 4-bit weight: NF4 of QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

The format is bitsandbytes': blocks of 64 weights as 4-bit codes, one scale a block, and the scales
themselves in 8 bits (double quantization). Its own layer is not used: it repacks its weight inside
a forward on some CPUs.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.distributed.torch_private import collective, local_slices
from tunesmith.distributed.vocab_parallel import local_part, sharding_groups
from tunesmith.errors import MachineError, ModelError, first_line
from tunesmith.model.weights import StoredTensor, copy_whole
from tunesmith.quant.frozen_linear import FrozenLinear, linear_names
from tunesmith.quant.frozen_weight import FrozenWeight, Nf4Encoding, Nf4Weight, nf4_functions
from tunesmith.units import ceil_div

BLOCK = 64  # weights that share a scale
NESTED_BLOCK = 256  # scales that share a scale
WEIGHTS_PER_BYTE = 2
# Weights quantized at a time: bitsandbytes' code for CPUs takes some 20 bytes for each.
PIECE = 1 << 21
SCALES = ("absmax", "code", "nested_absmax", "nested_code", "nested_offset")


@torch.no_grad()
def check_nf4(device: torch.device) -> None:
    """MachineError unless a small weight can be quantized and dequantized on this device.

    Called before anything is downloaded or loaded: a wheel of bitsandbytes is built for some
    versions of CUDA, and says so in the first call only.
    """
    try:
        layer = Nf4Linear(BLOCK, BLOCK, False, torch.bfloat16, device=device)
        layer.quantize(torch.ones(BLOCK, BLOCK, device=device))
        layer.dense()
    except RuntimeError as error:
        raise MachineError(
            f"the installed bitsandbytes has no nf4 for {device.type}",
            where="model.quantize",
            why=first_line(error),
            fix="pip install --upgrade bitsandbytes, or model.quantize=none; "
            "`python -m bitsandbytes` shows more",
        ) from error


class Nf4Linear(FrozenLinear):
    """A linear layer with W in NF4; empty until `quantize` or `load_quantized`.

    Attributes (frozen parameters and buffers; n = out_features * in_features):
        weight: uint8 [(n + 1) // 2, 1], two codes a byte.
        absmax: uint8 [blocks], the scale of each block of 64: a code, or fp32 without double
            quantization.
        code: fp32 [16], the value of each 4-bit code.
        nested_absmax: fp32 [ceil(blocks / 256)]; nested_code: fp32 [256]; nested_offset: fp32 [];
            or None.

    The rows of a layer that a tensor group shards, and the parts of its rows, are blocks of 64.
    """

    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor
    nested_offset: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        compute_dtype: torch.dtype,
        device: Any = "meta",
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = compute_dtype
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=compute_dtype, device=device))
        self.allocate(device)

    def allocate(self, device: torch.device) -> None:
        count = self.in_features * self.out_features
        blocks = ceil_div(count, BLOCK)
        codes = torch.empty(ceil_div(count, WEIGHTS_PER_BYTE), 1, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self._store_scales(
            str(Nf4Encoding(BLOCK, NESTED_BLOCK, self.compute_dtype)),
            torch.empty(blocks, dtype=torch.uint8, device=device),
            torch.empty(16, device=device),
            torch.empty(ceil_div(blocks, NESTED_BLOCK), device=device),
            torch.empty(256, device=device),
            torch.empty((), device=device),
        )

    def _store_scales(self, encoding: str, *scales: Tensor) -> None:
        """Store the tensors that SCALES names; those left out become None."""
        self.encoding = encoding
        # Not persistent: a dense checkpoint does not hold them, and its reader would miss them.
        for name, tensor in zip_longest(SCALES, scales):
            self.register_buffer(name, tensor, persistent=False)

    def share(self, other: "Nf4Linear") -> None:
        """Store the very tensors of another layer of the same shape."""
        _, *scales = other.frozen_weight().tensors
        self._store_scales(other.encoding, *scales)
        self.weight = other.weight
        self.bias = other.bias

    @torch.no_grad()
    def quantize(self, dense: Tensor | StoredTensor) -> None:
        """Store the whole layer's `dense` [out_features, in_features].

        It is rounded to the compute dtype first, as Transformers does. A rank reads and quantizes
        the blocks that it holds. Where ranks share the layer it is a collective call: the scales of
        all blocks are quantized together. Where those of a tensor-parallel part are not whole
        groups in one piece they are stored in fp32 (4.5 bits a weight in place of 4.13).
        """
        scales = self._quantize_local_rows(dense)
        scales = self._gather_scales(scales, dense.shape)
        self._quantize_scales(scales, rows=dense.shape[0])

    def _quantize_local_rows(self, dense: Tensor | StoredTensor) -> Tensor:
        """Store the codes that this rank holds of its part of the layer.

        Returns:
            The scales of the part's blocks, fp32 [blocks]; 0 where other ranks hold the block.
        """
        functional = nf4_functions()
        device = self.absmax.device
        width = self.in_features
        # Codes lie in one row, byte by byte. FSDP2 cuts it into equal parts, wherever rows end.
        codes = local_part(self.weight).view(-1)
        local_bytes = local_slices(self.weight)[0]  # of the codes' bytes
        scales = torch.zeros(ceil_div(self.out_features * width, BLOCK), device=device)

        for rows in self._pieces_of_rows(local_bytes):
            weights = self.part_of(dense, rows).flatten().to(device, self.compute_dtype)
            piece, state = functional.quantize_4bit(weights, blocksize=BLOCK, quant_type="nf4")
            # A whole number: pieces begin at the edge of a block.
            first_block = rows.start * width // BLOCK
            scales[first_block : first_block + len(state.absmax)] = state.absmax

            # The rows may begin before the bytes that this rank holds, and end after them.
            first_byte = rows.start * width // WEIGHTS_PER_BYTE
            start = max(first_byte, local_bytes.start)
            stop = min(first_byte + len(piece), local_bytes.stop)
            local_piece = piece.view(-1)[start - first_byte : stop - first_byte]
            codes[start - local_bytes.start : stop - local_bytes.start] = local_piece
        return scales

    def _pieces_of_rows(self, local_bytes: slice) -> Iterator[slice]:
        """The rows that have these bytes of the codes, in pieces of whole blocks."""
        # The fewest rows that are whole blocks: their weights are lcm(BLOCK, in_features).
        rows_per_group = BLOCK // math.gcd(BLOCK, self.in_features)  # whole blocks together
        group_weights = rows_per_group * self.in_features
        # From bytes to weights to groups, rounded outward: all bytes lie in the groups between.
        first_group = WEIGHTS_PER_BYTE * local_bytes.start // group_weights
        end_group = ceil_div(WEIGHTS_PER_BYTE * local_bytes.stop, group_weights)
        end_row = min(end_group * rows_per_group, self.out_features)
        rows_per_piece = max(1, PIECE // group_weights) * rows_per_group
        for row in range(first_group * rows_per_group, end_row, rows_per_piece):
            yield slice(row, min(row + rows_per_piece, end_row))

    def _gather_scales(self, scales: Tensor, shape: torch.Size) -> Tensor:
        """The scales of the whole layer of that shape, of what each rank has of them."""
        groups: list[str] = [group.group_name for group in sharding_groups(self.weight)]
        shard = self.tensor_shard
        # [rows of the part, blocks of a row] goes to its place in [rows, blocks of a row]; the rest
        # stays 0 until the reduction.
        if shard is not None:
            of_shard = scales.view(self.out_features, -1)
            scales = torch.zeros(shape.numel() // BLOCK, device=scales.device)
            shard.shard_of(scales, shape[0]).copy_(of_shard)
            groups.append(shard.group)
        for group in groups:
            # The largest: a block may reach over the edge of two shards, and other ranks have 0.
            scales = collective("all_reduce", scales, "max", group)
        return scales

    def _quantize_scales(self, scales: Tensor, rows: int) -> None:
        """Store this rank's part of the whole layer's scales, in 8 bits with scales of their own.

        Args:
            rows: number of the whole layer's rows.
        """
        functional = nf4_functions()
        code = functional.get_4bit_type("nf4", device=scales.device)
        absmax, nested_absmax, nested_code, offset = quantize_scales(scales)
        nested_block = NESTED_BLOCK
        shard = self.tensor_shard
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
                nested = functional.QuantState(
                    nested_absmax, blocksize=NESTED_BLOCK, code=nested_code, dtype=torch.float32
                )
                absmax = functional.dequantize_blockwise(absmax, nested) + offset
                absmax = shard.shard_of(absmax, rows).flatten().clone()
        encoding = str(Nf4Encoding(BLOCK, nested_block, self.compute_dtype))
        if nested_block:
            self._store_scales(encoding, absmax, code, nested_absmax, nested_code, offset)
        else:
            self._store_scales(encoding, absmax, code)

    def load(self, stored: Mapping[str, StoredTensor | Tensor], name: str) -> None:
        if len(stored) == 1:
            self.quantize(stored[""])
            return
        parts = {}
        for suffix, part in stored.items():
            tensor = part.read() if isinstance(part, StoredTensor) else part
            # Where the matmuls are: a shard may lie on the host.
            parts[suffix] = tensor.to(self.absmax.device)
        self.load_quantized(parts, where=name)

    @torch.no_grad()
    def load_quantized(self, parts: dict[str, Tensor], *, where: str) -> None:
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
        shape = (self.out_features, self.in_features)
        if state.quant_type != "nf4" or tuple(state.shape) != shape:
            what = f"stored as {state.quant_type} of shape {tuple(state.shape)}"
            what += f", and nf4 of shape {shape} is needed"
            raise ModelError(what, where=where, fix="use the unquantized model")
        copy_whole(self.weight, codes.contiguous().view(torch.uint8).view(-1, 1))
        if state.nested:
            nested = state.state2
            encoding = Nf4Encoding(state.blocksize, nested.blocksize, state.dtype)
            nested_scales = (nested.absmax, nested.code, state.offset)
            self._store_scales(str(encoding), state.absmax, state.code, *nested_scales)
        else:
            encoding = Nf4Encoding(state.blocksize, 0, state.dtype)
            self._store_scales(str(encoding), state.absmax, state.code)

    def frozen_weight(self) -> FrozenWeight:
        tensors = [self.weight, self.absmax, self.code]
        if self.nested_absmax is not None:
            tensors += [self.nested_absmax, self.nested_code, self.nested_offset]
        return Nf4Weight(self.encoding, tensors, (self.out_features, self.in_features))


def quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scales of a matrix's blocks, fp32 [blocks], in 8 bits with scales of their own.

    As in bitsandbytes and QLoRA: scales are positive, their 8-bit codes symmetric around zero.

    Returns:
        absmax, nested_absmax, nested_code and nested_offset of an `Nf4Linear`.
    """
    offset = scales.mean()
    absmax, nested = nf4_functions().quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
    return absmax, nested.absmax, nested.code, offset


def replace_linears(model: nn.Module, compute_dtype: torch.dtype) -> list[str]:
    """Replace every `nn.Linear` but the output layer with an empty `Nf4Linear` of its shape.

    Returns their names.
    """
    names = linear_names(model, head=False)
    for name in names:
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        has_bias = dense.bias is not None
        layer = Nf4Linear(dense.in_features, dense.out_features, has_bias, compute_dtype)
        model.set_submodule(name, layer)
    return names
