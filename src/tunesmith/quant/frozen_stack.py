"""Frozen weights of all experts of a layer, in one tensor: dequantized for some experts at a time.

- dense: the stack itself.
- nf4: 4-bit codes and their scales; each expert is quantized by itself, as a linear layer is.
- shipped, mxfp4, nvfp4: what a checkpoint in FP8, MXFP4 or NVFP4 holds.

As `frozen_weight` is for a linear layer: `encoding` and `tensors` describe a stack in full, and
`frozen_stack` builds it again from them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.model.fp4 import compiled_mxfp4, decode_mxfp4
from tunesmith.quant.frozen_weight import (
    PIECE,
    Nf4Encoding,
    Nvfp4Weight,
    ShippedEncoding,
    ShippedWeight,
    nf4_functions,
)

# Of a stack that is dense at a time, where all experts are multiplied by one kernel: a stack of
# Qwen3-30B-A3B or of gpt-oss-20b takes less in 16 bits, one of gpt-oss-120b 4 GiB.
DENSE_BYTES = 1 << 30
# A word of an encoding: the stack is stored as [experts, in, out], not [experts, out, in].
TRANSPOSED = "transposed"


class FrozenStack(ABC):
    """The weights that the rows of each expert are multiplied with; they get no gradient.

    Attributes:
        encoding: a key of STACK_CLASSES, and the options of its class after it.
        tensors: what stores the weights.
        shape: (experts, in_features, out_features).
        is_compiled: the compiler runs, and may make a kernel of its own for `dense`.
    """

    def __init__(
        self,
        encoding: str,
        tensors: Sequence[Tensor],
        shape: tuple[int, int, int],
        *,
        is_compiled: bool = False,
    ) -> None:
        self.encoding = encoding
        self.tensors = tensors
        self.shape = shape
        self.is_compiled = is_compiled

    @property
    def is_transposed(self) -> bool:
        """Whether it is stored as [experts, in, out]."""
        return self.encoding.endswith(TRANSPOSED)

    def experts_at_once(self, dtype: torch.dtype) -> int:
        """So many experts are at most DENSE_BYTES when dense; one, if it is larger."""
        experts, in_features, out_features = self.shape
        of_expert = in_features * out_features * dtype.itemsize
        return min(experts, max(1, DENSE_BYTES // of_expert))

    @abstractmethod
    def dense(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """The experts from `first` to before `last`: [last - first, in, out], y = x W.

        A view where it is stored so, and transposed where it is stored as [experts, out, in].
        """


class DenseStack(FrozenStack):
    """tensors: W [experts, out, in], or [experts, in, out]: "transposed" is in the encoding."""

    @classmethod
    def of(cls, weight: Tensor, *, is_transposed: bool) -> "DenseStack":
        """`weight` as a module of Transformers has it."""
        if is_transposed:
            experts, in_features, out_features = weight.shape
            return cls(f"dense {TRANSPOSED}", [weight], (experts, in_features, out_features))
        experts, out_features, in_features = weight.shape
        return cls("dense", [weight], (experts, in_features, out_features))

    def experts_at_once(self, dtype: torch.dtype) -> int:
        """All where they are in this dtype: `dense` is a view then."""
        if self.tensors[0].dtype == dtype:
            return self.shape[0]
        return super().experts_at_once(dtype)

    def dense(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        weight = self.tensors[0][first:last].to(dtype)
        return weight if self.is_transposed else weight.mT


class Nf4Stack(FrozenStack):
    """A stack in NF4.

    tensors: the codes and buffers of an `Nf4Experts` in the order of its docstring. encoding: an
    `Nf4Encoding`, and TRANSPOSED.
    """

    def dense(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        functional = nf4_functions()
        codes, _, code, *_ = self.tensors
        encoding = Nf4Encoding.parse(self.encoding.removesuffix(f" {TRANSPOSED}"))
        scales = self._scales(first, last, encoding.nested_block)
        experts, blocks = scales.shape
        # One call for all of them: blocks do not reach from one expert into the next.
        state = functional.QuantState(
            absmax=scales.flatten(),
            shape=torch.Size((experts, blocks * encoding.block)),
            code=code,
            blocksize=encoding.block,
            quant_type="nf4",
            dtype=encoding.dtype,
        )
        weights: Tensor = functional.dequantize_4bit(codes[first:last].reshape(-1, 1), state)
        _, in_features, out_features = self.shape
        # Without what fills up an expert's last block.
        weights = weights.to(dtype)[:, : in_features * out_features]
        if self.is_transposed:
            return weights.unflatten(1, (in_features, out_features))
        return weights.unflatten(1, (out_features, in_features)).mT

    def _scales(self, first: int, last: int, nested_block: int) -> Tensor:
        """The scale of each block of some experts: fp32 [last - first, blocks]."""
        _, absmax, _, nested_absmax, nested_code, nested_offset = self.tensors
        scales = nested_code[absmax[first:last].int()]
        of_scales = nested_absmax[first:last].repeat_interleave(nested_block, 1)
        scales.mul_(of_scales[:, : scales.shape[1]])
        return scales.add_(nested_offset[first:last, None])


class Mxfp4Stack(FrozenStack):
    """A stack in MXFP4, whose experts are stored as [out, in].

    tensors: blocks uint8 [experts, out, groups, 16] and exponents uint8 [experts, out, groups].
    """

    def dense(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        blocks, exponents = (tensor[first:last].flatten(0, 1) for tensor in self.tensors)
        _, in_features, out_features = self.shape
        if self.is_compiled:
            dense = compiled_mxfp4()(blocks, exponents, dtype)
            return dense.view(last - first, out_features, in_features).mT
        dense = blocks.new_empty(len(blocks), in_features, dtype=dtype)
        # bf16 has every value of MXFP4, fp16 has not.
        exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        step = max(1, PIECE // in_features)  # rows that are looked up at a time
        for start in range(0, len(blocks), step):
            rows = slice(start, start + step)
            decode_mxfp4(blocks[rows], exponents[rows], exact, out=dense[rows])
        return dense.view(last - first, out_features, in_features).mT


class ShippedStack(FrozenStack):
    """A stack of an FP8 checkpoint, which stores its experts one by one, and an expert in one part
    or two (gate and up).

    tensors: the e4m3 codes [experts, out, in], and their scales: fp32 [experts, parts, block rows,
    block columns]. encoding: a `ShippedEncoding`; the blocks begin anew in each part.
    """

    def dense(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        codes, scales = self.tensors
        _, in_features, out_features = self.shape
        encoding = ShippedEncoding.parse(self.encoding)
        height = out_features // scales.shape[1]
        # Rows of a block; where one scale stands for a whole part, all rows of the part.
        rows = encoding.rows or height
        codes = codes[first:last].flatten(0, 1)
        scales = scales[first:last].flatten(0, 1)
        # Where each part has whole blocks alone, all parts are dequantized as one matrix.
        parts_at_once = len(scales) if height % rows == 0 else 1
        step = parts_at_once * height
        matrices = []
        for part in range(0, len(scales), parts_at_once):
            tensors = [
                codes[part * height : part * height + step],
                scales[part : part + parts_at_once].flatten(0, 1),
            ]
            blocks = str(ShippedEncoding(rows, encoding.columns))
            matrices.append(ShippedWeight(blocks, tensors, (step, in_features)).dense(dtype))
        dense = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        return dense.view(last - first, out_features, in_features).mT


class Nvfp4Stack(FrozenStack):
    """A stack of an NVFP4 checkpoint, whose experts are in one part or two as in a `ShippedStack`.

    tensors: the codes, uint8 [experts, out, in / 2]; the scales of groups, e4m3 [experts, out, in /
    16]; and those of whole parts: fp32 [experts, parts]. encoding: an `Nvfp4Encoding`.
    """

    def dense(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        codes, scales, of_parts = (tensor[first:last] for tensor in self.tensors)
        _, in_features, out_features = self.shape
        # One matrix of all of them, whose rows have the scale of their part.
        height = out_features // of_parts.shape[1]
        of_rows = of_parts.flatten().repeat_interleave(height).unsqueeze(1)
        tensors = [codes.flatten(0, 1), scales.flatten(0, 1), of_rows]
        shape = (len(of_rows), in_features)
        dense = Nvfp4Weight(self.encoding, tensors, shape).dense(dtype)
        return dense.view(last - first, out_features, in_features).mT


STACK_CLASSES: dict[str, type[FrozenStack]] = {
    "dense": DenseStack,
    "nf4": Nf4Stack,
    "mxfp4": Mxfp4Stack,
    "shipped": ShippedStack,
    "nvfp4": Nvfp4Stack,
}


def frozen_stack(
    encoding: str,
    tensors: Sequence[Tensor],
    shape: tuple[int, int, int],
    *,
    is_compiled: bool = False,
) -> FrozenStack:
    """The stack of this encoding; see `FrozenStack`."""
    name = encoding.split(maxsplit=1)[0]
    return STACK_CLASSES[name](encoding, tensors, shape, is_compiled=is_compiled)
