"""Frozen linear layers with a 4-bit weight: NF4 of QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

The format is bitsandbytes': blocks of 64 weights as 4-bit codes, one scale a block, and the scales themselves in 8 bits
(double quantization). Its own layer is not used: it repacks its weight inside a forward on some CPUs.
"""

import math
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import MachineError, ModelError, first_line
from tunesmith.model.weights import StoredTensor, copy_whole
from tunesmith.private import collective, local_slices
from tunesmith.quant.frozen_matmul import FrozenLinear, linear_names
from tunesmith.quant.frozen_weight import FrozenWeight, Nf4Weight, nf4_functions
from tunesmith.sharded import local_part, sharding_groups

BLOCK = 64  # weights that share a scale
NESTED_BLOCK = 256  # scales that share a scale
PIECE = 1 << 21  # weights quantized at a time: bitsandbytes' code for CPUs takes some 20 bytes for each
SCALES = ("absmax", "code", "nested_absmax", "nested_code", "nested_offset")


@torch.no_grad()
def check_nf4(device: torch.device) -> None:
    """MachineError unless a small weight can be quantized and made dense again; before anything is downloaded or loaded.

    A wheel of bitsandbytes is built for some versions of CUDA, and says so in the first call only.
    """
    try:
        layer = Nf4Linear(BLOCK, BLOCK, False, torch.bfloat16, device=device)
        layer.quantize(torch.ones(BLOCK, BLOCK, device=device))
        layer.dense()
    except RuntimeError as error:
        what, why = f"the installed bitsandbytes has no nf4 for {device.type}", first_line(error)
        fix = "pip install --upgrade bitsandbytes, or model.quantize=none; `python -m bitsandbytes` tells more"
        raise MachineError(what, where="model.quantize", why=why, fix=fix) from error


class Nf4Linear(FrozenLinear):
    """A linear layer with W in NF4; empty until `quantize` or `load_quantized`.

    Attributes (frozen parameters and buffers; n = out_features * in_features):
        weight: uint8 [(n + 1) // 2, 1], two codes a byte.
        absmax: uint8 [blocks], the scale of each block of 64: a code, or fp32 without double quantization.
        code: fp32 [16], the value of each 4-bit code.
        nested_absmax: fp32 [ceil(blocks / 256)]; nested_code: fp32 [256]; nested_offset: fp32 []; or None.

    The rows of a layer that is cut, and the parts of its rows, are blocks of 64.
    """

    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor
    nested_offset: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool, compute_dtype: torch.dtype, device: Any = "meta"
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = in_features, out_features, compute_dtype
        self.bias = nn.Parameter(torch.empty(out_features, dtype=compute_dtype, device=device)) if bias else None
        self.allocate(device)

    def allocate(self, device: torch.device) -> None:
        count = self.in_features * self.out_features
        blocks = -(-count // BLOCK)
        self.weight = nn.Parameter(torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device=device), False)
        absmax = torch.empty(blocks, dtype=torch.uint8, device=device)
        fp32 = [torch.empty(shape, device=device) for shape in ((16,), (-(-blocks // NESTED_BLOCK),), (256,), ())]
        self._store_scales(f"nf4 {BLOCK} {NESTED_BLOCK} {self.compute_dtype}", absmax, *fp32)

    def _store_scales(self, kind: str, *scales: Tensor) -> None:
        self.kind = kind
        # Not persistent: a dense checkpoint does not hold them, and its reader would miss them.
        for name, tensor in zip_longest(SCALES, scales):
            self.register_buffer(name, tensor, persistent=False)

    def share(self, other: "Nf4Linear") -> None:
        """Store the very tensors of another layer of the same shape."""
        self._store_scales(other.kind, *other.frozen_weight().tensors[1:])
        self.weight, self.bias = other.weight, other.bias

    @torch.no_grad()
    def quantize(self, dense: Tensor | StoredTensor) -> None:
        """Store `dense`, the whole layer's [out_features, in_features], rounded to the compute dtype first, as Transformers does.

        A rank reads and quantizes the blocks that it holds. Where ranks share the layer it is a collective call: the scales
        of all blocks are quantized together. Those of a tensor-parallel part that are not in one piece then stay fp32 (4.5 bits
        a weight in place of 4.13).
        """
        functional, cut, device = nf4_functions(), self.cut, self.absmax.device
        packed, own, width = local_part(self.weight).view(-1), local_slices(self.weight)[0], self.in_features
        scales = torch.zeros(-(-width * self.out_features // BLOCK), device=device)
        span = BLOCK // math.gcd(BLOCK, width)  # rows that are whole blocks together
        last = min(self.out_features, -(-2 * own.stop // (width * span)) * span)
        step = max(1, PIECE // (width * span)) * span
        for at in range(2 * own.start // (width * span) * span, last, step):
            rows = self.part_of(dense, slice(at, min(at + step, last))).flatten().to(device, self.compute_dtype)
            codes, state = functional.quantize_4bit(rows, blocksize=BLOCK, quant_type="nf4")
            block, begin = at * width // BLOCK, at * width // 2
            scales[block : block + len(state.absmax)] = state.absmax
            start, stop = max(begin, own.start), min(begin + len(codes), own.stop)
            packed[start - own.start : stop - own.start] = codes.view(-1)[start - begin : stop - begin]
        groups: list[str] = [group.group_name for group in sharding_groups(self.weight)]
        if cut:
            part, scales = scales, torch.zeros(dense.shape.numel() // BLOCK, device=device)
            cut.of(scales, dense.shape[0]).copy_(part.view(self.out_features, -1))
            groups.append(cut.group)
        for group in groups:
            scales = collective("all_reduce", scales, "max", group)  # a block may reach over the edge of two shards
        offset, code = scales.mean(), functional.get_4bit_type("nf4", device=device)
        absmax, nested = functional.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
        nested_block, shared = NESTED_BLOCK, nested.absmax
        if cut and (cut.dim or len(absmax) // cut.parts % NESTED_BLOCK):
            nested_block, absmax = 0, functional.dequantize_blockwise(absmax, nested) + offset
            absmax = cut.of(absmax, dense.shape[0]).flatten().clone()
        elif cut:
            absmax, shared = (t.chunk(cut.parts)[cut.part].clone() for t in (absmax, shared))
        doubly = (shared, nested.code, offset) if nested_block else ()
        self._store_scales(f"nf4 {BLOCK} {nested_block} {self.compute_dtype}", absmax, code, *doubly)

    def load(self, stored: Mapping[str, StoredTensor | Tensor], name: str) -> None:
        if len(stored) == 1:
            self.quantize(stored[""])
        else:  # where the matmuls are: a shard may lie on the host
            device = self.absmax.device
            tensors = {suffix: t.read() if isinstance(t, StoredTensor) else t for suffix, t in stored.items()}
            self.load_quantized({suffix: t.to(device) for suffix, t in tensors.items()}, where=name)

    @torch.no_grad()
    def load_quantized(self, parts: dict[str, Tensor], *, where: str) -> None:
        """Store a weight that bitsandbytes has quantized, else a ModelError that names it by `where`.

        parts: the checkpoint's tensors of this weight, by the rest of their names; "" are the codes.
        """
        rest = {name: tensor for name, tensor in parts.items() if name}
        try:
            state = nf4_functions().QuantState.from_dict(rest, device=parts[""].device)
        except (KeyError, ValueError, AssertionError) as error:
            raise ModelError(f"its bitsandbytes tensors are not complete: {error}", where=where) from error
        if state.quant_type != "nf4" or tuple(state.shape) != (self.out_features, self.in_features):
            needed = f"nf4 of shape {(self.out_features, self.in_features)} is needed"
            raise ModelError(f"stored as {state.quant_type} of shape {tuple(state.shape)}, and {needed}", where=where)
        nested = (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
        kind = f"nf4 {state.blocksize} {state.state2.blocksize if nested else 0} {state.dtype}"
        copy_whole(self.weight, parts[""].contiguous().view(torch.uint8).view(-1, 1))
        self._store_scales(kind, state.absmax, state.code, *nested)

    def frozen_weight(self) -> FrozenWeight:
        tensors = [self.weight, self.absmax, self.code]
        if self.nested_absmax is not None:
            tensors += [self.nested_absmax, self.nested_code, self.nested_offset]
        return Nf4Weight(self.kind, tensors, (self.out_features, self.in_features))


def replace_linears(model: nn.Module, compute_dtype: torch.dtype) -> list[str]:
    """Replace every `nn.Linear` but the output layer with an empty `Nf4Linear` of its shape; return their names."""
    names = linear_names(model, head=False)
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        model.set_submodule(name, Nf4Linear(old.in_features, old.out_features, old.bias is not None, compute_dtype))
    return names
