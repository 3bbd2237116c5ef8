"""Base class of modules with the two factors of a low-rank update, and the scaling of the
update.
"""

import math
from abc import abstractmethod

import torch
from torch import nn

from tunesmith.config.schema import Adapter


class LowRank(nn.Module):
    """Base class of modules with a low-rank update, scaling * B A. If `enabled` is False, the
    update is not applied.

    Attributes:
        lora_A, lora_B: fp32, with the shapes of `factor_shapes`.
    """

    scaling: float
    dropout: float
    enabled: bool

    @abstractmethod
    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B for a rank."""

    def add_lora(self, adapter: Adapter, device: torch.device) -> None:
        """Create A and B. `init_lora` initializes their values."""
        shape_A, shape_B = self.factor_shapes(adapter.rank)
        fp32 = torch.float32
        self.lora_A = nn.Parameter(torch.empty(shape_A, dtype=fp32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(shape_B, dtype=fp32, device=device))
        self.scaling = lora_scaling(adapter)
        self.dropout = adapter.dropout
        self.enabled = True


def lora_scaling(adapter: Adapter) -> float:
    """Return the factor by which the product B A of an adapter is multiplied."""
    if adapter.rslora:
        return adapter.alpha / math.sqrt(adapter.rank)
    return adapter.alpha / adapter.rank
