"""How tokens spread over experts, in the records: by hand, without padding, on any rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunesmith.data.batches.batch import collate
from tunesmith.data.text.example import Example
from tunesmith.model.expert_load import ExpertLoad, load_metrics


class LayerOfExperts(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.num_experts = experts

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return hidden


def numbers(counts: list[Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in load_metrics(counts).items()}


def test_padding_is_not_counted() -> None:
    model = nn.ModuleList([LayerOfExperts(4), nn.Linear(2, 2), LayerOfExperts(4)])
    load = ExpertLoad(model)
    example = Example(
        torch.arange(1, 4).numpy().astype("int32"), torch.ones(3, dtype=torch.bool).numpy()
    )
    batch = collate([[example], [example, example]], length=7, pad_id=0)
    assert batch.is_token().tolist() == [True] * 3 + [False] * 4 + [True] * 6 + [False]
    hidden = torch.zeros(14, 2)
    # Real tokens go to 0 and 1, those of padding to 3.
    even = torch.tensor([[0, 1]] * 3 + [[3, 3]] * 4 + [[0, 1]] * 6 + [[3, 3]])
    one = torch.tensor([[2, 2]] * 14)
    with load.count(batch.is_token()):
        model[0](hidden, even, hidden)
        model[2](hidden, top_k_index=one, top_k_weights=hidden)
    model[0](hidden, one, hidden)  # outside of a step: answers, validation
    counts = load.take()
    assert [layer.tolist() for layer in counts] == [[9, 9, 0, 0], [0, 0, 18, 0]]
    assert numbers(counts) == {"expert_load_max": 1.0, "experts_unused": 5.0}
    assert numbers(counts[:1]) == {"expert_load_max": 0.5, "experts_unused": 2.0}
    assert not torch.stack(load.take()).any()


def test_micro_batches_add_up_and_what_is_no_expert_is_left_out() -> None:
    model = LayerOfExperts(2)
    load = ExpertLoad(model)
    hidden = torch.zeros(2, 2)
    for index in ([[0], [1]], [[0], [2]]):
        with load.count(torch.tensor([True, True])):
            model(hidden, torch.tensor(index), hidden)
    assert [layer.tolist() for layer in load.take()] == [[2, 1]]
