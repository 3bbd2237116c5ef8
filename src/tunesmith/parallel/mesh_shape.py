"""The sizes of a run's device mesh. This module does not import torch."""

from typing import NamedTuple

from tunesmith.config.schema import Parallel, Run
from tunesmith.errors import RecipeError
from tunesmith.units import count_of


class MeshShape(NamedTuple):
    """The sizes of a mesh.

    Attributes:
        replicate: number of copies of the model.
        shard: number of ranks over which FSDP shards one copy of the model.
        tensor: number of ranks that compute each layer together (tensor parallelism).
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def world(self) -> int:
        return self.replicate * self.shard * self.tensor

    @property
    def data(self) -> int:
        """Number of ranks with different micro batches.

        The ranks of a tensor group share their micro batches and count as one.
        """
        return self.replicate * self.shard

    def describe(self) -> str:
        """Return the sizes as text, such as `replicate 2 x shard 4 x tensor 1`."""
        return f"replicate {self.replicate} x shard {self.shard} x tensor {self.tensor}"


ONE = MeshShape()


def possible_shapes(parallel: Parallel, world: int) -> list[MeshShape]:
    """Return the mesh shapes of `world` ranks that a recipe allows.

    The list is sorted by the number of tensor ranks, then by the number of shards. Raise
    RecipeError if no shape is possible.
    """
    shapes = []
    for tensor in range(1, world + 1) if parallel.tensor == "auto" else [parallel.tensor]:
        for shard in range(1, world // tensor + 1):
            replicate, rest = divmod(world, shard * tensor)
            is_allowed = parallel.shard in ("auto", shard)
            is_allowed &= parallel.replicate in ("auto", replicate)
            if is_allowed and not rest:
                shapes.append(MeshShape(replicate, shard, tensor))
    if not shapes:
        sizes = " x ".join(f"{name} {size}" for name, size in vars(parallel).items())
        ranks = count_of(world, "rank")
        raise RecipeError(
            f"the recipe's `parallel` does not fit {ranks}: {sizes}",
            where="parallel",
            fix="set parallel.replicate=auto parallel.shard=auto parallel.tensor=1, or use as many "
            "ranks as the product of the three sizes",
        )
    return shapes


def needs_fsdp(run: Run, mesh: MeshShape, *, offload: bool) -> bool:
    """Return whether the run needs FSDP2's `fully_shard`.

    It is needed if the model is sharded or if weights are offloaded. With several full copies, it
    is only needed if the optimizer updates the weights in the backward, because FSDP2 sums a
    gradient over the copies before it calls the hook that updates the weight.
    """
    if mesh.world == 1:
        return False
    summed_for_update = run.train.optimizer_in_backward and mesh.replicate > 1
    return mesh.shard > 1 or offload or summed_for_update
