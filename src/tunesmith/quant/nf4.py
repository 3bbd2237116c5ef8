"""Frozen linear layers with a 4-bit weight: NF4 of QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

The format is bitsandbytes': blocks of 64 weights as 4-bit codes, one scale a block, and the scales themselves in 8 bits
(double quantization). Its own layer is not used: it repacks its weight inside a forward on some CPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tunesmith.errors import MachineError, ModelError, first_line
from tunesmith.model.weights import WeightSource, copy_whole
from tunesmith.quant.frozen_matmul import FrozenLinear, linear_names
from tunesmith.quant.frozen_weight import FrozenWeight, Nf4Weight, nf4_functions

BLOCK = 64  # weights that share a scale
NESTED_BLOCK = 256  # scales that share a scale
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
    except (RuntimeError, NotImplementedError) as error:
        raise MachineError(
            f"the installed bitsandbytes has no nf4 for {device.type}",
            where="model.quantize",
            why=first_line(error),
            fix="pip install --upgrade bitsandbytes, or model.quantize=none; `python -m bitsandbytes` tells more",
        ) from error


class Nf4Linear(FrozenLinear):
    """A linear layer with W in NF4; empty until `quantize` or `load_quantized`.

    Attributes (frozen parameters and buffers; n = out_features * in_features):
        weight: uint8 [(n + 1) // 2, 1], two codes a byte.
        absmax: uint8 [blocks], the scale of each block of 64: a code, or fp32 without double quantization.
        code: fp32 [16], the value of each 4-bit code.
        nested_absmax: fp32 [ceil(blocks / 256)]; nested_code: fp32 [256]; nested_offset: fp32 []; or None.
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
        count = in_features * out_features
        blocks = -(-count // BLOCK)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=compute_dtype, device=device)) if bias else None
        packed = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device=device)
        absmax = torch.empty(blocks, dtype=torch.uint8, device=device)
        fp32 = [torch.empty(shape, device=device) for shape in ((16,), (-(-blocks // NESTED_BLOCK),), (256,), ())]
        self._store(f"nf4 {BLOCK} {NESTED_BLOCK} {compute_dtype}", packed, absmax, *fp32)

    def _store(self, kind: str, packed: Tensor, *scales: Tensor) -> None:
        self.kind, self.weight = kind, nn.Parameter(packed, requires_grad=False)
        # Not persistent: a dense checkpoint does not hold them, and its reader would miss them.
        for name, tensor in zip_longest(SCALES, scales):
            self.register_buffer(name, tensor, persistent=False)

    def share(self, other: Nf4Linear) -> None:
        """Store the very tensors of another layer of the same shape."""
        self._store(other.kind, *other.frozen_weight().tensors)
        self.bias = other.bias

    @torch.no_grad()
    def quantize(self, dense: Tensor) -> None:
        """Store `dense` [out_features, in_features], rounded to the compute dtype first, as Transformers does."""
        self._store_state(*self._quantized(dense))

    @torch.no_grad()
    def quantize_part(self, dense: Tensor, dim: int, index: int, count: int) -> None:
        """Quantize `dense` whole, of which this layer is part `index` of `count` equal ones along `dim`, and store that part.

        Its values are those of the whole, whose scales share scales: where a part of these does not lie in one piece, its own
        scales are fp32 (4.5 bits a weight in place of 4.13). Rows, and parts of them, are blocks of 64 weights.
        """
        packed, state = self._quantized(dense)
        functional, rows = nf4_functions(), len(dense)

        def part(tensor: Tensor) -> Tensor:
            return tensor.view(rows, -1).chunk(count, dim)[index].clone(memory_format=torch.contiguous_format).view(-1)

        if dim == 0 and len(part(state.absmax)) % NESTED_BLOCK == 0:
            state.absmax, state.state2.absmax = part(state.absmax), state.state2.absmax.chunk(count)[index].clone()
        else:
            absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
            state.absmax, state.nested = part(absmax), False
        self._store_state(part(packed), state)

    def _quantized(self, dense: Tensor) -> Any:
        return nf4_functions().quantize_4bit(
            dense.to(self.compute_dtype).contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
        )

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
        self._store_state(parts[""].contiguous().view(torch.uint8), state)

    def _store_state(self, packed: Tensor, state: Any) -> None:
        nested = (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
        kind = f"nf4 {state.blocksize} {state.state2.blocksize if nested else 0} {state.dtype}"
        codes = packed.reshape(-1, 1)
        if isinstance(self.weight, DTensor):  # sharded: the parameter that FSDP knows stays
            copy_whole(self.weight, codes)
            self.kind = kind
            for name, tensor in zip_longest(SCALES, (state.absmax, state.code, *nested)):
                self.register_buffer(name, tensor, persistent=False)
        else:
            self._store(kind, codes, state.absmax, state.code, *nested)

    def frozen_weight(self) -> FrozenWeight:
        tensors = [self.weight, self.absmax, self.code]
        if self.nested_absmax is not None:
            tensors += [self.nested_absmax, self.nested_code, self.nested_offset]
        return Nf4Weight(self.kind, tensors, (self.out_features, self.in_features))


def load_hooks(model: nn.Module) -> dict[str, Any]:
    """For `load_weights(convert=...)`: each NF4 weight is quantized from a dense tensor, or loaded as it was quantized."""

    def load(layer: Nf4Linear, name: str, stored: Mapping[str, WeightSource]) -> None:
        # Where the matmuls are: a shard may lie on the host.
        parts = {suffix: part.read().to(layer.absmax.device) for suffix, part in stored.items()}
        if len(parts) == 1:
            layer.quantize(parts[""])
        else:
            layer.load_quantized(parts, where=name)

    return {f"{n}.weight": partial(load, m, n) for n, m in model.named_modules() if isinstance(m, Nf4Linear)}


def replace_linears(model: nn.Module, compute_dtype: torch.dtype) -> list[str]:
    """Replace every `nn.Linear` but the output layer with an empty `Nf4Linear` of its shape; return their names."""
    names = linear_names(model, head=False)
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        model.set_submodule(name, Nf4Linear(old.in_features, old.out_features, old.bias is not None, compute_dtype))
    return names
