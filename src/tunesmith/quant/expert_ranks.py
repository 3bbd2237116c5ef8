"""Experts over ranks: each rank of a group has some experts of every layer, and computes them for
the tokens of all.

    all-gather of hidden states and routing -> own experts -> reduce-scatter of their sums

Every size that is exchanged is known before the layer runs, so that no rank waits to learn how
many tokens others send it. GShard (Lepikhin et al. 2020, arXiv:2006.16668) sends each token to its
experts alone; docs/decisions.md has why this does not.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tunesmith.distributed.row_exchange import RankGroup, gather_rows, scatter_sum


class ExpertRanks:
    """The ranks that divide the experts of each layer, as one of them sees it.

    Attributes:
        rows: hidden states that each rank brings to a layer, the most of all; ranks with fewer pad.
            0: all bring as many, as when they generate together.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group
        rank = dist.get_rank(process_group)
        self.group = RankGroup(process_group.group_name, process_group.size(), rank)
        self.rows = 0

    def agree_on_rows(self, rows: int) -> None:
        """Share how many hidden states each rank brings to the coming forward; a collective call.

        It runs between the hosts, and waits for no GPU.
        """
        most = torch.tensor(rows)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.process_group)
        self.rows = int(most)

    def local_experts(self, experts: int) -> range:
        """Those of a layer's experts that this rank has."""
        count = experts // self.group.size
        return range(self.group.rank * count, (self.group.rank + 1) * count)

    def gather(
        self, hidden: Tensor, index: Tensor, weights: Tensor, experts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `experts_forward` takes, of all ranks; padding goes to an expert that there is not.

        Args:
            hidden: [n, hidden]; index: int64 [n, k]; weights: [n, k].
            experts: of the layer.

        A collective call.
        """
        missing = max(self.rows, len(hidden)) - len(hidden)
        wide = torch.promote_types(weights.dtype, torch.float32)
        # One collective for both: numbers of experts are whole in fp32.
        index = F.pad(index, (0, 0, 0, missing), value=experts)
        weights = F.pad(weights.to(wide), (0, 0, 0, missing))
        routing = gather_rows(torch.cat([index.to(wide), weights], 1), self.group)
        all_index, all_weights = routing.split(index.shape[1], 1)
        all_hidden = gather_rows(F.pad(hidden, (0, 0, 0, missing)), self.group)
        return all_hidden, all_index.long(), all_weights

    def scatter(self, output: Tensor, rows: int) -> Tensor:
        """The sum of all ranks' experts for this rank's hidden states, [rows, hidden].

        A collective call.
        """
        return scatter_sum(output, self.group)[:rows]
