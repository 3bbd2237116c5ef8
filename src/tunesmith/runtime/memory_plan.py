"""How many tokens one forward pass takes, and how many layers are run again in the backward.

Both are chosen together, for the least time: a larger micro batch spreads what a pass costs whatever its size (reading
or unpacking every weight, launching every kernel), a smaller one leaves memory in which more layers keep what they
computed. The estimate is of what the backward needs; `fit.py` corrects it by a trial on the real model.

Kept per token and layer of a Llama-like block, in elements, where the layer is compiled: five vectors of the hidden
width (the block's input, the sum after attention, the two normed inputs, attention's output), q, k and v, and three of
the MLP's width (gate, up, and their product). Without a compiler one more of each. A layer that is run again keeps its
input alone. At 16,384 tokens of an 8B LoRA run this comes to 68 GiB; 69 were measured (85.7 less 16.3 of weights, on an
H200, by a trial that this engine grew from).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tunesmith.config.schema import Run, Train
from tunesmith.data.loader import StepSize
from tunesmith.loss import chunk_size
from tunesmith.model.spec import ModelSpec
from tunesmith.optim import state_bytes_per_parameter
from tunesmith.runtime.compilation import should_compile
from tunesmith.units import Size

MOST_TOKENS = {"cuda": 16384, "cpu": 4096}  # beyond these a larger block is not faster
USABLE = 0.9  # of the free memory: the rest is the allocator's
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# What a pass costs whatever its size, as the tokens whose work takes as long: the weights' way through memory against
# four operations a weight and token, at the 4 TB/s and 700 TFLOP/s of an H200; and unpacking nf4 adds about as much.
PASS_TOKENS = {"none": 160, "fp8": 320, "nf4": 320}
RERUN = {"full": 1 / 3, "lora": 1 / 2}  # a second forward, as a share of a step's work: 2 of 6 operations, or of 4


@dataclass(frozen=True)
class MemoryPlan:
    """What `auto` came to, and the estimate behind it.

    Attributes:
        micro_tokens: tokens of a micro batch, padding counted.
        recomputed: decoder layers that are run again in the backward.
        static_bytes: weights, gradients and optimizer state.
        kept_bytes: what one layer keeps of one token; rerun_bytes: if it is run again.
        free_bytes: memory that there was before anything was built.
        why: the choice in words.
    """

    micro_tokens: int
    recomputed: int
    static_bytes: int
    activation_bytes: int
    rerun_bytes: int
    free_bytes: int
    why: str


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on `device`, in bytes.

    Where GPU and host share it (GB10) the driver tells what is unused, not what can be had: there the host's figure
    counts, as on a CPU.
    """
    if is_discrete(device):
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(row.split()[1]) * 1024 for row in lines if row.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 8 << 30  # no /proc: a small laptop's worth, which only makes `auto` careful


def is_discrete(device: torch.device) -> bool:
    """Whether `device` is a GPU with memory of its own, where running out raises an error that can be caught."""
    return device.type == "cuda" and not torch.cuda.get_device_properties(device).is_integrated


def static_bytes(run: Run, facts: ModelSpec, trained: int) -> int:
    """Weights, gradients, optimizer state and a checkpoint's copies, in bytes; `trained` counts the trained parameters."""
    weight = BYTES[run.model.dtype]
    if run.model.quantize == "nf4":
        packed = facts.layers * facts.layer_matmul  # 4 bits, and 8 bits a block of 64
        base = int(packed * 0.53) + (facts.parameters - packed) * weight
    else:
        base = facts.parameters * weight
    return base + state_bytes(run, trained)


def state_bytes(run: Run, trained: int) -> int:
    """Gradients and optimizer state of what is trained, an adapter's own weights, and a copy for its checkpoints."""
    if run.adapter.kind == "none":
        return int(trained * state_bytes_per_parameter(run.train, BYTES[run.model.dtype]))
    # An adapter's weights are fp32 and not in the base. While its checkpoint is written, they and the moments lie there
    # twice.
    return int(trained * (4 + state_bytes_per_parameter(run.train, 4) + 12))


def optimizer_bytes(run: Run, trained: int) -> int:
    """Of `state_bytes` what a forward and backward without an optimizer has not brought yet: all but an adapter's own
    weights, and gradients in the weights' type."""
    weight = 4 if run.adapter.kind == "lora" else BYTES[run.model.dtype]
    return state_bytes(run, trained) - trained * weight * (2 if run.adapter.kind == "lora" else 1)


def activation_bytes(run: Run, facts: ModelSpec, *, compiled: bool) -> int:
    """What the backward needs of one layer that is not run again, in bytes per token."""
    more = 0 if compiled else 1
    block = (5 + more) * facts.hidden + facts.head_dim * (facts.heads + 2 * facts.kv_heads)
    return (block + (3 + more) * facts.intermediate) * BYTES[run.model.dtype]


def workspace_bytes(run: Run, facts: ModelSpec, device: torch.device, tokens: int) -> int:
    """What is there for a moment: one layer's gradients, the head's chunk of logits, the embeddings' rows."""
    # Raw logits, their fp32 form and the slope; a trained head's chunk is as `loss.chunk_size` makes it.
    chunk = 3 * 4 * facts.vocab * chunk_size(facts.vocab, device, trained=run.adapter.kind == "none")
    layer = (2 * facts.hidden + 4 * facts.intermediate) * BYTES[run.model.dtype] * tokens
    widest = max(facts.hidden * facts.intermediate, 1) * BYTES[run.model.dtype]  # one weight made dense
    return chunk + layer + widest + 4 * facts.hidden * BYTES[run.model.dtype] * tokens


def micro_batch_size(train: Train) -> Size | Literal["auto"]:
    """What one forward pass takes by the recipe: an update in the backward leaves no place for a second one."""
    return train.global_batch if train.optimizer_in_backward else train.micro_batch


def plan_memory(
    run: Run, facts: ModelSpec, device: torch.device, *, trained: int, step: StepSize, fixed: bool
) -> MemoryPlan:
    """Resolve `train.micro_batch: auto` and `train.recompute: auto` by what is free on the device.

    Args:
        trained: parameters that are trained.
        step: tokens of one optimizer step.
        fixed: whether every micro batch is padded to one size, so that a step should be a whole number of them.
    """
    free, static = free_bytes(device), static_bytes(run, facts, trained)
    kept = activation_bytes(run, facts, compiled=should_compile(run.train.compile, device))
    rerun = facts.hidden * BYTES[run.model.dtype]
    seq, micro = run.data.seq_len, micro_batch_size(run.train)
    room = int(free * USABLE) - static

    def layers(tokens: int) -> int:
        given = {"none": 0, "full": facts.layers}.get(str(run.train.recompute), run.train.recompute)
        if isinstance(given, int):
            return min(given, facts.layers)
        left = room - workspace_bytes(run, facts, device, tokens)
        return recomputed_layers(left, tokens, facts.layers, kept=kept, rerun=rerun)

    def price(tokens: int) -> float:
        work = 1 + RERUN["lora" if run.adapter.kind == "lora" else "full"] * layers(tokens) / facts.layers
        passes = math.ceil(step.mean / tokens)
        waste = passes * tokens / step.mean if fixed else 1.0
        fits = _held(tokens, layers(tokens), facts.layers, kept, rerun) + workspace_bytes(run, facts, device, tokens)
        return (
            work * waste
            + PASS_TOKENS[run.model.quantize] * passes / step.mean
            + (1e6 * fits / max(room, 1) if fits > room else 0)
        )

    if micro == "auto":
        most = max(seq, min(MOST_TOKENS.get(device.type, 4096), math.ceil(step.largest / seq) * seq))
        sizes = range(most // seq * seq, 0, -seq)
        tokens = min(sizes, key=price)  # the largest of equal ones
        why = "the least time by the estimate"
    else:
        tokens = micro.amount if micro.unit == "tokens" else min(micro.amount * seq, max(step.largest, seq))
        why = "the whole global batch" if run.train.optimizer_in_backward else "as train.micro_batch says"
    count = layers(tokens)
    needed = static + _held(tokens, count, facts.layers, kept, rerun) + workspace_bytes(run, facts, device, tokens)
    why = f"{why}: about {needed / 2**30:.1f} of {free / 2**30:.1f} GiB"
    return MemoryPlan(tokens, count, static, kept, rerun, free, why)


def recomputed_layers(left: float, tokens: int, layers: int, *, kept: int, rerun: int) -> int:
    """The fewest layers to run again so that what all layers keep of `tokens` fits into `left` bytes; at most all."""
    over = layers * kept * tokens - left
    return min(layers, max(0, math.ceil(over / ((kept - rerun) * tokens))))


def _held(tokens: int, recomputed: int, layers: int, kept: int, rerun: int) -> int:
    return tokens * ((layers - recomputed) * kept + recomputed * rerun)


def describe_recompute(count: int, layers: int) -> str:
    """In the words of the recipe: none, full, or how many layers of how many."""
    return {0: "none", layers: "full"}.get(count, f"{count} of {layers} layers")
