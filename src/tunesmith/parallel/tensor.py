"""Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053): a group of ranks computes each layer together.

- q, k, v, gate and up are cut by output rows, so that a rank has whole heads; o and down by input columns, so that their
  outputs are parts of a sum; embedding and head by the vocabulary; A and B of an adapter as their layer.
- Between attention and MLP, activations are cut by tokens (sequence parallel: Korthikanti et al. 2022, arXiv:2205.05198).
  Tokens are gathered before each of the two; the parts of its sum are added and scattered after it.
- Norms, A of a layer that is cut by rows and B of one that is cut by columns are whole on every rank, and their gradients
  are parts of a sum. Nothing raises where that sum is left out.

Parameters become DTensors on the tensor mesh, so that sharding, the optimizer and checkpoints know their whole shapes.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PreTrainedModel

from tunesmith.adapter.lora import Lora
from tunesmith.distributed.torch_private import collective
from tunesmith.distributed.vocab_parallel import ShardedHead, VocabularyShard, local_part
from tunesmith.errors import ModelError, RecipeError
from tunesmith.methods.base import TrainModel
from tunesmith.model.architectures import ARCHITECTURES
from tunesmith.model.fused import FusedAttention, FusedMLP, FusedNorm, add_mixin
from tunesmith.parallel.mesh import Mesh, all_reduce_together
from tunesmith.quant.frozen_linear import FrozenLinear, TensorShard
from tunesmith.quant.nf4 import BLOCK, Nf4Linear

KEY = "parallel.tensor"
ROWS, COLUMNS = 0, 1  # dimensions of a weight [out_features, in_features]
# What Transformers' own plan must say; like us it may sum the gradients of heads' norms, and cut a tied embedding (5.17).
PLAN = {f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}
PLAN |= {f"layers.*.mlp.{name}_proj": "colwise" for name in ("gate", "up")}
PLAN |= {f"layers.*.{name}_proj": "rowwise" for name in ("self_attn.o", "mlp.down")}


class TensorGroup(NamedTuple):
    """A tensor group as this rank sees it, in constants of a compiled graph."""

    name: str
    size: int
    rank: int


def cut_model(root: TrainModel, mesh: Mesh) -> frozenset[str]:
    """Cut a model over the tensor group, in place: with its adapter and fused modules, before all else that wraps it.

    On meta or not (a quantized base: on meta). Every micro batch then has a multiple of `mesh.shape.tensor` tokens, and the ranks of a
    group take the same ones. Dropout of adapters draws what one process draws if the group has one seed; attention's own
    dropout, which no family has by default, draws alike for the heads of each rank.

    Returns the names, in the causal LM, of the parameters for `reduce_gradients`.

    ModelError for a family whose cut is not known; RecipeError for sizes that do not divide, and for what a cut model does
    not compute: eager attention, and an adapter on the head.
    """
    if mesh.tensor_group is None:
        return frozenset()
    model, cutter = root.model, _Cutter(mesh)
    _check_family(model)
    _check_sizes(model, mesh.shape.tensor)
    for what, where, present in (
        ("eager attention", "model.attention", root.attention_backend == "eager"),
        ("an adapter on the head", "adapter.target", isinstance(root.head, Lora)),
    ):
        if present:
            raise RecipeError(
                f"{what} has no tensor parallelism", where=where, fix=f"leave it out, or {KEY}: 1"
            )
    for module in list(model.modules()):
        cutter.cut(module)
    cutter.cut_ends(model.get_input_embeddings(), root.head)
    cutter.mix(model.base_model.norm, GatheredNorm)
    return frozenset(name for name, p in model.named_parameters() if p in cutter.partial)


def reduce_gradients(grads: Mapping[str, Tensor], partial: Collection[str], mesh: Mesh) -> None:
    """Sum over the tensor group, in place and in one piece, the gradients of the parameters that `cut_model` named.

    A collective call, once a step, before the norm. Gradients are DTensors, or this rank's parts of them.
    """
    all_reduce_together(
        [local_part(grad) for name, grad in grads.items() if name in partial], mesh.tensor_group
    )


def _check_family(model: PreTrainedModel) -> None:
    kind, plan = model.config.model_type, model.config.base_model_tp_plan or {}
    others = {plan[key] for key in plan.keys() - {*PLAN, "embed_tokens"}}
    same = PLAN.items() <= plan.items() and others <= {"replicated_with_grad_allreduce"}
    fused = [
        sum(isinstance(m, mixin) for m in model.modules()) for mixin in (FusedAttention, FusedMLP)
    ]
    summed = [m for name, m in model.named_modules() if name.endswith(("o_proj", "down_proj"))]
    if (
        not same
        or fused != [model.config.num_hidden_layers] * 2
        or any(m.bias is not None for m in summed)
    ):
        known = ", ".join(name for name, family in ARCHITECTURES.items() if family.fused)
        why = f"it is known for {known} with an MLP of silu and no bias behind attention or MLP"
        fix = f"{KEY}: 1; parallel.shard divides the memory of any family"
        raise ModelError(
            f"how to cut this {kind} over ranks is not known", where=KEY, why=why, fix=fix
        )


def _check_sizes(model: Any, size: int) -> None:
    config = model.config
    counts = {
        "attention heads": config.num_attention_heads,
        "key-value heads": config.num_key_value_heads,
    }
    counts["MLP columns"] = config.intermediate_size
    for name, layer in model.named_modules():
        if isinstance(layer, Nf4Linear) and name.endswith(
            ("0.self_attn.o_proj", "0.mlp.down_proj")
        ):
            # No block of weights with one scale reaches into another row, of this layer and of those it follows.
            whole = layer.in_features % BLOCK == layer.out_features % BLOCK == 0
            counts[f"nf4 blocks in a row of {name}"] = layer.in_features // BLOCK if whole else 1
    if wrong := [f"{count:,} {name}" for name, count in counts.items() if count % size]:
        common = math.gcd(*counts.values())
        fitting = [str(n) for n in range(1, common + 1) if common % n == 0]
        what, why = (
            f"{size} ranks cannot cut this model",
            f"it has {' and '.join(wrong)}, of which each takes as many",
        )
        raise RecipeError(what, where=KEY, why=why, fix=f"{KEY}: {' or '.join(fitting)}")


class _Cutter:
    """Cuts module after module, each shared parameter once, and keeps whose gradients are parts of a sum."""

    def __init__(self, mesh: Mesh) -> None:
        assert mesh.tensor_group is not None
        self.mesh = mesh.tensor
        self.group = TensorGroup(mesh.tensor_group.group_name, mesh.shape.tensor, mesh.tensor_rank)
        self.made: dict[nn.Parameter, nn.Parameter] = {}
        self.partial: set[nn.Parameter] = set()

    def cut(self, module: nn.Module) -> None:
        """Cut the linear layers of attention or of an MLP, and what enters and leaves it; a norm stays whole."""
        if isinstance(module, FusedAttention | FusedMLP):
            for name in module.group:
                self.cut_linear(module.get_submodule(name), ROWS)
            last = "o_proj" if isinstance(module, FusedAttention) else "down_proj"
            self.cut_linear(module.get_submodule(last), COLUMNS)
            self.mix(module, GatheredLayer)
        elif isinstance(module, FusedNorm):
            self.cut_parameter(module, "weight", None)

    def cut_linear(self, layer: Any, dim: int) -> None:
        """Cut weight, bias and adapter of a linear layer along a dimension of its weight."""
        sizes = [layer.out_features, layer.in_features]
        sizes[dim] //= self.group.size
        layer.out_features, layer.in_features = sizes
        if isinstance(layer, FrozenLinear):
            layer.tensor_shard = TensorShard(dim, self.group.rank, self.group.size, self.group.name)
            layer.allocate(torch.device("meta"))
        else:
            if not isinstance(layer, Lora):
                self.mix(layer, CutLinear)
            self.cut_parameter(layer, "weight", dim)
        if layer.bias is not None:
            self.cut_parameter(layer, "bias", ROWS)
        if isinstance(layer, Lora):
            self.cut_parameter(layer, "lora_A", COLUMNS if dim == COLUMNS else None)
            self.cut_parameter(layer, "lora_B", ROWS if dim == ROWS else None)
            layer.first = layer.in_features * self.group.rank if dim == COLUMNS else 0

    def cut_ends(self, embedding: Any, head: Any) -> None:
        """Cut embedding and head by the vocabulary; the last rank may have fewer tokens."""
        for module, mixin in ((embedding, CutEmbedding), (head, CutHead)):
            self.mix(module, mixin)
            for name, _ in list(module.named_parameters(recurse=False)):
                self.cut_parameter(module, name, ROWS)
        # Alike on every rank, as chunks go by it
        head.out_features = -(-head.out_features // self.group.size)
        embedding.first = head.out_features * self.group.rank
        head.shard = VocabularyShard(embedding.first, self.group.name)

    def mix(self, module: Any, mixin: type[nn.Module]) -> None:
        add_mixin(module, mixin)
        module.tensor_group = self.group

    def cut_parameter(self, module: nn.Module, name: str, dim: int | None) -> None:
        """Cut a parameter along `dim`, or note that it is whole (None) and its gradient a part of a sum."""
        old = module.get_parameter(name)
        if old not in self.made:
            part = old.detach()
            if dim is not None:
                part = part.chunk(self.group.size, dim)[self.group.rank].clone(
                    memory_format=torch.contiguous_format
                )
            whole: dict[str, Any] = {"shape": old.shape, "stride": old.stride(), "run_check": False}
            tensor = DTensor.from_local(
                part, self.mesh, [Replicate() if dim is None else Shard(dim)], **whole
            )
            self.made[old] = nn.Parameter(tensor, requires_grad=old.requires_grad)
            if dim is None:
                self.partial.add(self.made[old])
        setattr(module, name, self.made[old])


# ---- collectives with a gradient; activations are [1, tokens, width] ----


def _exchange(x: Tensor, group: TensorGroup, gather: bool) -> Tensor:
    """All ranks' rows where `gather`, else this rank's rows of the sum over the ranks: each is the other's gradient."""
    if gather:
        return collective("all_gather_into_tensor", x, group.size, group.name)
    return collective("reduce_scatter_tensor", x, "sum", group.size, group.name)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup, gather: bool) -> Tensor:
        ctx.group, ctx.gather = group, gather
        return _exchange(x, group, gather)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(grads[0], ctx.group, not ctx.gather), None, None


def _gather(x: Tensor, group: TensorGroup) -> Tensor:
    return _Exchange.apply(x.squeeze(0), group, True).unsqueeze(0)


def _scatter(x: Tensor, group: TensorGroup) -> Tensor:
    return _Exchange.apply(x.squeeze(0), group, False).unsqueeze(0)


# ---- mixins for the modules of a cut model ----


class CutLinear(nn.Module):
    """An `nn.Linear` with a part of the rows or columns."""

    tensor_group: TensorGroup

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        return F.linear(x, local_part(own.weight), local_part(own.bias))


class CutHead(CutLinear, ShardedHead):
    """An output layer with the rows of this rank's tokens."""


class CutEmbedding(nn.Module):
    """An embedding with the rows of this rank's tokens, from `first` on."""

    tensor_group: TensorGroup
    first: int

    def forward(self, ids: Tensor) -> Tensor:
        """ids: all positions, [1, n]; returns this rank's positions, [1, n / ranks, width]."""
        own: Any = self
        weight, size = local_part(own.weight), self.tensor_group.size
        assert ids.shape[1] % size == 0, (
            f"micro batches must have a multiple of {size} tokens, for {KEY}: {size}"
        )
        rows = ids - self.first
        inside = (rows >= 0) & (rows < len(weight))
        # Its row gets no gradient
        padding = -1 if own.padding_idx is None else own.padding_idx - self.first
        y = F.embedding(
            rows.where(inside, 0), weight, padding if 0 <= padding < len(weight) else None
        )
        return _scatter(y * inside.unsqueeze(2), self.tensor_group)


class GatheredNorm(nn.Module):
    """The last norm, which gives all tokens."""

    tensor_group: TensorGroup

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _gather(super().forward(hidden_states), self.tensor_group)


class GatheredLayer(nn.Module):
    """Attention with a part of the heads or an MLP with a part of the columns, from this rank's tokens to them."""

    tensor_group: TensorGroup

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(_gather(hidden_states, self.tensor_group), *args, **kwargs)
        if isinstance(y, tuple):  # attention
            return _scatter(y[0], self.tensor_group), *y[1:]
        return _scatter(y, self.tensor_group)
