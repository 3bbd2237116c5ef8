"""The mesh by which the ranks of a run share its work: replicate x shard x tensor.

Ranks are numbered with `tensor` fastest and `replicate` slowest, so that the ranks that talk most
are neighbors: those of a tensor group on one node, and those of a shard group as near as they can
be.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tunesmith.config.schema import Parallel, Run
from tunesmith.distributed.ranks import COLLECTIVE_TIMEOUT
from tunesmith.errors import RecipeError
from tunesmith.model.model_types import read_model_types
from tunesmith.model.spec import ModelSpec
from tunesmith.parallel.mesh_shape import ONE, MeshShape
from tunesmith.quant.schemes import scheme_of
from tunesmith.units import count_of

DIMENSIONS = ("replicate", "shard", "tensor")
MESH_NUMBERS = itertools.count()  # of the meshes of this process
# Elements that `all_reduce_together` copies at a time: 64 MiB in fp32.
BUCKET_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run by dimension, as this rank sees them.

    The default is one process, without a process group.

    Attributes:
        device_mesh: [replicate, shard, tensor]; None for one process.
        data_group: the ranks whose micro batches make the global batch, with this one; None where
            it is alone.
        tensor_group: those that compute each layer together with this one; None where it computes
            them alone.
        data_rank, tensor_rank: this one's number in them.
    """

    shape: MeshShape = ONE
    device_mesh: DeviceMesh | None = None
    data_group: dist.ProcessGroup | None = None
    tensor_group: dist.ProcessGroup | None = None
    data_rank: int = 0
    tensor_rank: int = 0

    @classmethod
    def of(cls, shape: MeshShape, device_type: str) -> "Mesh":
        """The mesh of all ranks; a collective call. `device_type` is `cpu` or `cuda`."""
        if shape.world == 1:
            return cls()
        # The last one fastest.
        ranks = torch.arange(shape.world).view(shape.replicate, shape.shard, shape.tensor)
        # init_device_mesh would give the groups torch's own time limit, half an hour: a slow save
        # may take longer.
        groups = []
        for dimension in range(len(DIMENSIONS)):
            # Lists of the ranks that differ in this dimension alone.
            groups.append(_group_of(ranks.movedim(dimension, -1).flatten(0, -2).tolist()))
        # To torch, meshes of the same ranks and names are equal, whatever their groups are.
        # DTensor's cache would hand out an earlier one, whose groups are gone with its training or,
        # worse, other ranks may have their names.
        number = next(MESH_NUMBERS)
        names = tuple(f"{name}-{number}" for name in DIMENSIONS)
        device_mesh = DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=names)
        data_group = None
        if shape.data > 1:
            # One list a tensor number: ranks with other micro batches and the same part of each
            # layer.
            data_group = _group_of(ranks.flatten(0, 1).T.tolist())
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
        """[replicate, shard]: what `fully_shard` takes."""
        return self._dimensions(0, 2)

    @property
    def tensor(self) -> DeviceMesh:
        """[tensor]: what `apply_tensor_parallel` shards parameters over."""
        return self._dimensions(2, 3)

    def _dimensions(self, start: int, stop: int) -> DeviceMesh:
        assert self.device_mesh is not None
        names = self.device_mesh.mesh_dim_names or ()
        return self.device_mesh[names[start:stop]]


def _group_of(rank_lists: list[list[int]]) -> dist.ProcessGroup:
    """This rank's of groups that have all ranks between them; a collective call."""
    world = dist.group.WORLD
    if world and len(rank_lists) == 1:
        return world
    group, _ = dist.new_subgroups_by_enumeration(rank_lists, timeout=COLLECTIVE_TIMEOUT)
    return group


ALONE = Mesh()


@torch.no_grad()
def all_reduce_together(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum each tensor over a group, in place, in fp32 or wider.

    A collective call with the same shapes, in the same order, on all ranks of the group; nothing
    where that is None.
    """
    if group is None:
        return
    for bucket in _buckets(tensors):
        # One collective for many: each alone would wait for its own latency.
        wide = torch.promote_types(bucket[0].dtype, torch.float32)
        flat = torch.cat([tensor.flatten().to(wide) for tensor in bucket])
        dist.all_reduce(flat, group=group)
        totals = flat.split([tensor.numel() for tensor in bucket])
        for tensor, total in zip(bucket, totals, strict=True):
            tensor.copy_(total.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of at most BUCKET_ELEMENTS elements, a large one in pieces."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        # A piece must be a view; what has no single run of memory stays whole.
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


def possible_shapes(parallel: Parallel, world: int) -> list[MeshShape]:
    """The meshes of `world` ranks that a recipe allows; RecipeError if there is none.

    Those with the fewest tensor ranks first, of them those with the fewest shards.
    """
    shapes = []
    # In this order: fewer tensor ranks come first, then fewer shards.
    for tensor in range(1, world + 1) if parallel.tensor == "auto" else [parallel.tensor]:
        for shard in range(1, world // tensor + 1):
            replicate, rest = divmod(world, shard * tensor)
            has_shard = parallel.shard in ("auto", shard)
            has_replicate = parallel.replicate in ("auto", replicate)
            if has_shard and has_replicate and not rest:
                shapes.append(MeshShape(replicate, shard, tensor))
    if not shapes:
        sizes = " x ".join(f"{name} {size}" for name, size in vars(parallel).items())
        ranks = count_of(world, "rank")
        raise RecipeError(
            f"the recipe's parallel does not fit {ranks}: {sizes}",
            where="parallel",
            fix="parallel.replicate=auto parallel.shard=auto parallel.tensor=1, or as many ranks "
            "as they multiply to",
        )
    return shapes


def meshes_for(run: Run, spec: ModelSpec, world: int, per_node: int) -> list[MeshShape]:
    """Those of `possible_shapes` that compute this run on nodes of `per_node` ranks.

    RecipeError if there is none: that of the first shape.
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
    """RecipeError for what a mesh does not compute, before anything is loaded."""
    tensor = shape.tensor
    if tensor > 1 and spec.quantized == "bnb-nf4":
        raise _cannot_shard("a ready-made nf4 base", shape)
    if tensor > 1 and run.model.vision:
        raise _cannot_shard("a model with its vision part", shape)
    if tensor > 1 and not scheme_of(run.model, spec.quantized).is_cut:
        raise _cannot_shard("a base as it ships", shape, where="model.quantize", fix="none")
    if run.train.optimizer == "adamw-8bit" and _has_ragged_moments(run, spec, shape):
        raise _cannot_shard("8-bit moments", shape, where="train.optimizer", fix="adamw")
    if tensor == 1:
        return
    if run.train.optimizer_in_backward:
        key = "train.optimizer_in_backward"
        raise _cannot_shard("updates in the backward", shape, where=key, fix="false")
    _check_cut(spec, shape)
    if per_node % tensor:
        raise RecipeError(
            f"{tensor} ranks that share a layer are not all on one node, which has {per_node}",
            where="parallel.tensor",
            why="the link between nodes is too slow for what they send in every layer",
            fix="parallel.tensor=auto",
        )
    # Weights that share a scale stay together.
    block = scheme_of(run.model).block
    for layer in dict.fromkeys(spec.layers):
        attention_blocks = layer.heads * layer.value_dim / block
        widths = [layer.heads, layer.kv_heads, attention_blocks]
        if not layer.experts:
            # Experts are not cut; `apply_tensor_parallel` looks at the MLPs beside them.
            widths.append(layer.intermediate / block)
        if any(width % tensor for width in widths):
            heads = f"{layer.heads} heads, {layer.kv_heads} of keys and values"
            what = f"{heads}, and an MLP of {layer.intermediate:,} columns"
            raise _cannot_shard(what, shape, fix="auto")


def _check_cut(spec: ModelSpec, shape: MeshShape) -> None:
    """RecipeError unless a small model of this type was cut over ranks, and gave equal numbers."""
    model_type = read_model_types().get(spec.model_type)
    is_cut = model_type is not None and model_type.tensor is not None
    if is_cut and all(layer.mixing == "attention" for layer in spec.layers):
        return
    ranks = shape.shard * shape.tensor
    fix = f"parallel.tensor=1 parallel.shard={ranks}: copies and shards work for every type"
    why = f"the ranks make {shape.describe()}; `tunesmith models TYPE` says whether one is cut"
    if model_type is not None and model_type.uncut:
        why = model_type.uncut
    raise RecipeError(
        f"a layer of {spec.model_type} cannot be cut over {shape.tensor} ranks",
        where="parallel.tensor",
        why=why,
        fix=fix,
    )


def _has_ragged_moments(run: Run, spec: ModelSpec, shape: MeshShape) -> bool:
    """Tell whether a rank's rows of 8-bit moments are no whole blocks of 256.

    B of an adapter has no such rows; `check_blocks` looks at each parameter.
    """
    tensor = shape.tensor
    if run.adapter.kind == "lora":
        return tensor > 1
    if shape.shard * tensor == 1:
        return False
    rows = [float(spec.hidden)]
    for layer in spec.layers:
        rows.append(layer.intermediate / tensor)
        rows.append(layer.heads * layer.head_dim / tensor)
    return any(row % 256 for row in rows)


def _cannot_shard(
    what: str, shape: MeshShape, *, where: str = "parallel.tensor", fix: str = "1"
) -> RecipeError:
    return RecipeError(
        f"{what} cannot be cut over ranks",
        where=where,
        why=f"the ranks make {shape.describe()}, but these parts cannot be divided",
        fix=f"{where}={fix}",
    )
