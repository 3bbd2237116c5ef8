"""Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053): ranks compute each layer together.

- Which layers are sharded is Transformers' own plan (`cuts.py`): q, k, v, gate and up by output
  rows (colwise, in torch's words, which transpose the weight), so that a rank has whole heads; o
  and down by input columns (rowwise), so that their outputs are parts of a sum. Embedding and head
  are sharded by the vocabulary; A and B of an adapter as their layer.
- Between attention and MLP, activations are sharded by tokens (sequence parallel: Korthikanti et
  al. 2022, arXiv:2205.05198). Tokens are gathered before each of the two; the parts of its sum are
  added and scattered after it.
- Experts and their router are whole on every rank, which computes them for its own tokens: no
  activation moves, and the work is shared as that of all other layers is.
- Norms, routers, experts with their adapter, the bias of a layer that is sharded by columns, A of
  one that is sharded by rows and B of one that is sharded by columns are whole on every rank, and
  their gradients are parts of a sum. Nothing raises where that sum is left out.

Parameters become DTensors on the tensor mesh, so that sharding, the optimizer and checkpoints know
their whole shapes.
"""

from collections.abc import Collection, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from tunesmith.adapter.lora import LoraLinear
from tunesmith.adapter.low_rank import LowRank
from tunesmith.distributed.row_exchange import RankGroup, gather_rows, scatter_sum
from tunesmith.distributed.torch_private import SavingContext, collective
from tunesmith.distributed.vocab_parallel import ShardedHead, VocabularyShard, local_part
from tunesmith.errors import RecipeError
from tunesmith.formats.linear import FrozenLinear, TensorShard, has_codes
from tunesmith.formats.stack import ExpertStack
from tunesmith.methods.base import TrainModel
from tunesmith.model.decoder import find_decoder
from tunesmith.model.fused import FusedNorm, FusedWideNorm, FusedZeroCenteredNorm, add_mixin
from tunesmith.parallel.cuts import TENSOR_KEY, ParallelBlock, find_blocks
from tunesmith.parallel.mesh import Mesh, all_reduce_together
from tunesmith.units import ceil_div

ROWS, COLUMNS = 0, 1  # dimensions of a weight [out_features, in_features]


def apply_tensor_parallel(root: TrainModel, mesh: Mesh) -> frozenset[str]:
    """Shard a model over the tensor group, in place.

    With its adapter and fused modules, before all else that wraps it; on meta or not (a quantized
    base: on meta). Every micro batch then has a multiple of `mesh.shape.tensor` tokens, and the
    ranks of a group take the same ones. Dropout of adapters draws what one process draws if the
    group has one seed; attention's own dropout, which no family has by default, draws alike for the
    heads of each rank.

    Returns:
        The names, in the causal LM, of the parameters for `reduce_gradients`.

    Raises:
        ModelError: for a model whose sharding is not supported.
        RecipeError: for sizes that do not divide, and for what such a model does not compute: eager
            attention, and an adapter on the head.
    """
    if mesh.tensor_group is None:
        return frozenset()
    model = root.model
    blocks = find_blocks(model)
    # All checks come first: the model is changed in place.
    _check_sizes(model, blocks, mesh.shape.tensor)
    if root.attention_backend == "eager":
        raise _not_supported("eager attention", "model.attention")
    if isinstance(root.head, LoraLinear):
        raise _not_supported("an adapter on the head", "adapter.target")
    sharder = _ModelSharder(mesh)
    for block in blocks:
        sharder.shard_block(block)
    sharder.shard_vocabulary(model.get_input_embeddings(), root.head)
    decoder = find_decoder(model)
    # What is not sharded by now stays whole on every rank.
    for module in decoder.modules():
        sharder.replicate_module(module)
    sharder.gather_output(decoder)
    return frozenset(name for name, p in model.named_parameters() if p in sharder.partial)


def _not_supported(what: str, where: str) -> RecipeError:
    fix = f"remove it, or {TENSOR_KEY}: 1"
    return RecipeError(f"{what} has no tensor parallelism", where=where, fix=fix)


def reduce_gradients(grads: Mapping[str, Tensor], partial: Collection[str], mesh: Mesh) -> None:
    """Sum the gradients of the `partial` parameters over the tensor group, in place.

    A collective call, once a step, before the norm. Gradients are DTensors, or this rank's parts of
    them; `partial` is what `apply_tensor_parallel` returned.
    """
    parts = [local_part(grad) for name, grad in grads.items() if name in partial]
    all_reduce_together(parts, mesh.tensor_group)


def _check_sizes(model: PreTrainedModel, blocks: list[ParallelBlock], size: int) -> None:
    """RecipeError where heads, columns or blocks of 4-bit weights do not divide among the ranks."""
    counts = [("attention heads", find_decoder(model).config.num_attention_heads)]
    for block in blocks:
        kind = block.name.rpartition(".")[2]
        [(name, layer)] = block.rowwise.items()
        if block.kv_heads is not None:
            counts.append((f"key-value heads in {kind}", block.kv_heads))
        else:
            counts.append((f"columns in {kind}", layer.in_features))
        block_size = layer.format.block if isinstance(layer, FrozenLinear) else 1
        if block_size > 1:
            # No block of weights with one scale reaches into another row, of this layer and of
            # those it follows.
            whole = layer.in_features % block_size == layer.out_features % block_size == 0
            count = layer.in_features // block_size if whole else 1
            counts.append((f"nf4 blocks in a row of {kind}.{name}", count))
    for what, count in counts:
        if count % size:
            raise RecipeError(
                f"{size} ranks cannot share the layers of this model",
                where=TENSOR_KEY,
                why=f"it has {count:,} {what}, which must be divisible by the number of ranks",
                fix=f"{TENSOR_KEY}: 1, or another divisor of {count}",
            )


class TensorParallelPart(nn.Module):
    """A module that the ranks of a group compute together."""

    tensor_group: RankGroup


PartT = TypeVar("PartT", bound=TensorParallelPart)


class _ModelSharder:
    """Shards module after module, each shared parameter once.

    Attributes:
        sharded: old parameters and what stands in their place.
        partial: new parameters whose gradients are parts of a sum.
    """

    def __init__(self, mesh: Mesh) -> None:
        assert mesh.tensor_group is not None
        self.mesh = mesh.tensor
        self.group = RankGroup(mesh.tensor_group.group_name, mesh.shape.tensor, mesh.tensor_rank)
        self.sharded: dict[nn.Parameter, nn.Parameter] = {}
        self.partial: set[nn.Parameter] = set()

    def shard_block(self, block: ParallelBlock) -> None:
        """Shard the linear layers of attention or an MLP; each rank computes its part of both."""
        for layer in block.colwise.values():
            self.shard_linear(layer, ROWS)
        for layer in block.rowwise.values():
            self.shard_linear(layer, COLUMNS)
        for norm in block.norms.values():
            self.add_mixin(norm, NormOfHeads)
            self.shard_parameter(norm, "weight", ROWS)
        for name in block.by_head:
            self.shard_parameter(block.module, name, ROWS)
        if block.by_head:
            self.add_mixin(block.module, LocalParameters)
        self.add_mixin(block.module, SequenceParallelBlock)

    def replicate_module(self, module: nn.Module) -> None:
        """Keep the parameters of a norm whole, or of any module that is not sharded by now."""
        if isinstance(module, ExpertStack):
            return  # codes, of which every rank has all; they are not trained, and no DTensors
        computes_locally = isinstance(module, FusedNorm | FusedZeroCenteredNorm | LowRank)
        parameters = dict(module.named_parameters(recurse=False))
        if has_codes(module):
            # Codes are not trained, and no DTensors.
            computes_locally = True
            names = parameters.keys() & {"bias", "lora_A", "lora_B"}
            parameters = {name: parameters[name] for name in sorted(names)}
        if not parameters:
            return
        if any(isinstance(parameter, DTensor) for parameter in parameters.values()):
            return
        for name in parameters:
            self.replicate_parameter(module, name)
        if not computes_locally:
            self.add_mixin(module, LocalParameters)

    def gather_output(self, decoder: nn.Module) -> None:
        """Make the decoder give the hidden states of all tokens."""
        group = self.group

        def gather(
            _module: nn.Module, _inputs: object, output: BaseModelOutputWithPast
        ) -> BaseModelOutputWithPast:
            output.last_hidden_state = _gather(output.last_hidden_state, group)
            return output

        decoder.register_forward_hook(gather)

    def shard_linear(self, layer: nn.Linear | FrozenLinear, dim: int) -> None:
        """Shard weight, bias and adapter of a linear layer along a dimension of its weight."""
        sizes = [layer.out_features, layer.in_features]
        # From here on the layer has the sizes of this rank's part.
        sizes[dim] //= self.group.size
        layer.out_features, layer.in_features = sizes
        if isinstance(layer, FrozenLinear) and has_codes(layer):
            layer.tensor_shard = TensorShard(dim, self.group.rank, self.group.size, self.group.name)
            # Anew, for the smaller sizes; the weights come later.
            layer.allocate(torch.device("meta"))
        else:
            # With an adapter the layer's own forward computes with local parts.
            if not isinstance(layer, LoraLinear):
                self.add_mixin(layer, ShardedLinear)
            self.shard_parameter(layer, "weight", dim)
        if layer.bias is not None and dim == ROWS:
            self.shard_parameter(layer, "bias", ROWS)
        elif layer.bias is not None:
            self.replicate_parameter(layer, "bias")
            self.add_mixin(layer, BiasOfSum)
        if not isinstance(layer, LoraLinear):
            return
        # A reads what its layer reads, and B writes what it writes.
        layer.first = 0
        if dim == COLUMNS:
            # Where its inputs lie in the whole layer: dropout draws for all of them.
            layer.first = layer.in_features * self.group.rank
            self.shard_parameter(layer, "lora_A", COLUMNS)
            self.replicate_parameter(layer, "lora_B")
        else:
            self.replicate_parameter(layer, "lora_A")
            self.shard_parameter(layer, "lora_B", ROWS)

    def shard_vocabulary(self, embedding: nn.Module, head: nn.Linear) -> None:
        """Shard embedding and head by the vocabulary; the last rank may have fewer tokens."""
        tokens = self.add_mixin(embedding, VocabParallelEmbedding)
        logits = self.add_mixin(head, VocabParallelHead)
        for module in (tokens, logits):
            for name, _ in list(module.named_parameters(recurse=False)):
                self.shard_parameter(module, name, ROWS)
        # Alike on every rank, as chunks go by it.
        logits.out_features = ceil_div(logits.out_features, self.group.size)
        tokens.first = logits.out_features * self.group.rank
        tokens.padding_idx = _padding_here(tokens)
        logits.shard = VocabularyShard(tokens.first, self.group.name)

    def add_mixin(self, module: nn.Module, mixin: type[PartT]) -> PartT:
        part = add_mixin(module, mixin)
        part.tensor_group = self.group
        return part

    def shard_parameter(self, module: nn.Module, name: str, dim: int) -> None:
        """Leave this rank its part of a parameter along `dim`."""
        whole = module.get_parameter(name)
        if whole not in self.sharded:
            part = whole.detach().chunk(self.group.size, dim)[self.group.rank]
            # A copy, so that the memory of the other parts is freed.
            part = part.clone(memory_format=torch.contiguous_format)
            self.sharded[whole] = self._distributed(part, whole, Shard(dim))
        setattr(module, name, self.sharded[whole])

    def replicate_parameter(self, module: nn.Module, name: str) -> None:
        """Keep a parameter whole; its gradient is a part of a sum."""
        whole = module.get_parameter(name)
        if whole not in self.sharded:
            self.sharded[whole] = self._distributed(whole.detach(), whole, Replicate())
            self.partial.add(self.sharded[whole])
        setattr(module, name, self.sharded[whole])

    def _distributed(self, part: Tensor, whole: nn.Parameter, placement: Placement) -> nn.Parameter:
        # Local shapes may be uneven, so the whole one is stated; nothing is compared over the
        # ranks.
        tensor = DTensor.from_local(
            part,
            self.mesh,
            [placement],
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
        return nn.Parameter(tensor, requires_grad=whole.requires_grad)


# ---- collectives with a gradient; activations are [1, tokens, width], of shared experts also
# [tokens, width] ----


def _gather(x: Tensor, group: RankGroup) -> Tensor:
    # Dimension 0 is what the collectives split: [1, tokens, width] -> [tokens, width].
    return gather_rows(x.flatten(0, -2), group).view(*x.shape[:-2], -1, x.shape[-1])


def _scatter(x: Tensor, group: RankGroup) -> Tensor:
    return scatter_sum(x.flatten(0, -2), group).view(*x.shape[:-2], -1, x.shape[-1])


class _SumContext(SavingContext):
    group: RankGroup


class _SumOfRanks(torch.autograd.Function):
    """The sum over the ranks, which the output of each of them depends on."""

    @staticmethod
    def forward(ctx: _SumContext, x: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return collective("all_reduce", x, "sum", group.name)

    @staticmethod
    def backward(ctx: _SumContext, *grads: Tensor) -> tuple[Tensor, None]:
        # Every rank's output depends on x of this one: the gradients of all outputs are summed.
        return collective("all_reduce", grads[0], "sum", ctx.group.name), None


# ---- mixins for the modules of a sharded model ----


class ShardedLinear(TensorParallelPart):
    """An `nn.Linear` with a part of the rows or columns."""

    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local_part(self.weight), local_part(self.bias))


class VocabParallelHead(ShardedLinear, ShardedHead):
    """An output layer with the rows of this rank's tokens."""


class LocalParameters(TensorParallelPart):
    """A module whose forward, torch's or Transformers' own, computes with this rank's parameters.

    Elsewhere it has the DTensors: FSDP reads them by name.
    """

    is_computing = False

    def forward(self, *args: object, **kwargs: object) -> object:
        self.is_computing = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.is_computing = False

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        value = super().__getattr__(name)
        return local_part(value) if self.is_computing else value


class NormOfHeads(TensorParallelPart):
    """An RMSNorm over all heads, of which this rank has some."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # The sum over this rank's heads; the mean is over the heads of all ranks.
        squares = wide.square().sum(-1, keepdim=True)
        width = x.shape[-1] * self.tensor_group.size
        mean = _SumOfRanks.apply(squares, self.tensor_group) / width
        scale = torch.rsqrt(mean + self.variance_epsilon)
        normed = wide * scale
        weight = local_part(self.weight)
        if isinstance(self, FusedWideNorm):
            return (normed * weight.to(wide.dtype)).to(x.dtype)
        y: Tensor = normed.to(x.dtype) * weight
        return y


class BiasOfSum(LocalParameters):
    """A layer that is sharded by input columns: one rank adds the bias of the sum."""

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        value = super().__getattr__(name)
        if name != "bias" or not self.is_computing or self.tensor_group.rank == 0:
            return value
        assert isinstance(value, Tensor)
        # Times 0, so that every rank has a gradient, and the sum of them is the bias's.
        return value * 0.0


class VocabParallelEmbedding(LocalParameters):
    """An embedding with the rows of this rank's tokens, from `first` on."""

    first: int
    weight: nn.Parameter
    padding_idx: int | None

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        """ids: all positions, [1, n]; returns this rank's positions, [1, n / ranks, width]."""
        size = self.tensor_group.size
        assert ids.shape[1] % size == 0, (
            f"micro batches must have a multiple of {size} tokens, for {TENSOR_KEY}: {size}"
        )
        # Another rank's token reads row 0 here, and adds 0 to the sum.
        rows = ids - self.first
        inside = (rows >= 0) & (rows < len(local_part(self.weight)))
        # Some multiply what they read.
        y = super().forward(rows.where(inside, 0))
        assert isinstance(y, Tensor)
        # [1, n, width] times [1, n, 1]: each token comes from one rank, and the sum adds zeros.
        return _scatter(y * inside.unsqueeze(2), self.tensor_group)


def _padding_here(embedding: "VocabParallelEmbedding") -> int | None:
    """The padding token's row in this rank's part, which gets no gradient; None: elsewhere."""
    if embedding.padding_idx is None:
        return None
    row = embedding.padding_idx - embedding.first
    return row if 0 <= row < len(local_part(embedding.weight)) else None


class SequenceParallelBlock(TensorParallelPart):
    """Attention with a part of the heads, or an MLP with a part of the columns.

    From this rank's tokens to this rank's tokens.
    """

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        y = super().forward(_gather(hidden_states, self.tensor_group), *args, **kwargs)
        if isinstance(y, tuple):  # attention
            return _scatter(y[0], self.tensor_group), *y[1:]
        return _scatter(y, self.tensor_group)
