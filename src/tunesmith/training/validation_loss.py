"""The mean loss of a method over held-out rows, on one rank or many."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from tunesmith.data.batches.layout import Layout
from tunesmith.data.batches.mismatched import mismatched_of_all
from tunesmith.data.tokens.token_set import TokenSet
from tunesmith.inference.decoding import evaluating
from tunesmith.methods.base import StepTotals, TrainModel
from tunesmith.parallel.mesh import ALONE, Mesh, all_reduce_together


class ValidationResult(NamedTuple):
    """The numbers that a method makes of held-out rows.

    Attributes:
        loss: its mean.
        denominator: what its sum is divided by.
        metrics: the method's own, as a step's record has them.
    """

    loss: float
    denominator: int
    metrics: dict[str, float]


def validation_loss(
    train_model: TrainModel,
    tokens: TokenSet,
    *,
    micro_tokens: int,
    pad_id: int,
    device: torch.device,
    cancelled: Callable[[], bool] = lambda: False,
    mesh: Mesh = ALONE,
    scored: Callable[[], object] = lambda: None,
) -> ValidationResult | None:
    """The method's mean loss and metrics over `tokens`, each once, in batches of `micro_tokens`.

    For SFT these are nats and supervised tokens. None once `cancelled`, which is called before each
    row, says so. The data ranks of `mesh` take the rows in turn, all as many: some may end with an
    empty one. `scored` is called after each.
    """
    method = train_model.method
    denominator = 0
    # The loss first; fp64: sums over many batches, added in another order on other meshes.
    sums = torch.zeros(1 + len(method.metrics), dtype=torch.float64)
    layout = Layout(
        pad_id,
        train_model.packs_rows,
        multiple=mesh.shape.tensor,
        share=(mesh.data_rank, mesh.shape.data),
    )
    with evaluating(train_model):
        # What the losses of all rows share; a collective call.
        chosen = sum(example.chosen_tokens for example in tokens) if tokens.has_pairs else 0
        mismatched = []
        if method.needs_mismatched:
            batches = layout.batches(mismatched_of_all(tokens), micro_tokens)
            mismatched = [batch.to(device) for _, batch in batches]
        totals = method.begin_step(
            train_model,
            StepTotals(len(tokens), chosen, mismatched),
            lambda total: all_reduce_together([total], mesh.data_group),
        )
        loss_of = partial(method, totals=totals)
        # A rank without rows in the last turn computes padding: its collectives are needed.
        for _, batch in layout.batches(tokens, micro_tokens):
            if cancelled():
                return None
            output = train_model(batch.to(device), loss_of)
            values = [output.loss, *(output.metrics[name] for name in method.metrics)]
            sums += torch.stack([value.detach().double() for value in values]).cpu()
            denominator += output.denominator
            scored()
    if mesh.shape.data > 1:
        of_ranks = torch.cat([sums, torch.tensor([denominator])]).to(device)
        dist.all_reduce(of_ranks, group=mesh.data_group)
        sums = of_ranks[:-1].cpu()
        denominator = int(of_ranks[-1])
    if not denominator:
        return ValidationResult(math.nan, 0, {})
    loss, *means = (sums / denominator).tolist()
    metrics = method.finish(dict(zip(method.metrics, means, strict=True)))
    return ValidationResult(loss, denominator, metrics)
