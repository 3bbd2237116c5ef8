"""The spread of a step's tokens over the experts of each layer, padding not counted.

The experts note where their router sends each token, compiled with their layer. The counts stay on
the device, and are read with the other numbers of the step. A layer that is computed
again in the backward counts twice, all its experts alike. Of a tensor group each rank sees the
tokens that it has between attention and MLP, and counts these.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.distributed.row_exchange import RankGroup
from tunesmith.distributed.torch_private import mark_varying
from tunesmith.model.experts import CalledByInterface
from tunesmith.model.fused import add_mixin
from tunesmith.model.meta_forward import are_experts, count_experts

LOAD_MAX = "expert_load_max"
UNUSED = "experts_unused"


class CountedExperts(nn.Module):
    """All experts of a layer, called by Transformers' interface or not: a mixin of their class.

    Attributes:
        expert_counts: the tokens of each, int64 [experts + 1], a buffer: layers share a compiled
            graph, which takes the tensor of each. The last place is for padding, and for what is no
            expert (LongCat's identities).
        expert_load: of the whole model.
    """

    expert_counts: Tensor
    expert_load: "ExpertLoad"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.expert_load.note(self.expert_counts, (*args, *kwargs.values()))
        return super().forward(*args, **kwargs)


class ExpertLoad:
    """Counts of a model's experts, from one `take` to the next.

    Attributes:
        modules: the experts of each layer that has some.
        tensor_group: the ranks that share the tokens of each layer; None: this one has all.
        is_varied: layers are compiled, and micro batches differ in their number of tokens.
    """

    def __init__(self, model: nn.Module, *, is_varied: bool = False) -> None:
        self.modules: list[CountedExperts] = []
        self.is_token: Tensor | None = None
        self.tensor_group: RankGroup | None = None
        self.is_varied = is_varied
        for module in model.modules():
            experts = count_experts(module)
            if experts and (isinstance(module, CalledByInterface) or are_experts(module)):
                counted = add_mixin(module, CountedExperts)
                # Real on meta too: `materialize` moves it, with its zeros.
                counts = torch.zeros(experts + 1, dtype=torch.int64, device="cpu")
                counted.register_buffer("expert_counts", counts, persistent=False)
                counted.expert_load = self
                self.modules.append(counted)

    @contextmanager
    def count(self, is_token: Tensor) -> Iterator[None]:
        """Count what runs inside; is_token: bool [n] of the micro batch, False for padding."""
        if self.tensor_group is not None:
            is_token = is_token.chunk(self.tensor_group.size)[self.tensor_group.rank]
        self.is_token = is_token
        if self.is_varied:
            mark_varying(is_token, 0)
        try:
            yield
        finally:
            self.is_token = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing of what runs inside."""
        is_token = self.is_token
        self.is_token = None
        try:
            yield
        finally:
            self.is_token = is_token

    def note(self, counts: Tensor, values: tuple[object, ...]) -> None:
        """Count what a module of experts is called with."""
        if self.is_token is None:
            return
        index = _choice(values)
        if index is None or len(index) != len(self.is_token):
            return
        nowhere = len(counts) - 1
        with torch.no_grad():
            places = torch.where(self.is_token.unsqueeze(1), index, nowhere).clamp_max(nowhere)
            counts.scatter_add_(0, places.flatten(), torch.ones_like(places.flatten()))

    def take(self) -> list[Tensor]:
        """Tokens that each expert of each layer got since the last call: int64 [experts] each."""
        tokens_by_layer = []
        for module in self.modules:
            tokens_by_layer.append(module.expert_counts[:-1].clone())
            module.expert_counts.zero_()
        return tokens_by_layer


def _choice(values: tuple[object, ...]) -> Tensor | None:
    """The experts of each token, int64 [n, k], among what an experts' module is called with."""
    for value in values:
        if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point():
            return value.long()
    return None


def load_metrics(counts: Sequence[Tensor]) -> dict[str, Tensor]:
    """The numbers of a step's record, of the counts of all layers.

    LOAD_MAX: the largest share of a layer's work that one expert has, 1 / experts where all have
    the same. UNUSED: experts, of all layers together, that got no token.
    """
    shares = [layer.max() / layer.sum().clamp_min(1) for layer in counts]
    unused = [(layer == 0).sum() for layer in counts]
    return {LOAD_MAX: torch.stack(shares).max(), UNUSED: torch.stack(unused).sum()}
