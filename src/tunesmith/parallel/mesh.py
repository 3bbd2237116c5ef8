"""How the ranks of a run share its work: replicate x shard x tensor.

Ranks are numbered with `tensor` fastest and `replicate` slowest, so that the ranks that talk most are neighbours: those
of a tensor group on one node, and those of a shard group as near as they can be.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tunesmith.config.schema import Parallel
from tunesmith.errors import MachineError, RecipeError
from tunesmith.runtime.plan import ONE, MeshShape

T = TypeVar("T")
DIMENSIONS = ("replicate", "shard", "tensor")


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run by dimension, as this rank sees them. The default is one process, without a process group."""

    shape: MeshShape = ONE
    device_mesh: DeviceMesh | None = None  # [replicate, shard, tensor]; None for one process

    @classmethod
    def of(cls, shape: MeshShape, device_type: str) -> Mesh:
        """The mesh of all ranks; a collective call. `device_type` is `cpu` or `cuda`."""
        if shape.world == 1:
            return cls()
        mesh = cls(shape, init_device_mesh(device_type, tuple(shape), mesh_dim_names=DIMENSIONS))
        _ = mesh.data_group  # made by all ranks together
        return mesh

    @property
    def data_rank(self) -> int:
        return dist.get_rank() // self.shape.tensor if self.device_mesh is not None else 0

    @property
    def tensor_rank(self) -> int:
        return dist.get_rank() % self.shape.tensor if self.device_mesh is not None else 0

    @property
    def sharding(self) -> DeviceMesh:
        """[replicate, shard]: what `fully_shard` takes."""
        assert self.device_mesh is not None
        return self.device_mesh["replicate", "shard"]

    @property
    def tensor(self) -> DeviceMesh:
        """[tensor]."""
        assert self.device_mesh is not None
        return self.device_mesh["tensor"]

    @cached_property
    def data_group(self) -> dist.ProcessGroup | None:
        """The ranks whose micro batches make the global batch, with this one; None where it is alone. The first call is
        collective."""
        if self.shape.data == 1:
            return None
        if self.shape.tensor == 1:
            return dist.group.WORLD
        every = [[d * self.shape.tensor + t for d in range(self.shape.data)] for t in range(self.shape.tensor)]
        return dist.new_subgroups_by_enumeration(every)[0]

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The ranks that shard this rank's copy; None where it is whole."""
        return self.device_mesh.get_group("shard") if self.device_mesh is not None and self.shape.shard > 1 else None

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """The ranks that compute each layer together with this one; None where it computes them alone."""
        return self.device_mesh.get_group("tensor") if self.device_mesh is not None and self.shape.tensor > 1 else None


ALONE = Mesh()


def possible_shapes(parallel: Parallel, world: int) -> list[MeshShape]:
    """The meshes of `world` ranks that a recipe allows, those with the fewest shards first; RecipeError if there is none."""
    tensor = parallel.tensor
    data = world // tensor if world % tensor == 0 else 0
    shards = [n for n in range(1, data + 1) if data % n == 0 and parallel.shard in ("auto", n)]
    shapes = [MeshShape(data // n, n, tensor) for n in shards if parallel.replicate in ("auto", data // n)]
    if not shapes:
        sizes = " x ".join(f"{name} {size}" for name, size in vars(parallel).items())
        what = f"the recipe's parallel does not fit {world} rank{'s' if world > 1 else ''}: {sizes}"
        fix = (
            "parallel.replicate=auto parallel.shard=auto parallel.tensor=1, or start as many ranks as they multiply to"
        )
        raise RecipeError(what, where="parallel", fix=fix)
    return shapes


def share_work(parallel: Parallel, world: int, plan_of: Callable[[MeshShape], T]) -> tuple[MeshShape, T]:
    """The mesh of a run and its plan: what the recipe sets, else as few shards as fit, in as many copies as there are.

    `plan_of` plans for a mesh, or raises MachineError where the run does not fit, which is raised again if it fits none.
    """
    *shapes, last = possible_shapes(parallel, world)
    for shape in shapes:
        with suppress(MachineError):
            return shape, plan_of(shape)
    return last, plan_of(last)
