"""Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053): ranks compute each layer together.

- Transformers' plan selects the sharded layers (`cuts.py`). q, k, v, gate and up are sharded by
output rows, so that each rank has complete heads. torch calls this colwise, because it transposes
the weight. o and down are sharded by input columns (rowwise), so that the ranks' outputs must be
summed. Embedding and head are sharded by the vocabulary. A and B of an adapter are sharded like
their layer. - Between attention and MLP, activations are sharded by tokens (sequence parallelism:
Korthikanti et al. 2022, arXiv:2205.05198). Tokens are gathered before each block. After the block,
the outputs of the ranks are summed and scattered. - Every rank holds router and experts completely
and computes them for its own tokens. No activation has to be sent for them, and the work is divided
over the ranks as evenly as in other layers. - Some parameters are replicated, and each rank
computes only a part of their gradient: norms, routers, experts with their adapter, the bias of a
layer sharded by columns, A of a layer sharded by rows, and B of a layer sharded by columns.
`reduce_gradients` sums these parts. If the call is forgotten, training continues without an error,
but with wrong gradients.

Parameters become DTensors on the tensor mesh, so that FSDP, the optimizer and checkpoints know
their global shapes.
"""

from collections.abc import Collection, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from tunesmith.adapter.lora import LoraLinear
from tunesmith.adapter.low_rank import LowRank
from tunesmith.config.names import last_part
from tunesmith.distributed.row_exchange import RankGroup, gather_rows, scatter_sum
from tunesmith.distributed.torch_private import SavingContext, collective
from tunesmith.distributed.vocab_parallel import ShardedHead, VocabularyShard, local_part
from tunesmith.errors import RecipeError
from tunesmith.formats.base import TensorShard
from tunesmith.formats.linear import FrozenLinear, has_codes
from tunesmith.formats.stack import ExpertStack
from tunesmith.model.known.decoder import find_decoder
from tunesmith.model.layers.fused import FusedNorm, FusedWideNorm, FusedZeroCenteredNorm, add_mixin
from tunesmith.parallel.cuts import TENSOR_KEY, ParallelBlock, find_blocks
from tunesmith.parallel.mesh import Mesh, all_reduce_together
from tunesmith.train_model import TrainModel
from tunesmith.units import ceil_div

ROWS, COLUMNS = 0, 1  # dimensions of a weight [out_features, in_features]


def apply_tensor_parallel(root: TrainModel, mesh: Mesh) -> frozenset[str]:
    """Shard a model over the tensor group, in place.

    Call this after the adapter and the fused modules are added, and before the model is wrapped. A
    quantized base must be on the meta device. Afterwards every micro batch must have a multiple of
    `mesh.shape.tensor` tokens, and all ranks of a tensor group must get the same micro batches.

    If the ranks of a group have the same seed, the dropout of adapters uses the same mask as in a
    single process. Dropout in attention is an exception, because every rank uses the same mask for
    its heads. No model family has this dropout by default.

    Returns:
        The names of the parameters that `reduce_gradients` must sum. They are names in the causal
        LM.

    Raises:
        ModelError: if this model cannot be sharded.
        RecipeError: if the number of ranks does not divide a size, or if the run uses eager
            attention or an adapter on the head.
    """
    if mesh.tensor_group is None:
        return frozenset()
    model = root.model
    blocks = find_blocks(model)
    # Run all checks before the first change, because the model is changed in place.
    _check_sizes(model, blocks, mesh.shape.tensor)
    if root.attention_backend == "eager":
        raise _not_supported("eager attention", "model.attention")
    if isinstance(root.head, LoraLinear):
        raise _not_supported("an adapter on the output layer", "adapter.target")
    sharder = _ModelSharder(mesh)
    for block in blocks:
        sharder.shard_block(block)
    sharder.shard_vocabulary(model.get_input_embeddings(), root.head)
    decoder = find_decoder(model)
    # Replicate all modules that are not sharded yet, so that every rank holds them completely.
    for module in decoder.modules():
        sharder.replicate_module(module)
    sharder.gather_output(decoder)
    return frozenset(name for name, p in model.named_parameters() if p in sharder.partial)


def _not_supported(what: str, where: str) -> RecipeError:
    return RecipeError(
        f"{what} does not work with tensor parallelism",
        where=where,
        fix=f"remove this setting, or set {TENSOR_KEY}: 1",
    )


def reduce_gradients(grads: Mapping[str, Tensor], partial: Collection[str], mesh: Mesh) -> None:
    """Sum the gradients of the `partial` parameters over the tensor group, in place.

    This is a collective call. Call it once per step, before the gradient norm is computed.

    Args:
        grads: gradients by parameter name, as DTensors or as local tensors.
        partial: the names that `apply_tensor_parallel` returned.
    """
    parts = [local_part(grad) for name, grad in grads.items() if name in partial]
    all_reduce_together(parts, mesh.tensor_group)


def _check_sizes(model: PreTrainedModel, blocks: list[ParallelBlock], size: int) -> None:
    """Raise RecipeError if heads, columns or 4-bit blocks cannot be divided evenly among the
    ranks.
    """
    counts = [("attention heads", find_decoder(model).config.num_attention_heads)]
    for block in blocks:
        kind = last_part(block.name)
        [(name, layer)] = block.rowwise.items()
        if block.kv_heads is not None:
            counts.append((f"key-value heads in {kind}", block.kv_heads))
        else:
            counts.append((f"columns in {kind}", layer.in_features))
        block_size = layer.format.block if isinstance(layer, FrozenLinear) else 1
        if block_size > 1:
            # Quantized weights can be divided only if each row consists of complete blocks, because
            # the weights of a block share a scale. A row of this layer has `in_features` weights. A
            # row of the colwise layers before it has as many weights as this layer has outputs.
            has_whole_blocks = (
                layer.in_features % block_size == layer.out_features % block_size == 0
            )
            count = layer.in_features // block_size if has_whole_blocks else 1
            counts.append((f"nf4 blocks in a row of {kind}.{name}", count))
    for what, count in counts:
        if count % size:
            raise RecipeError(
                f"{size} ranks cannot share the layers of this model",
                where=TENSOR_KEY,
                why=f"the model has {count:,} {what}, which must be divisible by the number of "
                "ranks",
                fix=f"set {TENSOR_KEY}: 1, or another divisor of {count}",
            )


class TensorParallelPart(nn.Module):
    """Mixin for a module that the ranks of a tensor group compute together."""

    tensor_group: RankGroup


PartT = TypeVar("PartT", bound=TensorParallelPart)


class _ModelSharder:
    """Helper that shards one model, module by module. It remembers sharded parameters, so that a
    parameter that is used by two modules is sharded only once.

    Attributes:
        sharded: maps each original parameter to the parameter that replaces it.
        partial: the new parameters of which each rank computes only a part of the gradient.
    """

    def __init__(self, mesh: Mesh) -> None:
        assert mesh.tensor_group is not None
        self.mesh = mesh.tensor
        self.group = RankGroup(mesh.tensor_group.group_name, mesh.shape.tensor, mesh.tensor_rank)
        self.sharded: dict[nn.Parameter, nn.Parameter] = {}
        self.partial: set[nn.Parameter] = set()

    def shard_block(self, block: ParallelBlock) -> None:
        """Shard the linear layers, norms and own parameters of an attention or MLP block."""
        for layer in block.colwise.values():
            self.shard_linear(layer, ROWS)
        for layer in block.rowwise.values():
            self.shard_linear(layer, COLUMNS)
        for norm in block.norms.values():
            self.add_mixin(norm, NormOfHeads)
            self.distribute(norm, "weight", ROWS)
        for name in block.by_head:
            self.distribute(block.module, name, ROWS)
        if block.by_head:
            self.add_mixin(block.module, LocalParameters)
        self.add_mixin(block.module, SequenceParallelBlock)

    def replicate_module(self, module: nn.Module) -> None:
        """Replicate the parameters of a module that is not sharded yet, such as a norm."""
        # Every rank has all experts. The quantized codes are not trained, so they need not become
        # DTensors.
        if isinstance(module, ExpertStack):
            return
        parameters = dict(module.named_parameters(recurse=False))
        is_quantized = has_codes(module)
        if is_quantized:
            # Only these parameters become DTensors, because quantized codes are not trained.
            names = parameters.keys() & {"bias", "lora_A", "lora_B"}
            parameters = {name: parameters[name] for name in sorted(names)}
        is_sharded = any(isinstance(parameter, DTensor) for parameter in parameters.values())
        if not parameters or is_sharded:
            return
        for name in parameters:
            self.distribute(module, name, None)
        # The forwards of the other modules already use local tensors.
        if not is_quantized and not isinstance(module, FusedNorm | FusedZeroCenteredNorm | LowRank):
            self.add_mixin(module, LocalParameters)

    def gather_output(self, decoder: nn.Module) -> None:
        """Add a hook to the decoder so that it returns the hidden states of all tokens."""
        group = self.group

        def gather(_module: object, _inputs: object, output: BaseModelOutputWithPast) -> object:
            output.last_hidden_state = _gather(output.last_hidden_state, group)
            return output

        decoder.register_forward_hook(gather)

    def shard_linear(self, layer: nn.Linear | FrozenLinear, dim: int) -> None:
        """Shard weight, bias and adapter of a linear layer along a dimension of its weight."""
        sizes = [layer.out_features, layer.in_features]
        # Set the sizes of the layer to those of this rank's shard.
        sizes[dim] //= self.group.size
        layer.out_features, layer.in_features = sizes
        if isinstance(layer, FrozenLinear) and has_codes(layer):
            layer.tensor_shard = TensorShard(dim, self.group.rank, self.group.size, self.group.name)
            # Allocate the quantized tensors again with the sizes of the shard. The weights are
            # loaded later.
            layer.allocate(torch.device("meta"))
        else:
            # The forward of a LoraLinear already uses local shards and needs no mixin.
            if not isinstance(layer, LoraLinear):
                self.add_mixin(layer, ShardedLinear)
            self.distribute(layer, "weight", dim)
        has_all_outputs = dim == COLUMNS
        if layer.bias is not None:
            self.distribute(layer, "bias", None if has_all_outputs else ROWS)
            if has_all_outputs:
                self.add_mixin(layer, BiasOfSum)
        if isinstance(layer, LoraLinear):
            # lora_A has the dimension of the layer's inputs, and lora_B that of the outputs. If
            # inputs or outputs are sharded, the same dimension of lora_A or lora_B is sharded.
            self.distribute(layer, "lora_A", COLUMNS if has_all_outputs else None)
            self.distribute(layer, "lora_B", None if has_all_outputs else ROWS)
            # The offset of this rank's inputs in the unsharded layer. Dropout draws a mask for all
            # inputs and uses the part that starts at this offset.
            layer.first = layer.in_features * self.group.rank if has_all_outputs else 0

    def shard_vocabulary(self, embedding: nn.Module, head: nn.Linear) -> None:
        """Shard embedding and head by the vocabulary. The last rank may have fewer tokens."""
        tokens = self.add_mixin(embedding, VocabParallelEmbedding)
        logits = self.add_mixin(head, VocabParallelHead)
        for module in (tokens, logits):
            for name, _ in list(module.named_parameters(recurse=False)):
                self.distribute(module, name, ROWS)
        # Set the same out_features on every rank, because the loss computes its chunk size from it.
        logits.out_features = ceil_div(logits.out_features, self.group.size)
        tokens.first = logits.out_features * self.group.rank
        # The padding token gets no gradient. Keep its row only if it is on this rank.
        row = None if tokens.padding_idx is None else tokens.padding_idx - tokens.first
        has_row = row is not None and 0 <= row < len(local_part(tokens.weight))
        tokens.padding_idx = row if has_row else None
        logits.shard = VocabularyShard(tokens.first, self.group.name)

    def add_mixin(self, module: nn.Module, mixin: type[PartT]) -> PartT:
        part = add_mixin(module, mixin)
        part.tensor_group = self.group
        return part

    def distribute(self, module: nn.Module, name: str, dim: int | None) -> None:
        """Replace a parameter by a DTensor that holds this rank's shard along `dim`.

        If `dim` is None, the DTensor is replicated. It is then recorded in `partial`, because each
        rank computes only a part of its gradient.
        """
        param = module.get_parameter(name)
        if param not in self.sharded:
            part = param.detach()
            if dim is not None:
                # Copy the shard, so that the memory of the entire parameter can be freed.
                part = part.chunk(self.group.size, dim)[self.group.rank]
                part = part.clone(memory_format=torch.contiguous_format)
            tensor = DTensor.from_local(
                part,
                self.mesh,
                [Replicate() if dim is None else Shard(dim)],
                # Do not compare the shapes over the ranks, because the shards may differ in size.
                run_check=False,
                shape=param.shape,
                stride=param.stride(),
            )
            self.sharded[param] = nn.Parameter(tensor, requires_grad=param.requires_grad)
            if dim is None:
                self.partial.add(self.sharded[param])
        setattr(module, name, self.sharded[param])


# Collectives with a gradient. Activations are [1, tokens, width]; in shared experts they may also
# be [tokens, width].


def _gather(x: Tensor, group: RankGroup) -> Tensor:
    # Flatten [1, tokens, width] to [tokens, width], because the collectives work on dimension 0.
    return gather_rows(x.flatten(0, -2), group).view(*x.shape[:-2], -1, x.shape[-1])


def _scatter(x: Tensor, group: RankGroup) -> Tensor:
    return scatter_sum(x.flatten(0, -2), group).view(*x.shape[:-2], -1, x.shape[-1])


class _SumContext(SavingContext):
    group: RankGroup


class _SumOfRanks(torch.autograd.Function):
    """Autograd function that sums a tensor over the ranks. Every rank uses the sum to compute its
    output.
    """

    @staticmethod
    def forward(ctx: _SumContext, x: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return collective("all_reduce", x, "sum", group.name)

    @staticmethod
    def backward(ctx: _SumContext, *grads: Tensor) -> tuple[Tensor, None]:
        # The output of every rank depends on this rank's x, so the gradients of all ranks are
        # summed.
        return collective("all_reduce", grads[0], "sum", ctx.group.name), None


# ---- mixins for the modules of a sharded model ----


class ShardedLinear(TensorParallelPart):
    """Mixin for an `nn.Linear` whose weight is sharded by rows or columns."""

    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local_part(self.weight), local_part(self.bias))


class VocabParallelHead(ShardedLinear, ShardedHead):
    """Mixin for an output layer with a sharded vocabulary. It has only the rows of this rank's part
    of the vocabulary.
    """


class LocalParameters(TensorParallelPart):
    """Mixin for a module whose original forward must read local tensors instead of DTensors.

    During the forward, the parameters of the module are local shards. At other times they are
    DTensors, because FSDP reads them by name.
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
    """Mixin for an RMSNorm over all heads, of which this rank has only some."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Sum over this rank's heads, then over the ranks, because the mean is over the heads of all
        # ranks.
        squares = wide.square().sum(-1, keepdim=True)
        width = x.shape[-1] * self.tensor_group.size
        mean = _SumOfRanks.apply(squares, self.tensor_group) / width
        normed = wide * torch.rsqrt(mean + self.variance_epsilon)
        weight = local_part(self.weight)
        if isinstance(self, FusedWideNorm):
            return (normed * weight.to(wide.dtype)).to(x.dtype)
        y: Tensor = normed.to(x.dtype) * weight
        return y


class BiasOfSum(LocalParameters):
    """Mixin for a layer that is sharded by input columns. Only rank 0 of the group adds the bias,
    because the outputs of the ranks are summed.
    """

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        value = super().__getattr__(name)
        if name != "bias" or not self.is_computing or self.tensor_group.rank == 0:
            return value
        assert isinstance(value, Tensor)
        # Multiply by 0 instead of returning None, so that every rank has a gradient of the bias.
        # The gradient is zero except on rank 0, so the sum over the ranks is correct.
        return value * 0.0


class VocabParallelEmbedding(LocalParameters):
    """Mixin for an embedding with a sharded vocabulary. It has only the rows of this rank's part of
    the vocabulary.

    Attributes:
        first: the first token id of this rank's part.
    """

    first: int
    weight: nn.Parameter
    padding_idx: int | None

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        """Compute the embeddings of all positions together with the other ranks, and return those
        of this rank's positions.

        Args:
            ids: the tokens of all positions, [1, n].

        Returns:
            The embeddings of this rank's positions, [1, n / ranks, width].
        """
        size = self.tensor_group.size
        assert ids.shape[1] % size == 0, (
            f"with {TENSOR_KEY}: {size}, a micro batch must have a multiple of {size} tokens"
        )
        # If another rank has the row of a token, read row 0 instead. It is multiplied by 0 below.
        rows = ids - self.first
        inside = (rows >= 0) & (rows < len(local_part(self.weight)))
        # Call the original forward, because some embedding classes scale their output.
        y = super().forward(rows.where(inside, 0))
        assert isinstance(y, Tensor)
        # Mask [1, n, width] with [1, n, 1]. For each token exactly one rank contributes, and the
        # other ranks add zeros.
        return _scatter(y * inside.unsqueeze(2), self.tensor_group)


class SequenceParallelBlock(TensorParallelPart):
    """Mixin for an attention or MLP block, of which this rank computes only some heads or columns.

    Input and output are the hidden states of this rank's tokens. The forward gathers the tokens of
    all ranks first.
    """

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        y = super().forward(_gather(hidden_states, self.tensor_group), *args, **kwargs)
        if isinstance(y, tuple):  # attention returns a tuple, and an MLP returns a tensor
            return _scatter(y[0], self.tensor_group), *y[1:]
        return _scatter(y, self.tensor_group)
