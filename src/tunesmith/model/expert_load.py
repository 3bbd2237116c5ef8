"""The spread of a step's tokens over the experts of each layer, padding not counted.

A hook on the experts sees where their router sends each token; it is compiled with their layer. The
counts stay on the device, and are read with the other numbers of the step. A layer that is computed
again in the backward counts twice, all its experts alike. Of a tensor group each rank sees the
tokens that it has between attention and MLP, and counts these.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tunesmith.distributed.row_exchange import RankGroup
from tunesmith.distributed.torch_private import mark_varying
from tunesmith.model.meta_forward import are_experts, count_experts, is_called_by_interface

LOAD_MAX = "expert_load_max"
UNUSED = "experts_unused"
# The buffer of a layer's experts with their counts, int64 [experts + 1]: layers share a compiled
# graph, which takes the tensor of each. The last place is for padding, and for what is no expert
# (LongCat's identities).
COUNTS = "expert_counts"


class ExpertLoad:
    """Counts of a model's experts, from one `take` to the next.

    Attributes:
        modules: the experts of each layer that has some.
        tensor_group: the ranks that share the tokens of each layer; None: this one has all.
        is_varied: layers are compiled, and micro batches differ in their number of tokens.
    """

    def __init__(self, model: nn.Module, *, is_varied: bool = False) -> None:
        self.modules: list[nn.Module] = []
        self.is_token: Tensor | None = None
        self.tensor_group: RankGroup | None = None
        self.is_varied = is_varied
        for module in model.modules():
            experts = count_experts(module)
            if experts and (is_called_by_interface(module) or are_experts(module)):
                # Real on meta too: `materialize` moves it, with its zeros.
                counts = torch.zeros(experts + 1, dtype=torch.int64, device="cpu")
                module.register_buffer(COUNTS, counts, persistent=False)
                module.register_forward_pre_hook(self._note, with_kwargs=True)
                self.modules.append(module)

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

    def _note(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if self.is_token is None:
            return
        index = _choice((*args, *kwargs.values()))
        if index is None or len(index) != len(self.is_token):
            return
        counts = module.get_buffer(COUNTS)
        nowhere = len(counts) - 1
        with torch.no_grad():
            places = torch.where(self.is_token.unsqueeze(1), index, nowhere).clamp_max(nowhere)
            counts.scatter_add_(0, places.flatten(), torch.ones_like(places.flatten()))

    def take(self) -> list[Tensor]:
        """Tokens that each expert of each layer got since the last call: int64 [experts] each."""
        tokens_by_layer = []
        for module in self.modules:
            counts = module.get_buffer(COUNTS)
            tokens_by_layer.append(counts[:-1].clone())
            counts.zero_()
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
