"""A frozen linear layer whose weight is held in 4 bits: NF4 of QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

The format is bitsandbytes': blocks of 64 weights as 4-bit codes, one fp32 scale a block, and the scales themselves held
in 8 bits (double quantisation). Only the format and its public functions are used. bitsandbytes' own layer repacks its
weight inside a forward on some CPUs and answers differently afterwards; here the packed tensors are never written to,
and the dense weight is made again in the backward instead of being kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tunesmith import packages
from tunesmith.errors import MachineError, ModelError, first_line
from tunesmith.model.weights import Source
from tunesmith.quant import frozen_matmul

BLOCK = 64  # weights that share a scale
NESTED_BLOCK = 256  # scales that share a scale


def bitsandbytes() -> Any:
    """`bitsandbytes.functional`, or a MachineError that says how to install it."""
    return packages.bitsandbytes("nf4 weights", "model.quantize")


@torch.no_grad()
def check_nf4(device: torch.device) -> None:
    """Pack and unpack a small weight, to find out before anything is fetched or loaded.

    Raises:
        MachineError: bitsandbytes is not installed, or has no nf4 for this device: wheels are built for some versions of
            CUDA, and say so in their first call only.
    """
    try:
        layer = Nf4Linear(BLOCK, BLOCK, False, torch.bfloat16, device=device)
        layer.quantise(torch.ones(BLOCK, BLOCK, device=device))
        layer.dense()
    except (RuntimeError, NotImplementedError) as error:
        raise MachineError(
            f"the installed bitsandbytes has no nf4 for {device.type}",
            where="model.quantize",
            why=first_line(error),
            fix="pip install --upgrade bitsandbytes, or model.quantize=none; `python -m bitsandbytes` tells more",
        ) from error


class Blocks(NamedTuple):
    """How a packed weight is cut.

    size: weights that share a scale. nested: scales that share a scale, or None for plain fp32 scales.
    dtype: what the codes were made from, and are turned back into.
    """

    size: int
    nested: int | None
    dtype: torch.dtype


class Nf4Linear(nn.Module):
    """y = x W^T + b with W held in NF4.

    Attributes (frozen parameters and buffers; n = out_features * in_features):
        weight: uint8 [(n + 1) // 2, 1], two codes a byte.
        absmax: uint8 [blocks], the 8-bit scale of each block of 64.
        code: fp32 [16], the value of each 4-bit code.
        nested_absmax: fp32 [ceil(blocks / 256)]; nested_code: fp32 [256]; nested_offset: fp32 [].
        bias: compute_dtype [out_features], or None.
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
        packed = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self._is_held(Blocks(BLOCK, NESTED_BLOCK, compute_dtype))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=compute_dtype, device=device)) if bias else None
        # Not persistent: they are not in a dense checkpoint, whose reader would miss them.
        self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8, device=device), persistent=False)
        self.register_buffer("code", torch.empty(16, device=device), persistent=False)
        self.register_buffer("nested_absmax", torch.empty(-(-blocks // NESTED_BLOCK), device=device), persistent=False)
        self.register_buffer("nested_code", torch.empty(256, device=device), persistent=False)
        self.register_buffer("nested_offset", torch.empty((), device=device), persistent=False)

    def _is_held(self, blocks: Blocks) -> None:
        self.blocks, self.kind = blocks, f"nf4 {blocks}"
        frozen_matmul.KINDS.setdefault(self.kind, Nf4Kind(blocks))

    def take(self, other: Nf4Linear) -> None:
        """Hold the very tensors of another layer."""
        self.weight, self.bias = other.weight, other.bias
        self._is_held(other.blocks)
        for name, buffer in other.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=False)

    @torch.no_grad()
    def quantise(self, dense: Tensor) -> None:
        """Hold `dense` [out_features, in_features], rounded to the compute dtype first, as Transformers does."""
        packed, state = bitsandbytes().quantize_4bit(
            dense.to(self.compute_dtype).contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
        )
        self._hold(packed, state)

    @torch.no_grad()
    def take_packed(self, parts: dict[str, Tensor], *, where: str) -> None:
        """Hold a weight that bitsandbytes has packed.

        Args:
            parts: the checkpoint's tensors of this weight: "" the codes, and by the rest of their name `absmax`,
                `quant_map`, `quant_state.bitsandbytes__nf4`, and for double quantisation `nested_absmax`,
                `nested_quant_map`.
            where: the weight's name, for errors.

        Raises:
            ModelError: the tensors are not a whole NF4 weight of this layer's shape.
        """
        state_of = bitsandbytes().QuantState.from_dict
        rest = {name: tensor for name, tensor in parts.items() if name}
        try:
            state = state_of(rest, device=parts[""].device)
        except (KeyError, ValueError, AssertionError) as error:
            raise ModelError(f"its bitsandbytes tensors are not whole: {error}", where=where) from error
        if state.quant_type != "nf4" or tuple(state.shape) != (self.out_features, self.in_features):
            raise ModelError(
                f"held as {state.quant_type} of shape {tuple(state.shape)}, and nf4 of shape "
                f"{(self.out_features, self.in_features)} is needed",
                where=where,
            )
        self._hold(parts[""].contiguous().view(torch.uint8), state)

    def _hold(self, packed: Tensor, state: Any) -> None:
        self.weight = nn.Parameter(packed.reshape(-1, 1), requires_grad=False)
        self._is_held(Blocks(state.blocksize, state.state2.blocksize if state.nested else None, state.dtype))
        self.register_buffer("absmax", state.absmax, persistent=False)
        self.register_buffer("code", state.code, persistent=False)
        if state.nested:
            self.register_buffer("nested_absmax", state.state2.absmax, persistent=False)
            self.register_buffer("nested_code", state.state2.code, persistent=False)
            self.register_buffer("nested_offset", state.offset, persistent=False)
        else:
            for name in ("nested_absmax", "nested_code", "nested_offset"):
                self.register_buffer(name, None, persistent=False)

    def held(self) -> frozen_matmul.FrozenWeight:
        """The packed weight in the form that the products take."""
        tensors = [self.weight, self.absmax, self.code]
        if self.nested_absmax is not None:
            tensors += [self.nested_absmax, self.nested_code, self.nested_offset]
        return frozen_matmul.FrozenWeight(self.kind, tensors, self.out_features)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The weight, [out_features, in_features] in the compute dtype; a new tensor each time."""
        shape = (self.out_features, self.in_features)
        return _unpack(self.held().tensors, shape, self.blocks).to(self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        return frozen_matmul.grouped_matmul(x, [self.held()], [self.bias])[0]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, nf4"


class Nf4Kind:
    """Products with an NF4 weight. It is made dense in the forward and again in the backward, and dropped at once: a
    dense copy of every layer would undo the saving of 4 bits."""

    adds = True

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.tensors = 3 if blocks.nested is None else 6
        self.dense = frozen_matmul.DenseKind()

    def quantise(self, x: Tensor) -> list[Tensor]:
        return []

    def times(
        self,
        x: Tensor,
        quantised: Sequence[Tensor],
        weight: Sequence[Tensor],
        update: frozen_matmul.LowRankUpdate | None,
    ) -> Tensor:
        w = _unpack(weight, (weight[0].numel() * 2 // x.shape[1], x.shape[1]), self.blocks)
        return self.dense.times(x, (), [w.to(x.dtype)], update)

    def back(self, dy: Tensor, quantised: Sequence[Tensor], weight: Sequence[Tensor], onto: Tensor | None) -> Tensor:
        w = _unpack(weight, (dy.shape[1], weight[0].numel() * 2 // dy.shape[1]), self.blocks)
        return self.dense.back(dy, (), [w.to(dy.dtype)], onto)


def _unpack(tensors: Sequence[Tensor], shape: tuple[int, int], blocks: Blocks) -> Tensor:
    functional = bitsandbytes()
    packed, absmax, code, *outer = tensors
    nested, offset = None, None
    if outer:
        nested_absmax, nested_code, offset = outer
        nested = functional.QuantState(
            absmax=nested_absmax, blocksize=blocks.nested, code=nested_code, dtype=torch.float32
        )
    state = functional.QuantState(
        absmax=absmax,
        shape=torch.Size(shape),
        code=code,
        blocksize=blocks.size,
        quant_type="nf4",
        dtype=blocks.dtype,
        offset=offset,
        state2=nested,
    )
    dense: Tensor = functional.dequantize_4bit(packed, state)
    return dense


def hooks(model: nn.Module) -> dict[str, Any]:
    """For `load_weights(convert=...)`: each NF4 weight is quantised from the checkpoint's, or taken over ready-made."""
    return {f"{n}.weight": partial(_fill, m, n) for n, m in model.named_modules() if isinstance(m, Nf4Linear)}


def _fill(layer: Nf4Linear, name: str, stored: Mapping[str, Source]) -> None:
    device = layer.weight.device
    parts = {suffix: part.read().to(device) for suffix, part in stored.items()}
    if len(parts) == 1:
        layer.quantise(parts[""])
    else:
        layer.take_packed(parts, where=name)


def replace_linears(model: nn.Module, compute_dtype: torch.dtype, *, skip: frozenset[str] = frozenset()) -> list[str]:
    """Swap every `nn.Linear` but the head and `skip` for an empty `Nf4Linear` of its shape; return their names."""
    from transformers import PreTrainedModel

    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name not in skip
    ]
    for name in names:
        old = model.get_submodule(name)
        new = Nf4Linear(old.in_features, old.out_features, old.bias is not None, compute_dtype)  # type: ignore[arg-type]
        model.set_submodule(name, new)
    return names
