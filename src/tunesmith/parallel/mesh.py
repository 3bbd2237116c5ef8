"""The device mesh of a run, with the dimensions replicate x shard x tensor.

The rank number changes fastest along `tensor` and slowest along `replicate`. Ranks that communicate
often are therefore neighbors: a tensor group is on one node, and a shard group is on as few nodes
as possible.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tunesmith.config.schema import Run
from tunesmith.distributed.ranks import COLLECTIVE_TIMEOUT
from tunesmith.errors import RecipeError
from tunesmith.model.arch.spec import ModelSpec
from tunesmith.model.known.model_types import read_model_types
from tunesmith.parallel.mesh_shape import ONE, MeshShape, possible_shapes
from tunesmith.quant.schemes import scheme_of
from tunesmith.units import count_of

DIMENSIONS = ("replicate", "shard", "tensor")
# Counter that gives each mesh of this process a unique number.
MESH_NUMBERS = itertools.count()
# Maximum number of elements that `all_reduce_together` copies into one bucket: 64 MiB in fp32.
BUCKET_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Mesh:
    """The mesh of a run, and the process groups that this rank belongs to.

    The default is one process without process groups.

    Attributes:
        shape: the sizes of the three dimensions.
        device_mesh: torch's mesh [replicate, shard, tensor], or None for one process.
        data_group: the ranks with different micro batches of the same global batch, including this
            rank. None if this rank has the entire global batch.
        tensor_group: the ranks that compute each layer together, including this rank. None if this
            rank computes entire layers.
        data_rank, tensor_rank: the number of this rank in `data_group` and in `tensor_group`.
    """

    shape: MeshShape = ONE
    device_mesh: DeviceMesh | None = None
    data_group: dist.ProcessGroup | None = None
    tensor_group: dist.ProcessGroup | None = None
    data_rank: int = 0
    tensor_rank: int = 0

    @classmethod
    def of(cls, shape: MeshShape, device_type: str) -> "Mesh":
        """Create the mesh of all ranks. This is a collective call.

        Args:
            device_type: `cpu` or `cuda`.
        """
        if shape.world == 1:
            return cls()
        # The rank number changes fastest along the last dimension, `tensor`.
        ranks = torch.arange(shape.world).view(shape.replicate, shape.shard, shape.tensor)
        # Create the groups with tunesmith's timeout. init_device_mesh would use torch's default of
        # 30 minutes, and a slow save of a checkpoint may take longer.
        groups = [
            # Each list has the ranks whose mesh coordinates differ only in this dimension.
            _make_own_group(ranks.movedim(dimension, -1).flatten(0, -2).tolist())
            for dimension in range(len(DIMENSIONS))
        ]
        # Use unique names, because torch treats meshes with the same ranks and names as equal.
        # DTensor's cache could return an earlier mesh, whose process groups no longer exist or now
        # belong to other ranks.
        number = next(MESH_NUMBERS)
        names = tuple(f"{name}-{number}" for name in DIMENSIONS)
        device_mesh = DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=names)
        data_group = None
        if shape.data > 1:
            # Each list has the ranks with the same tensor rank. These ranks hold the same part of
            # each layer and compute different micro batches.
            data_group = _make_own_group(ranks.flatten(0, 1).T.tolist())
        data_rank, tensor_rank = divmod(dist.get_rank(), shape.tensor)
        return cls(
            shape,
            device_mesh,
            data_group,
            tensor_group=groups[2] if shape.tensor > 1 else None,
            data_rank=data_rank,
            tensor_rank=tensor_rank,
        )

    @property
    def sharding(self) -> DeviceMesh:
        """The mesh [replicate, shard] for FSDP's `fully_shard`."""
        return self._dimensions(slice(2))

    @property
    def tensor(self) -> DeviceMesh:
        """The mesh [tensor], over which `apply_tensor_parallel` shards parameters."""
        return self._dimensions(slice(2, 3))

    def _dimensions(self, part: slice) -> DeviceMesh:
        assert self.device_mesh is not None
        return self.device_mesh[(self.device_mesh.mesh_dim_names or ())[part]]


def _make_own_group(rank_lists: list[list[int]]) -> dist.ProcessGroup:
    """Create one process group per list and return this rank's group. This is a collective call.

    Args:
        rank_lists: lists of ranks. Each rank is in exactly one of them.
    """
    world = dist.group.WORLD
    if world and len(rank_lists) == 1:
        return world
    group, _ = dist.new_subgroups_by_enumeration(rank_lists, timeout=COLLECTIVE_TIMEOUT)
    return group


ALONE = Mesh()


@torch.no_grad()
def all_reduce_together(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum each tensor over the ranks of a group, in place, in fp32 or wider.

    This is a collective call. All ranks must pass tensors of the same shapes in the same order. If
    `group` is None, nothing is done.
    """
    if group is None:
        return
    for bucket in _buckets(tensors):
        # Reduce many tensors in one collective, because each collective adds its latency.
        wide = torch.promote_types(bucket[0].dtype, torch.float32)
        flat = torch.cat([tensor.flatten().to(wide) for tensor in bucket])
        dist.all_reduce(flat, group=group)
        parts = flat.split([tensor.numel() for tensor in bucket])
        for tensor, total in zip(bucket, parts, strict=True):
            tensor.copy_(total.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield lists of tensors with at most BUCKET_ELEMENTS elements. Large tensors are split."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        # Each piece must be a view. A tensor that is not contiguous is not split.
        pieces = tensor.view(-1).split(BUCKET_ELEMENTS) if tensor.is_contiguous() else (tensor,)
        for piece in pieces:
            if bucket and size + piece.numel() > BUCKET_ELEMENTS:
                yield bucket
                bucket = []
                size = 0
            bucket.append(piece)
            size += piece.numel()
    if bucket:
        yield bucket


def meshes_for(run: Run, spec: ModelSpec, world: int, per_node: int) -> list[MeshShape]:
    """Return the shapes of `possible_shapes` that this run can use on nodes with `per_node` ranks.

    If it can use none of them, raise the RecipeError that explains why the first shape is not
    possible.
    """
    shapes = []
    errors = []
    for shape in possible_shapes(run.parallel, world):
        try:
            check_mesh(run, spec, shape, per_node)
            shapes.append(shape)
        except RecipeError as error:
            errors.append(error)
    if not shapes:
        raise errors[0]
    return shapes


def check_mesh(run: Run, spec: ModelSpec, shape: MeshShape, per_node: int) -> None:
    """Raise RecipeError if the run is not possible on a mesh of this shape. No model is loaded for
    this check.
    """
    tensor = shape.tensor
    # What does not support tensor parallelism -> the key and the value that the fix sets.
    unsupported = {
        "a base model that is already in nf4": (spec.quantized == "bnb-nf4", "parallel.tensor=1"),
        "a model with a vision encoder": (run.model.vision, "parallel.tensor=1"),
        "a method that samples answers": (run.samples_answers, "parallel.tensor=1"),
        "a base model in its original quantization": (
            not scheme_of(run.model, spec.quantized).is_cut,
            "model.quantize=none",
        ),
        "an optimizer that updates in the backward pass": (
            run.train.optimizer_in_backward,
            "train.optimizer_in_backward=false",
        ),
    }
    for what, (is_used, fix) in unsupported.items():
        if tensor > 1 and is_used:
            raise RecipeError(
                f"{what} does not support tensor parallelism",
                where=fix.partition("=")[0],
                why=f"this run needs tensor parallelism, because the mesh is {shape.describe()}",
                fix=f"set {fix}",
            )
    if run.train.optimizer == "adamw-8bit" and _has_ragged_moments(run, spec, shape):
        raise RecipeError(
            "8-bit moments of this model cannot be divided among the ranks",
            where="train.optimizer",
            why=f"each block of 256 moments must be on one rank; the mesh is {shape.describe()}",
            fix="set train.optimizer=adamw",
        )
    if tensor == 1:
        return
    _check_cut(spec, shape)
    if per_node % tensor:
        raise RecipeError(
            f"{count_of(per_node, 'rank')} on each node cannot be divided into groups of {tensor}",
            where="parallel.tensor",
            why="the ranks that share a layer must be on one node, because they exchange data in "
            "every layer",
            fix="set parallel.tensor=auto",
        )
    # Count the widths in blocks, because all weights of a block share a scale and must be on the
    # same rank. A width of 2.5 blocks cannot be divided: 2.5 % tensor is not 0.
    block = scheme_of(run.model).block
    for layer in dict.fromkeys(spec.layers):
        widths = [layer.heads, layer.kv_heads, layer.heads * layer.value_dim / block]
        if not layer.experts:
            # Check the MLP only in layers without experts, because experts are not sharded.
            # `apply_tensor_parallel` checks shared experts.
            widths.append(layer.intermediate / block)
        if any(width % tensor for width in widths):
            raise RecipeError(
                f"{layer.heads} attention heads, {layer.kv_heads} key-value heads and an MLP of "
                f"{layer.intermediate:,} columns cannot be divided among {tensor} ranks",
                where="parallel.tensor",
                why="tensor parallelism gives each rank an equal number of heads and columns",
                fix="set parallel.tensor=auto",
            )


def _check_cut(spec: ModelSpec, shape: MeshShape) -> None:
    """Raise RecipeError if tensor parallelism is not verified for this model type.

    A model type counts as verified if a small model of this type gave the same results with and
    without tensor parallelism.
    """
    model_type = read_model_types().get(spec.model_type)
    is_verified = model_type is not None and model_type.tensor is not None
    if is_verified and all(layer.mixing == "attention" for layer in spec.layers):
        return
    why = f"the mesh is {shape.describe()}; `tunesmith models TYPE` shows what a type supports"
    if model_type is not None and model_type.uncut:
        why = model_type.uncut
    raise RecipeError(
        f"a layer of {spec.model_type} cannot be divided among {shape.tensor} ranks",
        where="parallel.tensor",
        why=why,
        fix=f"set parallel.tensor=1 parallel.shard={shape.shard * shape.tensor}, which every model "
        "type supports",
    )


def _has_ragged_moments(run: Run, spec: ModelSpec, shape: MeshShape) -> bool:
    """Return whether tensor parallelism would split rows into parts whose length is not a multiple
    of 256.

    8-bit moments are quantized in blocks of 256, which must not be split over ranks. This function
    only checks the sizes that most parameters have. `check_blocks` later checks each parameter.
    """
    tensor = shape.tensor
    # The rows of an adapter's B have only `r` columns, which rarely hold entire blocks of 256.
    if run.adapter.kind == "lora":
        return tensor > 1
    if shape.shard * tensor == 1:
        return False
    rows = [float(spec.hidden)]
    for layer in spec.layers:
        rows.append(layer.intermediate / tensor)
        rows.append(layer.heads * layer.head_dim / tensor)
    return any(row % 256 for row in rows)
