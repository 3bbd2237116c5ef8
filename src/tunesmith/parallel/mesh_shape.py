"""The number of ranks that share a run, by what they share. Importable without torch."""

from typing import NamedTuple

from tunesmith.config.schema import Run


class MeshShape(NamedTuple):
    """Copies of the model, ranks that shard one copy, and ranks that compute one layer together."""

    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def world(self) -> int:
        return self.replicate * self.shard * self.tensor

    @property
    def data(self) -> int:
        """Ranks with micro batches of their own; those of a tensor group have the same ones."""
        return self.replicate * self.shard

    def describe(self) -> str:
        """`replicate 2 x shard 4 x tensor 1`."""
        return f"replicate {self.replicate} x shard {self.shard} x tensor {self.tensor}"


ONE = MeshShape()


def needs_fsdp(run: Run, mesh: MeshShape, *, offload: bool) -> bool:
    """Tell whether a model needs FSDP2's `fully_shard`: shards do, and what is offloaded.

    So do copies that are updated within the backward: FSDP2 sums a gradient over them before it
    calls the hook that updates the weight. Other copies are whole, and compute as one process does.
    """
    if mesh.world == 1:
        return False
    summed_for_update = run.train.optimizer_in_backward and mesh.replicate > 1
    return mesh.shard > 1 or offload or summed_for_update
