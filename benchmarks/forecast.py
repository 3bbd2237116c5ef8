"""Tokens per second of the four goals on one H200, forecast without a GPU: a sum of kernels, not a measurement.

    python benchmarks/forecast.py [--json FILE]

Layers are counted by count_kernels.py. Head, optimizer and attention are added as the comments below say. Matrix products
run at 790 TFLOP/s at most, which 8192^3 was measured at; a profile of a plain loop of ours had 700 on average. Both make
a column: the truth should lie between.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

from count_kernels import BANDWIDTH, RATE, count_layer, recipe

from tunesmith.loss import chunk_size, even_chunk_size
from tunesmith.model.shapes import find_shape
from tunesmith.model.spec import ModelSpec, read_spec

SUPERVISED = 0.74  # of the tokens of alpaca rows as chats
# FlashAttention forward and backward of a micro batch of 16,384 tokens in 32 layers of 4096 channels, in ms: 11 % of 955
# backward, measured in a plain loop on an H200 whose documents were stated less tightly; a third of that forward.
ATTENTION_MS, ATTENTION_SIZE = (35.0, 105.0), 16384 * 32 * 4096
ADAPTER = 8  # rank
CARD = 141 << 30


@dataclass(frozen=True)
class Goal:
    """One of the goals: a micro batch of `tokens`, so many of them a step; `recomputed` layers run again in the backward."""

    name: str
    shape: str
    base: str
    tokens: int
    micro_batches: int
    tokens_per_second: int
    full: bool = False
    recomputed: float = 0.0  # as a share of the layers


GOALS = (
    Goal("8B LoRA, bf16", "llama3-8b", "bf16", 16384, 1, 19_000),
    Goal("8B LoRA, fp8 base", "llama3-8b", "fp8", 16384, 1, 27_000),
    Goal("3B full", "llama3-3b", "bf16", 16384, 4, 31_000, full=True),
    Goal("70B LoRA, nf4 base", "llama3-70b", "nf4", 4096, 4, 2_000),
)


def head_ms(spec: ModelSpec, goal: Goal) -> tuple[float, float]:
    """(products, the rest) of head and loss on the supervised positions of a micro batch."""
    import torch

    rows = round(SUPERVISED * goal.tokens)
    most = chunk_size(spec.vocab, rows, torch.device("cuda"), trained=goal.full, card=CARD)
    chunks = -(-rows // even_chunk_size(rows, most, tile=128))
    products = (6 if goal.full else 4) * rows * spec.head_matmul / RATE["bf16"]
    moved = 4 * 2 * rows * spec.vocab  # raw logits are read for the sum and for the gradient, both are written
    if goal.full:
        # A chunk's gradient in bf16 is written, read, and added in fp32; at the end it is scaled into bf16 and added to
        # the master's.
        moved += spec.head_matmul * (chunks * (2 + 2 + 8) + 6 + 10)
    return 1e3 * products, 1e3 * moved / BANDWIDTH


def optimizer_ms(spec: ModelSpec, goal: Goal, fast_paths: tuple[str, ...]) -> float:
    """A step's norm (4 bytes a parameter), clipping (8), AdamW (28), bf16 copy (6); the adapter's is under a millisecond.

    With every micro batch a hook moves the bf16 gradient into the master's: 2 + 4 bytes, and 4 more after the first. The
    kernel that writes it in bf16 is the layer's, and with fp32-weight-gradients the whole sum.
    """
    if not goal.full:
        return 0.5
    hooked = spec.parameters - ("fp32-weight-gradients" in fast_paths) * spec.layers * spec.layer_matmul
    moved = spec.parameters * (4 + 8 + 28 + 6) + hooked * (6 + 10 * (goal.micro_batches - 1))
    return 1e3 * moved / BANDWIDTH


def forecast(goal: Goal, fast_paths: tuple[str, ...]) -> dict[str, Any]:
    """Milliseconds of one step by part, and tokens/s with products at 790 and at 700 TFLOP/s."""
    spec = read_spec(find_shape(goal.shape).config, where=goal.shape)
    run = recipe(goal.base, full=goal.full, fast_paths=fast_paths)
    kept = count_layer(goal.shape, run, tokens=goal.tokens, recomputed=False)
    layer = sum(c.ms for c in kept.values())
    operations = sum(c.tera_operations for c in kept.values())
    rate = RATE["8 bit" if goal.base in ("fp8", "int8") else "bf16"]
    again = 0.0
    if goal.recomputed:
        second = count_layer(goal.shape, run, tokens=goal.tokens, recomputed=True)
        again = goal.recomputed * (sum(c.ms for c in second.values()) - layer)
        operations += goal.recomputed * (sum(c.tera_operations for c in second.values()) - operations)
    head, loss = head_ms(spec, goal)
    products = spec.layers * operations / rate * 1e15 + head
    forward, backward = ATTENTION_MS
    scale = goal.tokens * spec.layers * spec.heads * spec.head_dim / ATTENTION_SIZE
    parts = {
        "products": goal.micro_batches * products,
        "other kernels of the layers": goal.micro_batches * (spec.layers * (layer + again) - products + head),
        "attention": goal.micro_batches * scale * (forward * (1 + goal.recomputed) + backward),
        "loss": goal.micro_batches * loss,
        "optimizer": optimizer_ms(spec, goal, fast_paths),
    }
    tokens, best = goal.tokens * goal.micro_batches, sum(parts.values())
    slower = best + parts["products"] * (790 / 700 - 1)
    return {"parts_ms": parts, "best": 1e3 * tokens / best, "likely": 1e3 * tokens / slower}


def main() -> None:
    """One row a goal."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--fast-paths", nargs="+", default=[])
    p.add_argument("--only", type=int, nargs="+", default=range(len(GOALS)), help="goals by number, from 0")
    p.add_argument("--json")
    a = p.parse_args()
    found = {}
    print("| | products | other kernels | attention | loss | optimizer | tokens/s at 700 | at 790 TFLOP/s | goal |")
    print("|---|---|---|---|---|---|---|---|---|")
    for goal in (GOALS[i] for i in a.only):
        made = found[goal.name] = forecast(goal, tuple(a.fast_paths))
        parts = " | ".join(f"{ms:,.0f} ms" for ms in made["parts_ms"].values())
        speeds = f"{made['likely']:,.0f} | {made['best']:,.0f} | {goal.tokens_per_second:,}"
        print(f"| {goal.name} | {parts} | {speeds} |", flush=True)
    if a.json:
        with open(a.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
