"""Data parallelism: a copy of the model on each rank, or shards of one (FSDP2), or both (HSDP).

Shards go through `fully_shard`. Copies do not: each rank computes as one process does, and
`copies.py` sums the gradients. An adapter is small: its parameters stay whole on every rank, and
their gradients are summed in one piece at the end of a step. Its frozen base is sharded without
them, so that nothing keeps room for gradients that never come.

Zhao et al. 2023, arXiv:2304.11277 (FSDP); PyTorch's `fully_shard`.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from tunesmith.adapter import lora
from tunesmith.config.schema import Run
from tunesmith.distributed.torch_private import let_codes_be_sharded
from tunesmith.distributed.vocab_parallel import GatheredHead
from tunesmith.methods.base import TrainModel
from tunesmith.model.decoder import vision_parameters
from tunesmith.model.fused import add_mixin
from tunesmith.model.load import widen
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.mesh_shape import needs_fsdp

HALF = (torch.bfloat16, torch.float16)
# Methods of the root, beside its forward, that read parameters.
PARAMETER_READERS = ("token_scores", "generate")


def shard_model(
    root: TrainModel, mesh: Mesh, run: Run, compute: torch.dtype, *, offload: bool = False
) -> None:
    """Shard a model on meta as its recipe needs.

    After all that changes its modules and before its weights are there. 16-bit weights trained in
    full become fp32 shards, their own masters, of which the forward gathers copies in `compute`.
    The last layer stays gathered, as the backward begins with it. With `offload` the shards stay in
    the host's memory, with their gradients and moments, and a copy of each group comes to the
    device when it is used.

    Of a frozen base only the layers are sharded. Embedding, last norm and head are whole on every
    rank: nothing would hide their gather, and it would spare no memory, as they stay gathered from
    the start of a forward to the end of its backward.
    """
    if not needs_fsdp(run, mesh.shape, offload=offload):
        return
    is_half = compute in HALF
    param_dtype = None
    # What is frozen outside the layers is whole on every rank.
    ignored = {p for _, p in vision_parameters(root.model) if not p.requires_grad}
    if run.adapter.kind == "lora":
        ignored = whole_parameters(root, run)
    else:
        if run.train.master_weights == "fp32":
            widen(root, skip=ignored)
        if is_half:
            param_dtype = compute
    pinned = mesh.sharding.device_type == "cuda"
    options: dict[str, Any] = {
        "mesh": mesh.sharding,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=param_dtype,
            reduce_dtype=torch.float32 if is_half else None,
            cast_forward_inputs=False,  # rotary tables are fp32
        ),
        "ignored_params": ignored or None,
        "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy(),
    }
    let_codes_be_sharded()
    *layers, last = root.layers
    # Inner groups first: the root's group takes the parameters that no other has.
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(last, **options, reshard_after_forward=False)
    if run.adapter.kind == "none":
        shard_embedding_and_head(root, options)
    fully_shard(root, **options, reshard_after_forward=False)
    for module in sharded_modules(root):
        # The loss is divided by the global batch's denominator, so gradients are summed; gloo knows
        # no scaled sum.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for name in PARAMETER_READERS:
        register_fsdp_forward_method(root, name)


def whole_parameters(root: TrainModel, run: Run) -> set[nn.Parameter]:
    """Those of a model with an adapter that every rank holds whole.

    What is trained, and all outside the layers.
    """
    whole = {parameter for parameter in root.parameters() if parameter.requires_grad}
    for module in lora.modules_to_save(root.model, run.adapter):
        whole |= set(module.parameters(recurse=False))
    in_layers = {parameter for layer in root.layers for parameter in layer.parameters()}
    return whole | (set(root.parameters()) - in_layers)


def shard_embedding_and_head(root: TrainModel, options: dict[str, Any]) -> None:
    """Make embedding and head FSDP groups of their own, in a model that is trained in full.

    The head's gather then runs beside the last layers and its reduction beside the backward; in the
    root's group both would hold up the step. A weight that they share stays in the root's group.

    options: the arguments of `fully_shard`.
    """
    embedding = root.model.get_input_embeddings()
    head = root.head
    if embedding.weight is head.weight:
        return
    fully_shard(embedding, **options)
    # Its backward does not read its weight.
    embedding.set_unshard_in_backward(False)
    add_mixin(head, GatheredHead)
    fully_shard(head, **options, reshard_after_forward=False)
    register_fsdp_forward_method(head, "compute")


def sharded_modules(root: nn.Module) -> list[FSDPModule]:
    """The groups of a sharded model; none where it is whole on every rank."""
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def reshard(root: nn.Module) -> None:
    """Drop the whole weights that a forward without a backward has left.

    Those of the head, the last layer and what stands around the layers stay whole until a backward,
    and the model's parameters are these tensors meanwhile: an optimizer that is created then would
    train what no step uses.
    """
    for module in sharded_modules(root):
        module.reshard()


def set_gradient_sync(root: nn.Module, mesh: Mesh, *, last: bool) -> None:
    """Set what FSDP2 reduces in the coming backward; `last`: it is the last one of its step.

    Gradients are reduced to shards in every backward, as whole ones would take the memory that
    sharding saves; over copies of the model only in the last.
    """
    for module in sharded_modules(root):
        module.set_requires_all_reduce(last)
        module.set_requires_gradient_sync(last or mesh.shape.shard > 1)
