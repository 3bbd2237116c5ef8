"""Machines for which a run is planned: `2x8xh100`, `2x-dgx-spark`, `here`.

This module does not import torch. host/chips.json has the data of the chips with their sources.
"""

import re
from dataclasses import dataclass, replace

from tunesmith.config.names import nearest
from tunesmith.errors import UsageError
from tunesmith.host.chips import CHIPS, Chip, list_gpus
from tunesmith.host.cores import multiplies_bf16
from tunesmith.host.memory import available_memory, read_memory, unified_budget

# Texts that nvidia-smi prints instead of the memory size if the GPU shares the host's memory
# (GB10).
SHARED_MEMORY_TEXTS = ("[N/A]", "N/A", "[Not Supported]")


@dataclass(frozen=True)
class Cluster:
    """A cluster of equal nodes, each with the same number of GPUs."""

    chip: Chip
    nodes: int = 1
    per_node: int = 1

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    def describe(self) -> str:
        """Return a text such as `2 x 8 x NVIDIA H200`."""
        counts = [f"{count} x " for count in (self.nodes, self.per_node) if count > 1]
        return f"{''.join(counts)}{self.chip.name}"

    def bandwidth(self, ranks: int, stride: int) -> float:
        """Return the bytes per second that each rank can send in a ring of `ranks` ranks. The
        numbers of neighboring ranks differ by `stride`.

        If the ring spans several nodes, it uses the network connections of all of its ranks on a
        node.
        """
        link = self.chip.link or 0.0
        # All ranks of the ring are on one node.
        if ranks * stride <= self.per_node:
            return 1e9 * link
        # Number of ranks of the ring that are on the same node.
        inside = max(1, self.per_node // stride)
        across = inside * (self.chip.network or 0.0)
        if inside > 1:
            # The slowest connection limits a ring: the network to the next node, or a link within a
            # node.
            across = min(across, link)
        return 1e9 * across


def read_cluster(text: str) -> Cluster:
    """Return the cluster for a value of `--on`: `here`, or for example `2x8xh100`, with a chip that
    is listed in host/chips.json.

    Case and spaces are ignored.

    Raises:
        UsageError: the name is unknown, or nvidia-smi does not report the memory of this machine's
            GPU.
    """
    words = re.sub("[*×]", "x", text.strip().lower())
    words = re.sub(r"[\s_-]+", "-", words)
    # The groups of the regular expression are: nodes, GPUs per node, chip. The meaning of a single
    # number is decided below.
    match = re.fullmatch(r"(?:(\d+)-?x-?)?(?:(\d+)-?x-?)?([a-z0-9][a-z0-9-]*)", words)
    name = match[3] if match else text
    if name == "here":
        return _this_machine()
    chips = [chip for key, chip in CHIPS.items() if _is_called(name, key, chip)]
    if match is None or not chips or "0" in match.groups():
        fix = f"use one of {', '.join(CHIPS)}, as in 8xh100 or 2x8xh100, or use `here`"
        near = nearest(name, CHIPS)
        if near:
            fix = f"did you mean {near}? If not, {fix}"
        raise UsageError(
            f"{text!r} does not name a machine that tunesmith knows", where="--on", fix=fix
        )
    counts = [int(count) for count in match.groups()[:2] if count]
    nodes, per_node = [1, 1, *counts][-2:]
    chip = chips[0]
    # A DGX Spark has one GPU, so `2x-dgx-spark` means two nodes.
    if chip.integrated and len(counts) == 1:
        nodes, per_node = per_node, nodes
    return _make_cluster(chip, nodes, per_node)


def _is_called(name: str, key: str, chip: Chip) -> bool:
    """Return whether `name`, which is in lower case, is a name of this chip.

    Accepted names are the key with or without its brand, and the name that nvidia-smi reports:
    `dgx-spark`, `spark`, `gb10`; `rtx-4090`, `rtx4090`, `4090`.
    """
    full = chip.name.lower().replace(" ", "-")
    names = (key, re.sub("^(rtx|dgx)-", "", key), full, full.removeprefix("nvidia-"))
    return name.replace("-", "") in (each.replace("-", "") for each in names)


def cluster_of(name: str, nodes: int, per_node: int, gib: float = 0.0) -> Cluster:
    """Return a cluster of GPUs from the name that the driver reports for them.

    The speed is unknown if host/chips.json does not contain the GPU.
    """
    chip = next((chip for chip in CHIPS.values() if chip.name == name), Chip(name, gib))
    return _make_cluster(chip, nodes, per_node)


def _make_cluster(chip: Chip, nodes: int, per_node: int) -> Cluster:
    """Return a cluster of this chip. If the bandwidth of a link that the cluster needs is unknown,
    the chip's speed counts as unknown too.
    """
    if (per_node > 1 and chip.link is None) or (nodes > 1 and chip.network is None):
        chip = replace(chip, tflops=None)
    return Cluster(chip, nodes, per_node)


def _this_machine() -> Cluster:
    """Return this machine as nvidia-smi describes it, without using a GPU. If there are no GPUs,
    return a cluster with the CPU.
    """
    gpus = list_gpus()
    if not gpus:
        return Cluster(Chip("cpu", available_memory() / 2**30, bf16=multiplies_bf16()))
    _, name, memory = gpus[0]
    gib = 0.0
    if memory.isdecimal():
        # Subtract the memory that a CUDA context uses, 0.6 GiB.
        gib = float(memory) / 1024 - 0.6
    cluster = cluster_of(name, 1, len(gpus), gib)
    if cluster.chip.integrated or (memory in SHARED_MEMORY_TEXTS and not cluster.chip.gib):
        shared = unified_budget(read_memory()) / 2**30
        return replace(cluster, chip=replace(cluster.chip, gib=shared, integrated=True))
    if not cluster.chip.gib:
        raise UsageError(
            f"nvidia-smi does not say how much memory {name} has",
            where="--on here",
            fix=f"use --on with a GPU that has the same memory, one of {', '.join(CHIPS)}",
        )
    return cluster
