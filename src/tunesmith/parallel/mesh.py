"""How the ranks of a run share its work: replicate x shard x tensor.

Ranks are numbered with `tensor` fastest and `replicate` slowest, so that the ranks that talk most are neighbours: those
of a tensor group on one node, and those of a shard group as near as they can be.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tunesmith.config.schema import Parallel, Run
from tunesmith.distributed.ranks import PATIENCE
from tunesmith.errors import RecipeError
from tunesmith.model.architectures import ARCHITECTURES, Architecture
from tunesmith.model.spec import ModelSpec
from tunesmith.parallel.mesh_shape import ONE, MeshShape
from tunesmith.quant.schemes import scheme_of

DIMENSIONS = ("replicate", "shard", "tensor")
MADE = itertools.count()  # meshes of this process


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run by dimension, as this rank sees them. The default is one process, without a process group.

    Attributes:
        device_mesh: [replicate, shard, tensor]; None for one process.
        data_group: the ranks whose micro batches make the global batch, with this one; None where it is alone.
        tensor_group: those that compute each layer together with this one; None where it computes them alone.
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
        ranks = torch.arange(shape.world).view(*shape)
        # init_device_mesh would give the groups torch's own time limit, half an hour: a slow save may take longer.
        groups = [
            _group_of(ranks.movedim(dim, -1).flatten(0, -2).tolist())
            for dim in range(len(DIMENSIONS))
        ]
        # To torch, meshes of the same ranks and names are equal, whatever their groups are. DTensor's cache would hand out an
        # earlier one, whose groups are gone with its training or, worse, have given their names to other ranks.
        number = next(MADE)
        names = tuple(f"{name}-{number}" for name in DIMENSIONS)
        mesh = DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=names)
        data = _group_of(ranks.flatten(0, 1).T.tolist()) if shape.data > 1 else None
        tensor = groups[2] if shape.tensor > 1 else None
        return cls(shape, mesh, data, tensor, *divmod(dist.get_rank(), shape.tensor))

    @property
    def sharding(self) -> DeviceMesh:
        """[replicate, shard]: what `fully_shard` takes."""
        return self._dimensions(0, 2)

    @property
    def tensor(self) -> DeviceMesh:
        """[tensor]: what `cut_model` cuts parameters over."""
        return self._dimensions(2, 3)

    def _dimensions(self, start: int, stop: int) -> DeviceMesh:
        assert self.device_mesh is not None
        return self.device_mesh[(self.device_mesh.mesh_dim_names or ())[start:stop]]


def _group_of(every: list[list[int]]) -> dist.ProcessGroup:
    """This rank's of groups that have all ranks between them; a collective call."""
    world = dist.group.WORLD
    return (
        world
        if world and len(every) == 1
        else dist.new_subgroups_by_enumeration(every, timeout=PATIENCE)[0]
    )


ALONE = Mesh()


@torch.no_grad()
def all_reduce_together(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum each tensor over a group, in place and in one piece, in fp32 or wider; nothing where the group is None. A
    collective call with the same shapes, in the same order, on all its ranks."""
    if group is None or not tensors:
        return
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    flat = torch.cat([tensor.flatten().to(wide) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, total in zip(
        tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True
    ):
        tensor.copy_(total.view_as(tensor))


def possible_shapes(parallel: Parallel, world: int) -> list[MeshShape]:
    """The meshes of `world` ranks that a recipe allows, those with the fewest cuts first, of them those with the fewest
    shards; RecipeError if there is none."""
    shapes = [
        MeshShape(world // (shard * tensor), shard, tensor)
        for tensor in (range(1, world + 1) if parallel.tensor == "auto" else [parallel.tensor])
        for shard in range(1, world // tensor + 1)
        if world % (shard * tensor) == 0
    ]
    shapes = [
        s
        for s in shapes
        if parallel.shard in ("auto", s.shard) and parallel.replicate in ("auto", s.replicate)
    ]
    if not shapes:
        sizes = " x ".join(f"{name} {size}" for name, size in vars(parallel).items())
        what = f"the recipe's parallel does not fit {world} rank{'s' if world > 1 else ''}: {sizes}"
        fix = "parallel.replicate=auto parallel.shard=auto parallel.tensor=1, or as many ranks as they multiply to"
        raise RecipeError(what, where="parallel", fix=fix)
    return shapes


def meshes_for(run: Run, spec: ModelSpec, world: int, per_node: int) -> list[MeshShape]:
    """Those of `possible_shapes` that compute this run on nodes of `per_node` ranks; RecipeError if there is none."""
    found, refused = [], []
    for shape in possible_shapes(run.parallel, world):
        try:
            check_mesh(run, spec, shape, per_node)
            found.append(shape)
        except RecipeError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    return found


def check_mesh(run: Run, spec: ModelSpec, shape: MeshShape, per_node: int) -> None:
    """Refuse, by a RecipeError, what a mesh does not compute, before anything is loaded."""
    train, cut, key = run.train, shape.tensor, "parallel.tensor"
    known = ARCHITECTURES.get(spec.model_type, Architecture("")).fused
    block = scheme_of(run.model).block  # weights that share a scale stay together
    widths = (
        spec.heads,
        spec.kv_heads,
        spec.intermediate / block,
        spec.heads * spec.head_dim / block,
    )
    # Rows of 8-bit moments must be whole blocks of 256, which B of an adapter has not; `check_blocks` looks at each.
    rows = (spec.hidden, spec.intermediate / cut, spec.heads * spec.head_dim / cut)
    ragged = (
        cut > 1
        if run.adapter.kind == "lora"
        else shape.shard * cut > 1 and any(n % 256 for n in rows)
    )
    for what, where, wrong, fix in (
        ("a ready-made nf4 base", key, bool(spec.quantized) and cut > 1, "1"),
        ("8-bit moments", "train.optimizer", train.optimizer == "adamw-8bit" and ragged, "adamw"),
        ("updates in the backward", "train.optimizer_in_backward", train.optimizer_in_backward and cut > 1, "false"),
        (f"the layers of this {spec.model_type}", key, cut > 1 and not known, "1"),
        (f"a layer over the nodes, which have {per_node} ranks each,", key, per_node % cut > 0, "auto"),
        (f"{spec.heads} heads, {spec.kv_heads} of keys and values, and an MLP of {spec.intermediate:,} columns", key,
         cut > 1 and any(width % cut for width in widths), "auto"),
    ):  # fmt: skip
        if wrong:
            why = f"the ranks make {shape.describe()}, and each would hold a part of what goes together"
            raise RecipeError(
                f"{what} cannot be cut over ranks", where=where, why=why, fix=f"{where}={fix}"
            )
