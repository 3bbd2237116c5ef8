"""The change of the loss by rounding a frozen base to 8 bits, measured before a run trains on it,
and by sums of fewer bits.

The dense base need not fit beside the rounded one, nor alone: each of its matrices is read again
when it is used.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.adapter import lora
from tunesmith.data.batches.batch import Batch
from tunesmith.distributed.activity import STUCK_AFTER_S
from tunesmith.distributed.ranks import Ranks
from tunesmith.distributed.torch_private import collective
from tunesmith.formats.fp8 import Fp8, read_bf16_rows
from tunesmith.formats.linear import FrozenLinear
from tunesmith.methods.base import TrainModel
from tunesmith.parallel.mesh import Mesh
from tunesmith.run_dir import Phase
from tunesmith.units import ceil_div

LOSS_PROBE_TOKENS = 4096  # tokens that the loss is measured on, at least
# Relative change of the loss. Rounding to e4m3 changed that of SmolLM2-135M by 1.2 to 2.2 % on
# 4,500 tokens of alpaca rows, as chats and as plain text; nf4 changed it by 7 %. A larger change
# than this has another cause than rounding.
MAX_LOSS_CHANGE = 0.03
# Relative change of the loss by fast sums: a tenth of the least that rounding changed it by.
MAX_LOSS_CHANGE_BY_SUMS = 0.001


class LossChange(NamedTuple):
    """The loss of the base on `tokens` tokens of the run's own data; `layers` counts those in 8
    bits.
    """

    in_bf16: float
    in_8_bits: float
    tokens: int
    layers: int

    @property
    def relative(self) -> float:
        return self.in_8_bits / self.in_bf16 - 1

    @property
    def is_tolerable(self) -> bool:
        return math.isfinite(self.in_8_bits) and abs(self.relative) <= MAX_LOSS_CHANGE

    def describe(self) -> str:
        losses = f"loss {self.in_8_bits:.4f}, {self.in_bf16:.4f} in bf16 ({self.relative:+.2%})"
        return f"{losses}, on {self.tokens:,} tokens of the data"


def compare_with_bf16(
    root: TrainModel, batches: Sequence[Batch], mesh: Mesh, ranks: Ranks
) -> LossChange:
    """Measure the loss of the base alone on `batches`, the same on all ranks, in bf16 and in 8
    bits. A collective call.

    Returns the figures of the rank whose loss changed most, on every rank.
    """
    ranks.heartbeat.phase(Phase.COMPARING, STUCK_AFTER_S)
    layers = list(eight_bit_layers(root))
    # Eager: graphs that read files would break at every layer, and compile for two passes.
    with lora.disabled(root.model), torch.compiler.set_stance("force_eager"):
        with computed_dense(layers, mesh, ranks):
            in_bf16 = mean_loss(root, batches)
        in_8_bits = mean_loss(root, batches)
    tokens = sum(batch.tokens for batch in batches)
    losses = max(ranks.all_gather_object((in_bf16, in_8_bits)), key=severity)
    return LossChange(*losses, tokens, len(layers))


def choose_sums(root: TrainModel, batches: Sequence[Batch], ranks: Ranks) -> str:
    """Let the forward of the 8-bit layers take fast sums, if they hardly change the loss of the
    base alone on `batches`, the same on all ranks. A collective call.

    The backward has full sums: no loss tells what becomes of gradients.

    Returns what was taken, with both losses, of the rank where they differ most.
    """
    ranks.heartbeat.phase(Phase.COMPARING, STUCK_AFTER_S)
    layers = list(eight_bit_layers(root))
    losses = []
    with lora.disabled(root.model), torch.compiler.set_stance("force_eager"):
        for fast_sums in (False, True):
            set_fast_sums(layers, fast_sums)
            losses.append(mean_loss(root, batches))
    full, fast = max(ranks.all_gather_object(losses), key=severity)
    takes_fast = math.isfinite(fast) and abs(fast / full - 1) <= MAX_LOSS_CHANGE_BY_SUMS
    set_fast_sums(layers, takes_fast)
    taken = "fast" if takes_fast else "full"
    tokens = sum(batch.tokens for batch in batches)
    return (
        f"{taken} sums in the forward: loss {fast:.5f} with fast ones, {full:.5f} with full ones "
        f"({fast / full - 1:+.3%}, up to {MAX_LOSS_CHANGE_BY_SUMS:.1%} is taken), "
        f"on {tokens:,} tokens"
    )


def eight_bit_layers(root: TrainModel) -> Iterator[FrozenLinear]:
    """Every layer that computes in 8 bits."""
    for module in root.modules():
        if isinstance(module, FrozenLinear) and isinstance(module.format, Fp8):
            yield module


def set_fast_sums(layers: Sequence[FrozenLinear], fast_sums: bool) -> None:
    """Let the forward of 8-bit layers take fast sums, or full ones."""
    for layer in layers:
        assert isinstance(layer.format, Fp8)
        layer.format = Fp8(layer.format.recipe, fast_sums)


def severity(losses: Sequence[float]) -> tuple[bool, float]:
    """Sort pairs of losses by their relative change, a second one that is not finite last."""
    exact, rounded = losses
    return not math.isfinite(rounded), abs(rounded / exact - 1)


@torch.no_grad()
def mean_loss(model: TrainModel, batches: Sequence[Batch]) -> float:
    """The method's loss over `batches`, in eval mode."""
    training = model.training
    model.eval()
    loss = 0.0
    denominator = 0
    for batch in batches:
        output = model(batch)
        loss += float(output.loss)
        denominator += output.denominator
    model.train(training)
    return loss / denominator


@contextmanager
def computed_dense(layers: Sequence[FrozenLinear], mesh: Mesh, ranks: Ranks) -> Iterator[None]:
    """Inside, layers compute with the dense weights that they were rounded from."""
    try:
        for layer in layers:
            layer.read_dense = partial(read_dense_weight, layer, mesh, ranks)
        yield
    finally:
        for layer in layers:
            layer.read_dense = None


def read_dense_weight(layer: FrozenLinear, mesh: Mesh, ranks: Ranks) -> Tensor:
    """A layer's weight [out_features, in_features] in bf16, from its file. A collective call.

    Each of the data ranks reads as many rows.
    """
    assert layer.rounded_from is not None
    ranks.heartbeat.progress()
    count = layer.out_features
    data_ranks = mesh.shape.data
    rows_of_rank = ceil_div(count, data_ranks)
    start = min(mesh.data_rank * rows_of_rank, count)
    # Past the last row: an empty slice, padded below like a short one.
    stop = min(start + rows_of_rank, count)
    rows = read_bf16_rows(layer, layer.rounded_from, slice(start, stop))
    if mesh.data_group is None:
        return rows
    # A gather takes as many rows of every rank: the last ranks may have fewer.
    rows = F.pad(rows, (0, 0, 0, rows_of_rank - len(rows)))
    gathered = collective("all_gather_into_tensor", rows, data_ranks, mesh.data_group.group_name)
    return gathered[:count]
