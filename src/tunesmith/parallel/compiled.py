"""torch.compile where it pays.

On CUDA every decoder layer is compiled by itself: the layers are alike, so one graph serves all, and the first step
takes seconds instead of the minutes of a whole model. On a CPU the matrix products are already those of oneDNN, and the
length of documents is part of attention's shapes; compiling the rest of each layer gained nothing there (SmolLM2-135M,
2 cores), so on a CPU it happens only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def wanted(choice: str, device: torch.device) -> bool:
    """Whether `train.compile` (auto, on or off) means that layers are compiled on `device`."""
    return choice == "on" or (choice == "auto" and device.type == "cuda")


def graphs_compiled() -> int:
    """How many graphs this process has compiled so far.

    The compiler's own counter; torch has no public name for it, and this function is the one place that knows it.
    """
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def compile_layers(layers: Iterable[nn.Module], *, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile each layer in place, at its first forward; returns how many."""
    count = 0
    for layer in layers:
        layer.compile(backend=backend)
        count += 1
    return count
