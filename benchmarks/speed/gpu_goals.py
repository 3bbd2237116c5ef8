"""Goals for the speed of runs on one GPU, by device. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Goal:
    """A run and its goal on each device.

    The run has packed rows of 2,048 tokens, and trains LoRA of rank 8 or all weights.

    Attributes:
        step: the name of the step in docs/measurements/gpu.
        shape: the model's name in `tunesmith bench --shape`.
        base: "bf16", or a value of `model.quantize`.
        full: whether all weights are trained.
        tokens_per_second: the goal in non-padding tokens, by device key.
        target: the value of `adapter.target`.
        global_batch: tokens per optimizer step.
    """

    step: str
    title: str
    shape: str
    base: str
    full: bool
    tokens_per_second: Mapping[str, int]
    target: str | tuple[str, ...] = "all-linear"
    global_batch: int = 16384


def by_device(h200: int, h100: int) -> Mapping[str, int]:
    return MappingProxyType({"h200": h200, "h100": h100})


GOALS = (
    Goal("8b-bf16", "8B LoRA, bf16", "llama3-8b", "bf16", False, by_device(19_000, 16_500)),
    Goal("8b-fp8", "8B LoRA, fp8 base", "llama3-8b", "fp8", False, by_device(28_000, 22_500)),
    Goal(
        "3b-full",
        "3B full",
        "llama3-3b",
        "bf16",
        True,
        by_device(31_000, 25_500),
        global_batch=65536,
    ),
    Goal("70b-nf4", "70B LoRA, nf4 base", "llama3-70b", "nf4", False, by_device(2_100, 1_650)),
)

ATTENTION_TARGET = ("q_proj", "k_proj", "v_proj", "o_proj")
# Mixtures of experts. As in their recipes, a step has 64 rows of 2,048 tokens. These runs are only
# forecast, not measured.
MIXTURES = (
    Goal("30b-a3b", "Qwen3-30B-A3B LoRA, bf16", "qwen3-30b-a3b", "bf16", False, {"gb10": 3_000},
         global_batch=131_072),
    Goal("120b-mxfp4", "gpt-oss-120b LoRA of attention, MXFP4", "gpt-oss-120b", "as-shipped", False,
         {"gb10": 1_800}, target=ATTENTION_TARGET, global_batch=131_072),
)  # fmt: skip


def device_key(gpu_name: str) -> str | None:
    """Return "h200" or "h100" for the name of a GPU in torch. Return None for a GPU without goals.

    The goals are for SXM modules. PCIe and NVL cards are slower, and a MIG slice is only a part of
    a GPU.
    """
    words = gpu_name.lower().split()
    if {"pcie", "nvl", "mig"} & {*words}:
        return None
    for device in ("h200", "h100"):
        if device in words:
            return device
    return None
