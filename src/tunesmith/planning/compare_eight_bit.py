"""Measurement of how much the loss changes if a frozen base is rounded to 8 bits, and if its
matmuls use fast accumulation.

The dense base is not loaded completely, because it may not fit into memory. Each weight matrix is
read from its file when it is used.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.adapter import lora
from tunesmith.batches.batch import Batch
from tunesmith.distributed.activity import STUCK_AFTER_S
from tunesmith.distributed.ranks import Ranks
from tunesmith.distributed.torch_private import collective
from tunesmith.formats.fp8 import Fp8, read_bf16_rows
from tunesmith.formats.linear import FrozenLinear
from tunesmith.parallel.mesh import Mesh
from tunesmith.run_dir import Phase
from tunesmith.train_model import TrainModel, evaluating
from tunesmith.units import ceil_div

LOSS_PROBE_TOKENS = 4096  # minimum number of tokens on which the loss is measured
# Maximum relative change of the loss by 8-bit rounding. Rounding to e4m3 changed the loss of
# SmolLM2-135M by 1.2 to 2.2 % on 4,500 tokens of alpaca rows, as chats and as plain text; nf4
# changed it by 7 %. A larger change must have a different cause.
MAX_LOSS_CHANGE = 0.03
# Maximum relative change of the loss by fast accumulation: about a tenth of the smallest change
# that rounding caused.
MAX_LOSS_CHANGE_BY_SUMS = 0.001


class LossChange(NamedTuple):
    """Two losses of the base on `tokens` tokens of the run's data: with exact and with rounded
    matmuls.

    Attributes:
        layers: number of layers in 8 bits.
        limit: maximum relative change that is tolerable.
    """

    exact: float
    rounded: float
    tokens: int
    layers: int
    limit: float

    @property
    def relative(self) -> float:
        return self.rounded / self.exact - 1

    @property
    def is_tolerable(self) -> bool:
        return math.isfinite(self.rounded) and abs(self.relative) <= self.limit


def compare_with_bf16(
    root: TrainModel, batches: Sequence[Batch], mesh: Mesh, ranks: Ranks
) -> LossChange:
    """Measure how the rounding from bf16 to 8 bits changes the loss. See `measure_change`."""
    in_bf16 = partial(computed_dense, mesh=mesh, ranks=ranks)
    return measure_change(root, batches, ranks, in_bf16, MAX_LOSS_CHANGE)


def choose_sums(root: TrainModel, batches: Sequence[Batch], ranks: Ranks) -> LossChange:
    """Select fast accumulation for the forward of the 8-bit layers if the change of the loss is
    tolerable. Return the change. See `measure_change`.

    The backward always uses full accumulation, because the loss does not show errors of gradients.
    """
    change = measure_change(root, batches, ranks, full_sums, MAX_LOSS_CHANGE_BY_SUMS)
    set_fast_sums(eight_bit_layers(root), change.is_tolerable)
    return change


def measure_change(
    root: TrainModel,
    batches: Sequence[Batch],
    ranks: Ranks,
    exact: Callable[[Sequence[FrozenLinear]], AbstractContextManager[None]],
    limit: float,
) -> LossChange:
    """Measure the loss of the base without adapter in the context `exact` and after it. This is a
    collective call.

    All ranks pass the same `batches`. All ranks return the same result, the losses of the rank with
    the largest change.
    """
    ranks.heartbeat.phase(Phase.COMPARING, STUCK_AFTER_S)
    layers = list(eight_bit_layers(root))
    # Run without compilation. The file reads would break the graph at every layer, and compilation
    # is not worth the time for two passes.
    with lora.disabled(root.model), torch.compiler.set_stance("force_eager"):
        with exact(layers):
            exact_loss = mean_loss(root, batches)
        rounded_loss = mean_loss(root, batches)
    tokens = sum(batch.tokens for batch in batches)
    by_rank = ranks.all_gather_object((exact_loss, rounded_loss))
    changes = [LossChange(*losses, tokens, len(layers), limit) for losses in by_rank]
    # A loss that is not finite counts as the largest change.
    return max(
        changes, key=lambda change: (not math.isfinite(change.rounded), abs(change.relative))
    )


def eight_bit_layers(root: TrainModel) -> Iterator[FrozenLinear]:
    """Yield every layer that computes in 8 bits."""
    for module in root.modules():
        if isinstance(module, FrozenLinear) and isinstance(module.format, Fp8):
            yield module


@contextmanager
def full_sums(layers: Sequence[FrozenLinear]) -> Iterator[None]:
    """Return a context with full accumulation. After it, the layers use fast accumulation."""
    set_fast_sums(layers, False)
    yield
    set_fast_sums(layers, True)


def set_fast_sums(layers: Iterable[FrozenLinear], fast_sums: bool) -> None:
    """Select fast or full-precision accumulation for the fp8 matmuls of the forward pass."""
    for layer in layers:
        assert isinstance(layer.format, Fp8)
        layer.format = Fp8(layer.format.recipe, fast_sums)


def mean_loss(model: TrainModel, batches: Sequence[Batch]) -> float:
    """Compute the method's mean loss over `batches` in eval mode."""
    loss = 0.0
    denominator = 0
    with evaluating(model):
        for batch in batches:
            output = model(batch)
            loss += float(output.loss)
            denominator += output.denominator
    return loss / denominator


@contextmanager
def computed_dense(layers: Sequence[FrozenLinear], mesh: Mesh, ranks: Ranks) -> Iterator[None]:
    """Return a context in which the layers compute with the dense weights that they had before
    rounding.
    """
    try:
        for layer in layers:
            layer.read_dense = partial(read_dense_weight, layer, mesh, ranks)
        yield
    finally:
        for layer in layers:
            layer.read_dense = None


def read_dense_weight(layer: FrozenLinear, mesh: Mesh, ranks: Ranks) -> Tensor:
    """Read a layer's weight [out_features, in_features] in bf16 from its file. This is a collective
    call.

    Each data rank reads an equal part of the rows.
    """
    assert layer.rounded_from is not None
    ranks.heartbeat.progress()
    count = layer.out_features
    data_ranks = mesh.shape.data
    rows_per_rank = ceil_div(count, data_ranks)
    start = min(mesh.data_rank * rows_per_rank, count)
    # The slice of the last ranks may be shorter or empty. It is padded below.
    stop = min(start + rows_per_rank, count)
    rows = read_bf16_rows(layer, layer.rounded_from, slice(start, stop))
    if mesh.data_group is None:
        return rows
    # An all-gather needs the same number of rows from every rank, but the last ranks may have
    # fewer.
    rows = F.pad(rows, (0, 0, 0, rows_per_rank - len(rows)))
    gathered = collective("all_gather_into_tensor", rows, data_ranks, mesh.data_group.group_name)
    return gathered[:count]
