"""Frozen stacks of experts in NF4, each expert quantized by itself.

An expert's codes and scales are those of a linear layer with its weight (`nf4.Nf4Linear`), and of
no other expert: a rank that holds some of them, or a reader of one, has the same bits. The rows of
a matrix are those of the stack as it is stored; so are bitsandbytes' blocks.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.distributed.torch_private import collective, local_slices
from tunesmith.distributed.vocab_parallel import local_part, sharding_groups
from tunesmith.model.weights import StoredTensor
from tunesmith.quant.expert_stack import ExpertStack
from tunesmith.quant.experts import replace_stacks
from tunesmith.quant.frozen_stack import Nf4Stack
from tunesmith.quant.frozen_weight import Nf4Encoding, nf4_functions
from tunesmith.quant.nf4 import (
    BLOCK,
    NESTED_BLOCK,
    PIECE,
    WEIGHTS_PER_BYTE,
    quantize_scales,
)
from tunesmith.units import ceil_div


class Nf4Experts(ExpertStack):
    """A stack of experts in NF4.

    Attributes (frozen; n = the weights of an expert, filled up to whole blocks):
        codes: uint8 [experts, n / 2], two a byte.
        absmax: uint8 [experts, n / 64], the codes of the blocks' scales.
        code: fp32 [16], the value of each 4-bit code.
        nested_absmax: fp32 [experts, ceil(n / 64 / 256)]; nested_code: fp32 [256];
            nested_offset: fp32 [experts].
    """

    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor
    nested_code: Tensor
    nested_offset: Tensor

    def allocate(self, device: torch.device) -> None:
        experts, *matrix = self.stored_shape
        blocks = ceil_div(math.prod(matrix), BLOCK)
        groups = ceil_div(blocks, NESTED_BLOCK)
        self.encoding = self.named(str(Nf4Encoding(BLOCK, NESTED_BLOCK, self.compute_dtype)))

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        codes = empty(experts, blocks * BLOCK // WEIGHTS_PER_BYTE, dtype=torch.uint8)
        self.codes = nn.Parameter(codes, requires_grad=False)
        # Not persistent: a dense checkpoint does not hold them, and its reader would miss them.
        buffers = {
            "absmax": empty(experts, blocks, dtype=torch.uint8),
            "code": empty(16),
            "nested_absmax": empty(experts, groups),
            "nested_code": empty(256),
            "nested_offset": empty(experts),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    @torch.no_grad()
    def store(self, weight: StoredTensor | Tensor, first: int = 0) -> None:
        """As `ExpertStack.store`; an expert is rounded to the compute dtype first."""
        self.code.copy_(nf4_functions().get_4bit_type("nf4", device=self.code.device))
        # It depends on no scale.
        _, _, nested_code, _ = quantize_scales(self.nested_offset.new_zeros(1))
        self.nested_code.copy_(nested_code)
        of_experts = (self.absmax, self.nested_absmax, self.nested_offset)
        for scales in of_experts:
            scales.zero_()
        _, rows, columns = self.stored_shape
        local_codes = local_part(self.codes)
        span = local_slices(self.codes)[0]
        for expert in range(span.start, span.stop):
            number = first + expert
            # Only this expert is read.
            dense = weight[slice(number, number + 1), slice(0, rows), slice(0, columns)]
            flat = dense.flatten().to(self.absmax.device, self.compute_dtype)
            self._quantize(flat, expert, local_codes[expert - span.start])
        for group in sharding_groups(self.codes):
            for scales in of_experts:
                # The largest: none is negative, and ranks have 0 for the experts of others.
                scales.copy_(collective("all_reduce", scales, "max", group.group_name))

    def _quantize(self, weights: Tensor, expert: int, codes: Tensor) -> None:
        """Store one expert's weights [n], in pieces of whole blocks."""
        functional = nf4_functions()
        scales = torch.empty(self.absmax.shape[1], device=weights.device)
        for start in range(0, len(weights), PIECE):
            piece = weights[start : start + PIECE]
            packed, state = functional.quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4")
            first_byte = start // WEIGHTS_PER_BYTE
            codes[first_byte : first_byte + len(packed)] = packed.view(-1)
            first_block = start // BLOCK
            scales[first_block : first_block + len(state.absmax)] = state.absmax
        absmax, nested_absmax, _, offset = quantize_scales(scales)
        self.absmax[expert] = absmax
        self.nested_absmax[expert] = nested_absmax
        self.nested_offset[expert] = offset

    def frozen_stack(self) -> Nf4Stack:
        tensors = [local_part(self.codes), self.absmax, self.code]
        tensors += [self.nested_absmax, self.nested_code, self.nested_offset]
        return Nf4Stack(self.encoding, tensors, self.shape)

    def rounded(self, weight: StoredTensor | Tensor, first: int, last: int) -> Tensor:
        """The experts of a stack from `first` to before `last`, rounded as this stack does, dense
        on the CPU: [last - first, *stored_shape[1:]] in the compute dtype.
        """
        shape = torch.Size((last - first, *self.stored_shape[1:]))
        part = Nf4Experts(shape, is_transposed=self.is_transposed, compute_dtype=self.compute_dtype)
        part.allocate(torch.device("cpu"))
        part.store(weight, first)
        return part.dense()


def replace_nf4_stacks(model: nn.Module, compute_dtype: torch.dtype) -> list[str]:
    """Replace both stacks of every layer's experts by empty `Nf4Experts` of their shapes.

    Returns their names. Experts that Transformers does not call by its interface stay dense.
    """

    def empty(name: str, module: Any, weight: Tensor) -> Nf4Experts:
        transposed = bool(module.is_transposed)
        return Nf4Experts(weight.shape, is_transposed=transposed, compute_dtype=compute_dtype)

    return replace_stacks(model, empty)
