"""The machines that a run is planned for: `2x8xh100`, `2x-dgx-spark`, `here`.

Importable without torch. host/chips.json has the figures, each with its source.
"""

import re
from dataclasses import dataclass, replace

from tunesmith.config.names import nearest
from tunesmith.errors import UsageError
from tunesmith.host.chips import CHIPS, Chip, list_gpus
from tunesmith.host.cores import multiplies_bf16
from tunesmith.host.memory import available_memory, read_memory, unified_budget

# What nvidia-smi writes for the memory of a GPU that shares the host's, as GB10 does.
NO_MEMORY_OF_ITS_OWN = ("[N/A]", "N/A", "[Not Supported]")


@dataclass(frozen=True)
class Cluster:
    """So many nodes of so many GPUs."""

    chip: Chip
    nodes: int = 1
    per_node: int = 1

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    def describe(self) -> str:
        """`2 x 8 x NVIDIA H200`."""
        counts = [str(count) for count in (self.nodes, self.per_node) if count > 1]
        return " x ".join([*counts, self.chip.name])

    def bandwidth(self, ranks: int, stride: int) -> float:
        """Bytes/s of each rank in a ring of `ranks`, `stride` apart.

        A ring over several nodes crosses from one to the next through the networks of all ranks
        that it has on a node.
        """
        link = self.chip.link or 0.0
        # The whole group is on one node.
        if ranks * stride <= self.per_node:
            return 1e9 * link
        # Ranks of the group on one node.
        inside = max(1, self.per_node // stride)
        across = inside * (self.chip.network or 0.0)
        if inside > 1:
            # A ring is as fast as its slowest hop: into the next node, or over the links within
            # one.
            return 1e9 * min(across, link)
        return 1e9 * across


def read_cluster(text: str) -> Cluster:
    """Return the machines that `--on` names: `here`, or `2x8xh100` by the table of chips.

    Case and spaces are ignored.

    Raises:
        UsageError: for an unknown name, and for a GPU here whose memory nvidia-smi does not tell.
    """
    words = re.sub(r"[\s_-]+", "-", re.sub("[*×]", "x", text.strip().lower()))
    # Nodes, GPUs of a node, chip; what one number alone means is decided below.
    match = re.fullmatch(r"(?:(\d+)-?x-?)?(?:(\d+)-?x-?)?([a-z0-9][a-z0-9-]*)", words)
    name = match[3] if match else text
    if name == "here":
        return _this_machine()
    chip = next((chip for key, chip in CHIPS.items() if _is_called(name, key, chip)), None)
    if match is None or chip is None or "0" in match.groups():
        fix = f"one of {', '.join(CHIPS)}, as in 8xh100 or 2x8xh100; or here"
        near = nearest(name, CHIPS)
        if near:
            fix = f"did you mean {near}? {fix}"
        raise UsageError(f"there is no machine {text!r} in the table", where="--on", fix=fix)
    counts = [int(count) for count in match.groups()[:2] if count]
    nodes, per_node = [1, 1, *counts][-2:]
    # A Spark has one GPU: two of them are two nodes.
    if chip.integrated and len(counts) == 1:
        nodes, per_node = per_node, nodes
    return _make_cluster(chip, nodes, per_node)


def _is_called(name: str, key: str, chip: Chip) -> bool:
    """Tell whether a name in lower case is a chip's key, with or without its brand, or nvidia-smi's
    name of it: `dgx-spark`, `spark`, `gb10`; `rtx-4090`, `rtx4090`, `4090`.
    """
    full = chip.name.lower().replace(" ", "-")
    names = (key, re.sub("^(rtx|dgx)-", "", key), full, full.removeprefix("nvidia-"))
    return name.replace("-", "") in (each.replace("-", "") for each in names)


def cluster_of(name: str, nodes: int = 1, per_node: int = 1, gib: float = 0.0) -> Cluster:
    """Return a cluster of GPUs that are there, by their name.

    Its speed is unknown if the table does not have the GPU.
    """
    chip = next((chip for chip in CHIPS.values() if chip.name == name), Chip(name, gib))
    return _make_cluster(chip, nodes, per_node)


def _make_cluster(chip: Chip, nodes: int, per_node: int) -> Cluster:
    """Return the cluster, without a speed if the bandwidth of a link that it needs is unknown."""
    if (per_node > 1 and chip.link is None) or (nodes > 1 and chip.network is None):
        chip = replace(chip, tflops=None)
    return Cluster(chip, nodes, per_node)


def _this_machine() -> Cluster:
    """Return this machine, as nvidia-smi describes it, which touches no GPU; without a GPU its
    CPU.
    """
    gpus = list_gpus()
    if not gpus:
        return Cluster(Chip("cpu", available_memory() / 2**30, bf16=multiplies_bf16()))
    _, name, memory = gpus[0]
    # A CUDA context takes 0.6 GiB of a GPU's memory.
    gib = float(memory) / 1024 - 0.6 if memory.isdecimal() else 0.0
    cluster = cluster_of(name, 1, len(gpus), gib)
    in_table = any(chip.name == name for chip in CHIPS.values())
    if cluster.chip.integrated or (memory in NO_MEMORY_OF_ITS_OWN and not in_table):
        shared = unified_budget(read_memory()) / 2**30
        return replace(cluster, chip=replace(cluster.chip, gib=shared, integrated=True))
    if not cluster.chip.gib:
        raise UsageError(
            f"nvidia-smi does not say how much memory {name} has",
            where="--on here",
            fix=f"--on with a GPU of as much memory, one of {', '.join(CHIPS)}",
        )
    return cluster
