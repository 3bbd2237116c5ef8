"""How many tokens one forward pass takes, and whether layers are run again in the backward: an estimate, not a promise.

What is held per token and layer without recompute, in elements, for a Llama-like block whose base is frozen: six
vectors of the hidden width (block input, two norms' outputs, attention's output, two residuals), q, k and v, and
four of the MLP's width (gate, up, their product, its gradient). With recompute only the block's input is held, and one
block's worth at a time. For an 8B LoRA run at 16,384 tokens
it says 101 GiB, weights included, where 86 were measured: it errs on the careful side.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith.config.schema import Run
from tunesmith.model.facts import Facts
from tunesmith.optim import state_bytes_per_parameter

MOST_TOKENS = {"cuda": 16384, "cpu": 4096}  # beyond these a larger block is not faster
WANTED_TOKENS = 8192  # below this the products on a GPU are too small: recompute is the better price
USABLE = 0.85  # of the free memory: the rest is the allocator's and the estimate's error
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class MemoryPlan:
    """What `auto` came to: tokens of a micro batch, full recompute or none, and the estimate behind it in bytes."""

    micro_tokens: int
    recompute: bool
    static_bytes: int
    bytes_per_token: int
    free_bytes: int


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on `device`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(row.split()[1]) * 1024 for row in lines if row.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 8 << 30  # no /proc: a small laptop's worth, which only makes `auto` careful


def static_bytes(run: Run, facts: Facts, trained: int) -> int:
    """Weights, gradients and optimizer state, in bytes; `trained` counts the trained parameters."""
    weight = BYTES[run.model.dtype]
    if run.model.quantize == "nf4":
        base = int(facts.matmul_parameters * 0.56) + (facts.parameters - facts.matmul_parameters) * weight
    else:
        base = facts.parameters * weight
    # An adapter's weights are fp32 and not in the base.
    each = 4 + state_bytes_per_parameter(run.train, 4)
    return base + int(trained * (each if run.adapter.kind == "lora" else state_bytes_per_parameter(run.train, weight)))


def bytes_per_token(run: Run, facts: Facts, *, recompute: bool) -> int:
    """Activations that the backward needs, in bytes per token."""
    block = 6 * facts.hidden + facts.head_dim * (facts.heads + 2 * facts.kv_heads) + 4 * facts.intermediate
    elements = facts.layers * facts.hidden + block if recompute else facts.layers * block
    return elements * BYTES[run.model.dtype]


def plan(run: Run, facts: Facts, device: torch.device, *, trained: int) -> MemoryPlan:
    """Resolve `train.micro_batch: auto` and `train.recompute: auto` by what is free on the device."""
    free, static, seq = free_bytes(device), static_bytes(run, facts, trained), run.data.seq_len
    room = max(0, int(free * USABLE) - static)
    most = max(seq, MOST_TOKENS.get(device.type, 4096))

    def fitting(recompute: bool) -> int:
        return min(most, room // bytes_per_token(run, facts, recompute=recompute))

    wanted = max(seq, min(WANTED_TOKENS, most))
    recompute = {"none": False, "full": True}.get(run.train.recompute, fitting(False) < wanted)
    tokens = max(seq, fitting(recompute) // seq * seq)
    return MemoryPlan(tokens, recompute, static, bytes_per_token(run, facts, recompute=recompute), free)
