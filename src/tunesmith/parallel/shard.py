"""Data parallelism with FSDP2. The ranks hold shards of one copy of the model (FSDP) or of several
copies (HSDP).

A sharded model uses PyTorch's `fully_shard` (FSDP: Zhao et al. 2023, arXiv:2304.11277). If each
rank has a full copy of the model, `fully_shard` is not used: each rank computes like a single
process, and `copies.py` sums the gradients. The parameters of an adapter are small, so every rank
holds them completely, and all their gradients are summed at the end of a step. FSDP shards only the
frozen base, and therefore allocates no memory for gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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
from tunesmith.model.arch.load import widen
from tunesmith.model.known.decoder import vision_parameters
from tunesmith.model.layers.fused import add_mixin
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.mesh_shape import needs_fsdp
from tunesmith.train_model import TrainModel

HALF = (torch.bfloat16, torch.float16)
# Methods of the root module, other than `forward`, that read parameters. FSDP must gather the
# parameters for these methods too.
PARAMETER_READERS = ("token_scores", "generate")


def shard_model(
    root: TrainModel, mesh: Mesh, run: Run, compute: torch.dtype, *, offload: bool = False
) -> None:
    """Shard a model on the meta device with FSDP2, if the run needs it.

    Call this after all modules are replaced and before the weights are loaded. Trained 16-bit
    weights are stored as fp32 shards, which need no separate master weights. The forward gathers
    the weights in the dtype `compute`. The last layer stays gathered after the forward, because the
    backward starts with it.

    If the base is frozen, only its layers are sharded. Every rank holds embedding, last norm and
    head completely, because gathering them would not overlap with computation. Sharding them would
    not reduce the peak memory either, because they would stay gathered from the start of the
    forward to the end of the backward.

    Args:
        compute: the dtype in which the forward computes.
        offload: whether shards, gradients and optimizer state are kept in host memory. Each FSDP
            group is then copied to the device when it is used.
    """
    if not needs_fsdp(run, mesh.shape, offload=offload):
        return
    is_half = compute in HALF
    param_dtype = None
    # Every rank holds the frozen parameters of the vision part completely.
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
            cast_forward_inputs=False,  # rotary tables must stay in fp32
        ),
        "ignored_params": ignored or None,
        "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy(),
    }
    let_codes_be_sharded()
    *layers, last = root.layers
    # Shard the layers before the root, because the root's group takes all parameters that are in no
    # other group.
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(last, **options, reshard_after_forward=False)
    if run.adapter.kind == "none":
        shard_embedding_and_head(root, options)
    else:
        # In its backward, a layer gathers the layer whose forward ended before its own forward. For
        # the first layer, this would be the last layer of an earlier forward without a backward,
        # such as a forward that samples answers. A rank that has sampled no answers would not take
        # part in the gather, and the run would hang.
        first = root.layers[0]
        assert isinstance(first, FSDPModule)
        first.set_modules_to_backward_prefetch([first])
    fully_shard(root, **options, reshard_after_forward=False)
    for module in sharded_modules(root):
        # Sum gradients instead of averaging them, because the loss is already divided by the
        # denominator of the global batch. Gloo does not support a scaled sum.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for name in PARAMETER_READERS:
        register_fsdp_forward_method(root, name)


def whole_parameters(root: TrainModel, run: Run) -> set[nn.Parameter]:
    """Return the parameters that every rank holds completely in a model with an adapter.

    These are the trained parameters, and all parameters outside the layers.
    """
    whole = {parameter for parameter in root.parameters() if parameter.requires_grad}
    for module in lora.modules_to_save(root.model, run.adapter):
        whole |= set(module.parameters(recurse=False))
    in_layers = {parameter for layer in root.layers for parameter in layer.parameters()}
    return whole | (set(root.parameters()) - in_layers)


def shard_embedding_and_head(root: TrainModel, options: dict[str, Any]) -> None:
    """Make embedding and head separate FSDP groups, in a model whose weights are all trained.

    The gather of the head then overlaps with the last layers, and its reduction overlaps with the
    backward. If embedding and head were in the root's group, both operations would delay the step.
    If embedding and head share a weight, it stays in the root's group.

    Args:
        options: the arguments of `fully_shard`.
    """
    embedding = root.model.get_input_embeddings()
    head = root.head
    if embedding.weight is head.weight:
        return
    fully_shard(embedding, **options)
    # Do not gather the embedding for the backward, which does not read the weight.
    embedding.set_unshard_in_backward(False)
    add_mixin(head, GatheredHead)
    fully_shard(head, **options, reshard_after_forward=False)
    register_fsdp_forward_method(head, "compute")


def sharded_modules(root: nn.Module) -> list[FSDPModule]:
    """Return the FSDP groups of a model. The list is empty if FSDP is not used."""
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def reshard(root: nn.Module) -> None:
    """Free the gathered weights after a forward that is not followed by a backward.

    The weights of the head, the last layer and the root's group stay gathered until a backward.
    Until then the model's parameters are the gathered tensors. If an optimizer were created at this
    time, it would train tensors that no step uses.
    """
    for module in sharded_modules(root):
        module.reshard()


@contextmanager
def unsharded(root: TrainModel) -> Iterator[None]:
    """Keep the gathered weights of all FSDP groups inside the block, so that a rank can run any
    number of forwards without the other ranks. Without FSDP, do nothing.
    """
    modules = sharded_modules(root)
    for module in modules:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        # These groups keep their weights until the backward, see `shard`.
        kept = set(map(id, (root, root.head, root.layers[-1])))
        for module in modules:
            if id(module) not in kept:
                module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def set_gradient_sync(root: nn.Module, mesh: Mesh, *, last: bool) -> None:
    """Set which gradients FSDP2 reduces in the next backward.

    Every backward of a step reduces the gradients to shards, because unsharded gradients would take
    the memory that sharding saves. Only the last backward of a step also sums the shards over the
    copies of the model.

    Args:
        last: whether the next backward is the last one of its step.
    """
    for module in sharded_modules(root):
        module.set_requires_all_reduce(last)
        module.set_requires_gradient_sync(last or mesh.shape.shard > 1)
