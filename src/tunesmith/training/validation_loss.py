"""Computation of a method's mean loss over held-out rows, on one or several ranks."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from tunesmith.batches.layout import Layout
from tunesmith.batches.mismatched import mismatched_of_all
from tunesmith.parallel.mesh import ALONE, Mesh, all_reduce_together
from tunesmith.tokens.token_set import TokenSet
from tunesmith.train_model import StepTotals, TrainModel, ValidationResult, evaluating


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
    """Compute the method's mean loss and metrics over `tokens`, in batches of `micro_tokens`
    tokens.

    For SFT, the loss is the cross-entropy in nats per supervised token. `cancelled` is called
    before each batch, and if it returns True, the result is None. `scored` is called after each
    batch. Each data rank of `mesh` computes a part of the batches. All ranks compute the same
    number of batches, so the last batch of some ranks may be empty.
    """
    method = train_model.method
    assert method is not None
    denominator = 0
    # The first element is the sum of the losses. The sums are fp64, because the order of the
    # additions depends on the mesh and would change the result in fp32.
    sums = torch.zeros(1 + len(method.metrics), dtype=torch.float64)
    layout = Layout(
        pad_id,
        train_model.packs_rows,
        multiple=mesh.shape.tensor,
        share=(mesh.data_rank, mesh.shape.data),
    )
    with evaluating(train_model):
        # Compute values that the losses of all rows need. This is a collective call.
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
        # If there are no rows left for a rank, its last batch contains only padding. The rank
        # computes it, because the other ranks wait for it in collectives.
        for _, batch in layout.batches(tokens, micro_tokens):
            if cancelled():
                return None
            output = train_model(batch.to(device), loss_of)
            values = [output.loss, *(output.metrics[name] for name in method.metrics)]
            sums += torch.stack([value.detach().double() for value in values]).cpu()
            denominator += output.denominator
            scored()
    if mesh.shape.data > 1:
        rank_sums = torch.cat([sums, torch.tensor([denominator])]).to(device)
        dist.all_reduce(rank_sums, group=mesh.data_group)
        sums = rank_sums[:-1].cpu()
        denominator = int(rank_sums[-1])
    if not denominator:
        return ValidationResult(math.nan, 0, {})
    loss, *means = (sums / denominator).tolist()
    metrics = method.finish(dict(zip(method.metrics, means, strict=True)))
    return ValidationResult(loss, denominator, metrics)
