"""The two factors that every update of low rank has, and what they are scaled by."""

import math
from abc import abstractmethod

import torch
from torch import nn

from tunesmith.config.schema import Adapter


class LowRank(nn.Module):
    """An update scaling * B A. With `enabled = False` the base alone is computed.

    Attributes:
        lora_A, lora_B: fp32, of `factor_shapes`.
    """

    scaling: float
    dropout: float
    enabled: bool

    @abstractmethod
    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B."""

    def add_lora(self, adapter: Adapter, device: torch.device) -> None:
        """Make A and B; `init_lora` draws their values."""
        shape_A, shape_B = self.factor_shapes(adapter.rank)
        fp32 = torch.float32
        self.lora_A = nn.Parameter(torch.empty(shape_A, dtype=fp32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(shape_B, dtype=fp32, device=device))
        self.scaling = lora_scaling(adapter)
        self.dropout = adapter.dropout
        self.enabled = True


def lora_scaling(adapter: Adapter) -> float:
    """The factor on an adapter's update."""
    if adapter.rslora:
        return adapter.alpha / math.sqrt(adapter.rank)
    return adapter.alpha / adapter.rank
