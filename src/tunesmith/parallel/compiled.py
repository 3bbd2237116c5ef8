"""torch.compile where it pays.

On CUDA every decoder layer is compiled by itself: the layers are alike, so one graph serves all, and the first step
takes seconds instead of the minutes of a whole model. On a CPU the matrix products are already those of oneDNN, and the
length of documents is part of the shapes, so whole layers would be compiled again and again: nothing is compiled there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def wanted(choice: str, device: torch.device) -> bool:
    """Whether `train.compile` (auto, on or off) means that layers are compiled on `device`."""
    return choice == "on" or (choice == "auto" and device.type == "cuda")


def compile_layers(layers: Iterable[nn.Module]) -> int:
    """Compile each layer in place; returns how many. It happens at the first forward."""
    count = 0
    for layer in layers:
        layer.compile()
        count += 1
    return count
