"""The copies of tokens that go to the experts of a layer: rows, sorted by expert."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Compute capabilities whose `grouped_mm` is one kernel in torch 2.13: Hopper, and Blackwell of data
# centers. For others, the GB10 of a DGX Spark among them, it is a loop (pytorch#184334).
GROUPED_CAPABILITIES = (9, 10)


class RowIndex(NamedTuple):
    """The places of the copies of tokens that the products of experts read: rows, sorted by expert.

    Attributes:
        tokens: int64 [rows], the token of each row.
        places: int64 [n, k], the row of each copy of each token.
        offsets: int32 [experts], on the device: the end of each expert's rows.
        ends: the same on the host, on a CPU the same tensor; None where the host need not know, and
            wait for the GPU.
    """

    tokens: Tensor
    places: Tensor
    offsets: Tensor
    ends: Tensor | None

    def ends_on_host(self) -> list[int]:
        """The end of each expert's rows."""
        assert self.ends is not None
        ends: list[int] = self.ends.tolist()
        return ends

    def counts_on_host(self) -> list[int]:
        """Count the rows of each expert."""
        ends = self.ends_on_host()
        return [end - first for first, end in zip([0, *ends[:-1]], ends, strict=True)]

    def tensors(self) -> list[Tensor]:
        """All of them, for `of_tensors`."""
        tensors = [self.tokens, self.places, self.offsets]
        return tensors if self.ends is None else [*tensors, self.ends]

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor]) -> "RowIndex":
        tokens, places, offsets, *ends = tensors
        return cls(tokens, places, offsets, ends[0] if ends else None)


class ExpertRows(NamedTuple):
    """The rows of a layer's experts.

    Attributes:
        copies: int64 [rows], which of the n * k copies of all tokens each row is.
        experts: int64 [rows], the expert of each row.
        row_index: what the products read.
    """

    copies: Tensor
    experts: Tensor
    row_index: RowIndex

    @classmethod
    def of(
        cls, chosen: Tensor, experts: int, dtype: torch.dtype, *, in_groups: bool = False
    ) -> "ExpertRows":
        """The rows of all copies.

        Args:
            chosen: int64 [n, k], the experts of each token, each below `experts`.
            dtype: in which the products are computed.
            in_groups: a stack is dense for some experts at a time.
        """
        device = chosen.device
        per_token = chosen.shape[1]
        sorted_experts, copies = torch.sort(chosen.flatten(), stable=True)
        places = torch.empty_like(copies)
        places[copies] = torch.arange(len(copies), device=device)
        numbers = torch.arange(experts, device=device)
        offsets = torch.searchsorted(sorted_experts, numbers, right=True, out_int32=True)
        ends = None
        if device.type != "meta" and (in_groups or not uses_grouped_mm(device, dtype)):
            ends = offsets.cpu()
        index = RowIndex(copies // per_token, places.view(-1, per_token), offsets, ends)
        return cls(copies, sorted_experts, index)


@torch.compiler.assume_constant_result
def uses_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether the products of all experts are one kernel."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device)[0] in GROUPED_CAPABILITIES


def sum_of_rows(x: Tensor, places: Tensor) -> Tensor:
    """For each token the sum of its k rows of x, which lie at `places` [n, k]: [n, width]."""
    # One kernel, which reads each row once and adds up a token's in their order.
    return F.embedding_bag(places, x, mode="sum")
