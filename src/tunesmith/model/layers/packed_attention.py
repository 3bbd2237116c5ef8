"""Our own CUDA kernels for attention over packed documents, and the conditions for their use."""

from typing import Any

import torch
from torch import Tensor

from tunesmith.model.layers.attention_kernels import TORCH_KERNEL

NAME = "our own kernel"
# Compute capabilities of the GPUs on which our kernels were faster than torch's: H100 and H200.
CAPABILITIES = ((9, 0),)
MEASURED_HEAD_DIM = 128  # head width of the measured layers
MEASURED_GROUPS = (4, 8)  # query heads per key head of the measured layers
# Results of `choose_kernel` for which our kernels are used: torch's FlashAttention 2, which is
# slower, or "" if no kernel of torch is correct.
SLOWER = (TORCH_KERNEL, "")
# Maximum document length. The speedup decreases from 2.4 for documents of 200 tokens to 1.4 for
# 2,048 tokens. Documents longer than LONGEST were not measured.
LONGEST = 4096

_CHOSEN: set[str] = set()  # device types on which this process uses our kernels


def choose_packed(device: torch.device) -> None:
    """Use our kernels on this type of device from now on, in the layers that they support."""
    _CHOSEN.add(device.type)


def takes(device: torch.device, dtype: torch.dtype, head_dim: int, group: int) -> bool:
    """Return whether our kernels support layers of this shape without a sliding window.

    Args:
        group: number of query heads per key head.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    if dtype != torch.bfloat16 or head_dim != MEASURED_HEAD_DIM or group not in MEASURED_GROUPS:
        return False
    return torch.cuda.get_device_capability(device) in CAPABILITIES


def spans_if_chosen(cu_seqlens: Tensor, tokens: int, longest: int) -> Tensor | None:
    """Return the result of `spans_of` if our kernels are used for these documents, else None.

    Our kernels are not used if a document has more than LONGEST tokens.
    """
    if longest > LONGEST or cu_seqlens.device.type not in _CHOSEN:
        return None
    return spans_of(cu_seqlens, tokens)


def spans_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return for each token the start and the end of its document: int32 [2, tokens]."""
    lengths = cu_seqlens.diff()
    starts, ends = (
        edges.repeat_interleave(lengths, output_size=tokens)
        for edges in (cu_seqlens[:-1], cu_seqlens[1:])
    )
    return torch.stack([starts, ends])


@torch.library.custom_op("tunesmith::packed_attention", mutates_args=())
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    from tunesmith.model.layers import (
        packed_kernels,  # Triton is installed only with torch for CUDA
    )

    q, k, v = (x.contiguous() for x in (q, k, v))
    return packed_kernels.attend_forward(q, k, v, spans, scale)


@torch.library.custom_op("tunesmith::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    spans: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from tunesmith.model.layers import packed_kernels

    d_out, q, k, v = (x.contiguous() for x in (d_out, q, k, v))
    return packed_kernels.attend_backward(d_out, q, k, v, out, log_sum, spans, scale)


@packed_attention.register_fake
def _(q, k, v, spans, scale):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@packed_attention_backward.register_fake
def _(d_out, q, k, v, out, log_sum, spans, scale):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, spans, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, spans)


def _differentiate(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Any, ...]:
    gradients = packed_attention_backward(d_out, *ctx.saved_tensors, ctx.scale)
    return *gradients, None, None


packed_attention.register_autograd(_differentiate, setup_context=_save)
