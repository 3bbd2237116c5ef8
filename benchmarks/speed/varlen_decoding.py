"""Measurement of torch's `varlen_attn` for decoding: one query per slot, and keys of many lengths.

    python benchmarks/speed/varlen_decoding.py --json out.json [--small]

The keys and values have the layout [slots, room, kv heads, d], as static tensors of a CUDA graph
would have. `seqused_k` has the number of keys of each slot. FlashAttention lets the query heads of
a key head share its keys only if both sides of the window are -1, so both windows are measured,
each eagerly and in a CUDA graph. Each case has the error relative to matmuls in fp32, also after
the graph was replayed with other lengths. The report is written after each case.

The `varlen_attn` of torch 2.11 has no `seqused_k`, so the operator that it calls is measured there.

On a CPU, `scaled_dot_product_attention` replaces `varlen_attn`, and there is no graph, so that
everything else in this script is tested.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from step_reports import measure_cases
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from tunesmith.metrics.hardware import seconds_of
from tunesmith.runtime.device import choose_device

SLOTS = (64, 256)
WINDOWS = ((-1, -1), (-1, 0))
HEADS, KV_HEADS, WIDTH, ROOM = 32, 8, 128, 704  # Qwen3-4B, with a prompt of 150 and 512 tokens
HAS_LENGTHS = "seqused_k" in inspect.signature(varlen_attn).parameters
CALLS = 36  # attention calls in a graph: one per layer


class Inputs(NamedTuple):
    """One query per slot, and the keys and values of all slots.

    Attributes:
        q: [slots, heads, d].
        keys, values: [slots, room, kv heads, d].
        lengths: int32 [slots], the number of keys of each slot.
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor


def draw_inputs(slots: int, room: int, device: torch.device) -> Inputs:
    """Draw queries, keys and values in bf16, and lengths from half of the room to the room."""
    source = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=source, device=device, dtype=torch.float32)
        return values.to(torch.bfloat16)

    return Inputs(
        draw(slots, HEADS, WIDTH),
        draw(slots, room, KV_HEADS, WIDTH),
        draw(slots, room, KV_HEADS, WIDTH),
        draw_lengths(slots, room, device, seed=1),
    )


def draw_lengths(slots: int, room: int, device: torch.device, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    lengths = torch.randint(room // 2, room + 1, (slots,), generator=source, dtype=torch.int32)
    return lengths.to(device)


def expected(inputs: Inputs) -> Tensor:
    """Compute the attention by matmuls in fp32."""
    q, keys, values, lengths = inputs
    groups = q.float().unflatten(1, (KV_HEADS, -1))
    scores = torch.einsum("skgd,srkd->skgr", groups, keys.float()) * WIDTH**-0.5
    is_masked = torch.arange(keys.shape[1], device=q.device) >= lengths.unsqueeze(1)
    scores = scores.masked_fill(is_masked[:, None, None], float("-inf"))
    return torch.einsum("skgr,srkd->skgd", scores.softmax(-1), values.float()).flatten(1, 2)


def attention_of(inputs: Inputs, window: tuple[int, int]) -> Callable[[], Tensor]:
    """Return a function without arguments that computes the attention."""
    q, keys, values, lengths = inputs
    slots, room = keys.shape[:2]
    if q.device.type == "cpu":
        return lambda: stand_in(inputs)
    edges_q = torch.arange(slots + 1, dtype=torch.int32, device=q.device)
    edges_k = edges_q * room

    inputs_of_kernel = (q, keys.flatten(0, 1), values.flatten(0, 1), edges_q, edges_k, 1, room)

    def attend() -> Tensor:
        out = varlen_attn(*inputs_of_kernel, window_size=window, enable_gqa=True, seqused_k=lengths)
        assert isinstance(out, Tensor)
        return out

    def call_operator() -> Tensor:
        out, *_ = torch.ops.aten._flash_attention_forward(
            *inputs_of_kernel,
            0.0,
            window == (-1, 0),
            return_debug_mask=False,
            window_size_left=window[0],
            window_size_right=window[1],
            seqused_k=lengths,
        )
        return out

    return attend if HAS_LENGTHS else call_operator


def stand_in(inputs: Inputs) -> Tensor:
    """Compute the attention on a CPU."""
    q, keys, values, lengths = inputs
    is_seen = torch.arange(keys.shape[1]) < lengths.unsqueeze(1)
    out = F.scaled_dot_product_attention(
        q.unsqueeze(2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        is_seen[:, None, None],
        enable_gqa=True,
    )
    return out.squeeze(2)


def captured(function: Callable[[], Tensor]) -> tuple[Callable[[], object], Callable[[], Tensor]]:
    """Capture CALLS calls of a function in a CUDA graph.

    Returns:
        A function that replays the graph, and a function that returns the output of the last call.
    """
    if not torch.cuda.is_available():
        outputs: list[Tensor] = []

        def replay() -> None:
            outputs[:] = [function() for _ in range(CALLS)]

        return replay, lambda: outputs[-1]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            out = function()
    return graph.replay, lambda: out


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())


def measure_case(
    slots: int, room: int, window: tuple[int, int], device: torch.device
) -> dict[str, float]:
    """Return the errors, and the microseconds of one call, eagerly and in a graph."""
    inputs = draw_inputs(slots, room, device)
    attend = attention_of(inputs, window)
    report = {"error": relative_error(attend(), expected(inputs))}
    report["eager_us"] = 1e6 * seconds_of(attend)
    replay, last = captured(attend)
    inputs.lengths.copy_(draw_lengths(slots, room, device, seed=2))
    replay()
    report["error_in_graph_with_other_lengths"] = relative_error(last(), expected(inputs))
    report["graph_us"] = 1e6 * seconds_of(replay) / CALLS
    bytes_read = 2 * int(inputs.lengths.sum()) * KV_HEADS * WIDTH * inputs.keys.element_size()
    report["graph_tb_per_s"] = bytes_read / report["graph_us"] / 1e6
    return report


def main() -> None:
    """Measure each case, and write the report after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    device = choose_device()
    cases = {}
    for slots in SLOTS:
        for window in WINDOWS:
            sizes = (4, 32) if args.small else (slots, ROOM)
            measure = partial(measure_case, *sizes, window, device)
            cases[f"{slots} slots, window {window}"] = measure
    measure_cases(cases, args.json, {"torch": torch.__version__, "public": HAS_LENGTHS})


if __name__ == "__main__":
    main()
