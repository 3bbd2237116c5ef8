"""How the tokens of a step spread over the experts of each layer, padding not counted.

A hook on the experts sees where their router sends each token. The counts stay on the device, and
are read with the other numbers of the step. A layer that is computed again in the backward counts
twice, all its experts alike. Of a tensor group each rank sees the tokens that it has between
attention and MLP, and counts these.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.distributed.row_exchange import RankGroup
from tunesmith.model.meta_forward import are_experts

LOAD_MAX = "expert_load_max"
UNUSED = "experts_unused"


class ExpertLoad:
    """Counts of a model's experts, from one `take` to the next.

    Attributes:
        tensor_group: the ranks that share the tokens of each layer; None: this one has all.
    """

    def __init__(self, model: nn.Module) -> None:
        self.experts: list[int] = []  # of each layer that has some
        self.counts: dict[int, Tensor] = {}
        self.is_token: Tensor | None = None
        self.tensor_group: RankGroup | None = None
        for module in model.modules():
            # `has_gate` is there where Transformers calls them through its interface.
            is_counted = hasattr(module, "has_gate") or are_experts(module)
            if is_counted and hasattr(module, "num_experts"):
                note = partial(self._note, len(self.experts))
                module.register_forward_pre_hook(note, with_kwargs=True)
                experts: Any = module.num_experts
                self.experts.append(experts)

    @contextmanager
    def count(self, is_token: Tensor) -> Iterator[None]:
        """Count what runs inside; is_token: bool [n] of the micro batch, False for padding."""
        if self.tensor_group is not None:
            is_token = is_token.chunk(self.tensor_group.size)[self.tensor_group.rank]
        self.is_token = is_token
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

    @torch.compiler.disable
    def _note(self, layer: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_token is None:
            return
        index = _choice((*args, *kwargs.values()))
        if index is None or len(index) != len(self.is_token):
            return
        experts = self.experts[layer]
        with torch.no_grad():
            # One more place, for padding and for what is no expert (LongCat's identities).
            places = torch.where(self.is_token.unsqueeze(1), index, experts).clamp_max(experts)
            counts = torch.zeros(experts + 1, dtype=torch.int64, device=index.device)
            counts.scatter_add_(0, places.flatten(), torch.ones_like(places.flatten()))
        if layer in self.counts:
            counts += self.counts[layer]
        self.counts[layer] = counts

    def take(self, device: torch.device) -> list[Tensor]:
        """Tokens that each expert of each layer got since the last call: int64 [experts] each."""
        tokens_by_layer = []
        for layer, experts in enumerate(self.experts):
            counts = self.counts.get(layer)
            if counts is None:  # no micro batch came to this rank
                counts = torch.zeros(experts + 1, dtype=torch.int64, device=device)
            tokens_by_layer.append(counts[:experts])
        self.counts = {}
        return tokens_by_layer


def _choice(values: tuple[Any, ...]) -> Tensor | None:
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
