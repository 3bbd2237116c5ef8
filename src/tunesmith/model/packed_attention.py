"""Our own attention over packed documents on a GPU, where its kernels were measured."""

from typing import Any

import torch
from torch import Tensor

from tunesmith.model.attention_kernels import TORCH_KERNEL

NAME = "our own kernel"
# Compute capabilities on which it was measured to be faster than torch's: H100 and H200.
CAPABILITIES = ((9, 0),)
MEASURED_HEAD_DIM = 128  # of the layers that were measured
MEASURED_GROUPS = (4, 8)  # query heads per key head of these layers
# Results of `choose_kernel` that are slower there: torch's own kernel, and no kernel at all.
SLOWER = (TORCH_KERNEL, "")
# Of documents of 200 tokens to documents of 2,048 it gains less and less (2.4 and 1.4 times the
# speed), and longer ones were not measured.
LONGEST = 4096

_CHOSEN: set[str] = set()  # types of devices on which this process takes these kernels


def choose_packed(device: torch.device) -> None:
    """Let attention take these kernels from now on, in the layers that they take."""
    _CHOSEN.add(device.type)


def takes(device: torch.device, dtype: torch.dtype, head_dim: int, group: int) -> bool:
    """Return whether these kernels were measured on layers of this shape, without a window.

    group: query heads per key head.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    if dtype != torch.bfloat16 or head_dim != MEASURED_HEAD_DIM or group not in MEASURED_GROUPS:
        return False
    return torch.cuda.get_device_capability(device) in CAPABILITIES


def spans_if_chosen(cu_seqlens: Tensor, tokens: int, longest: int) -> Tensor | None:
    """`spans_of` where these kernels were chosen, and documents have at most `longest` tokens."""
    if longest > LONGEST or cu_seqlens.device.type not in _CHOSEN:
        return None
    return spans_of(cu_seqlens, tokens)


def spans_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The first token of each token's document, and one past its last: int32 [2, tokens]."""
    lengths = cu_seqlens.diff()
    starts, ends = (
        edges.repeat_interleave(lengths, output_size=tokens)
        for edges in (cu_seqlens[:-1], cu_seqlens[1:])
    )
    return torch.stack([starts, ends])


def _forward(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from tunesmith.model import packed_kernels  # Triton comes with torch for CUDA alone

    q, k, v = (x.contiguous() for x in (q, k, v))
    return packed_kernels.attend_forward(q, k, v, spans, scale)


def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    spans: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from tunesmith.model import packed_kernels

    d_out, q, k, v = (x.contiguous() for x in (d_out, q, k, v))
    return packed_kernels.attend_backward(d_out, q, k, v, out, log_sum, spans, scale)


packed_attention = torch.library.custom_op("tunesmith::packed_attention", _forward, mutates_args=())
packed_attention_backward = torch.library.custom_op(
    "tunesmith::packed_attention_backward", _backward, mutates_args=()
)


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
