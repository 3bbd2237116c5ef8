"""The machines that a run is planned for: `2x8xh100`, `2x-dgx-spark`, `here`.

Importable without torch. host/chips.json has the figures, each with its source.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.config.names import nearest
from tunesmith.errors import UsageError
from tunesmith.host.chips import CHIPS, MEASURED, Chip, list_gpus
from tunesmith.host.cores import multiplies_bf16
from tunesmith.host.memory import available_memory, read_memory, unified_budget

# What nvidia-smi writes for the memory of a GPU that shares the host's, as GB10 does.
NO_MEMORY_OF_ITS_OWN = ("[N/A]", "N/A", "[Not Supported]")
# The source of this CPU's speed: before a trial, and after it.
UNMEASURED = "not measured here"
MEASURED_HERE = f"{MEASURED} here and now, on the model's first layers"
# Times of a run over what the trial forecasts: the quickest of several passes, on a machine that
# other programs may slow.
TRIAL_RANGE = (0.7, 2.1)
ASSUMED = ("gib", "bandwidth", "tflops", "link", "network")  # figures that --assume may give


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

    def inside(self, ranks: int, stride: int) -> int:
        """Those of a group of `ranks`, `stride` apart, that are on one node."""
        return min(ranks, max(1, self.per_node // stride))

    def bandwidth(self, ranks: int, stride: int) -> float:
        """Bytes/s of each rank in a ring of `ranks`, `stride` apart.

        A ring over several nodes crosses from one to the next through the networks of all ranks
        that it has on a node.
        """
        link = self.chip.link or 0.0
        # The whole group is on one node.
        if ranks * stride <= self.per_node:
            return 1e9 * link
        inside = self.inside(ranks, stride)
        across = inside * (self.chip.network or 0.0)
        if inside > 1:
            # A ring is as fast as its slowest hop: into the next node, or over the links within
            # one.
            return 1e9 * min(across, link)
        return 1e9 * across


def read_cluster(text: str, assume: Sequence[str] = ()) -> Cluster:
    """The machines that `--on` names, with the figures of `--assume NAME=NUMBER`.

    UsageError if a figure is missing or a name unknown.
    """
    figures = _assumed_figures(assume)
    cluster = _parse_cluster(text, figures)
    chip = replace(cluster.chip, **figures)
    if not chip.gib:
        raise UsageError(
            f"nvidia-smi does not say how much memory {chip.name} has",
            where="--on here",
            fix="--assume gib=24",
        )
    missing = ""
    if cluster.per_node > 1 and chip.link is None:
        missing = "link"
    elif cluster.nodes > 1 and chip.network is None:
        missing = "network"
    if missing:
        raise UsageError(
            f"the {missing} of {chip.name} is unknown",
            where="--on",
            fix=f"--assume {missing}=GB/s, measured, one direction of one GPU",
        )
    return replace(cluster, chip=chip)


def _parse_cluster(text: str, assumed: Mapping[str, Any]) -> Cluster:
    """`here`, or `2x8xh100` by the table of chips; in upper or lower case, and with spaces.

    A GPU that is not in the table may have any name, if its memory is among the `assumed` figures.
    """
    words = re.sub(r"[\s_-]+", "-", re.sub("[*×]", "x", text.strip().lower()))
    # Nodes, GPUs of a node, chip; what one number alone means is decided below.
    match = re.fullmatch(r"(?:(\d+)-?x-?)?(?:(\d+)-?x-?)?([a-z0-9][a-z0-9-]*)", words)
    name = match[3] if match else text
    if name == "here":
        return this_machine()
    chip = next((chip for key, chip in CHIPS.items() if _is_called(name, key, chip)), None)
    if chip is None and "gib" in assumed:
        chip = Chip(name, assumed["gib"])
    if match is None or chip is None or "0" in match.groups():
        # `a100` begins the names of two cards.
        near = [key for key in CHIPS if key.startswith(f"{name}-")]
        names = [*CHIPS, *(re.sub("^(rtx|dgx)-", "", key) for key in CHIPS)]
        near = near or [key for key in (nearest(name, names),) if key]
        counts_of_text = words.removesuffix(name) if match and "0" not in match.groups() else ""
        fix = f"one of {', '.join(CHIPS)}, as in 8xh100 or 2x8xh100; or here"
        if near:
            fix = f"did you mean {' or '.join(f'--on {counts_of_text}{key}' for key in near)}?"
        fix += "; or another: --assume gib=24 --assume tflops=70 --assume bandwidth=600"
        raise UsageError(f"there is no machine {text!r} in the table", where="--on", fix=fix)
    counts = [int(count) for count in match.groups()[:2] if count]
    if len(counts) == 2:
        nodes, per_node = counts
        return Cluster(chip, nodes, per_node)
    count = counts[0] if counts else 1
    # A Spark has one GPU: two of them are two nodes.
    if chip.integrated:
        return Cluster(chip, nodes=count)
    return Cluster(chip, per_node=count)


def _is_called(name: str, key: str, chip: Chip) -> bool:
    """Tell whether a name in lower case is a chip's key, with or without its brand, or nvidia-smi's
    name of it: `dgx-spark`, `spark`, `gb10`; `rtx-4090`, `rtx4090`, `4090`.
    """
    full = chip.name.lower().replace(" ", "-")
    names = (key, re.sub("^(rtx|dgx)-", "", key), full, full.removeprefix("nvidia-"))
    return name.replace("-", "") in (each.replace("-", "") for each in names)


def _assumed_figures(assume: Sequence[str]) -> dict[str, Any]:
    """Fields of a `Chip`, of the words `NAME=NUMBER`."""
    figures: dict[str, Any] = {}
    for word in assume:
        name, _, number = word.partition("=")
        is_number = re.fullmatch(r"\d+(\.\d+)?", number) and float(number) > 0
        if name not in ASSUMED or not is_number:
            raise UsageError(
                f"{word} is not a property of a machine",
                where="--assume",
                fix=f"{', '.join(ASSUMED)}=NUMBER",
            )
        figures[name] = float(number)
        if name == "tflops":
            figures["source"] = "as --assume says"
    return figures


def cluster_of(name: str, nodes: int = 1, per_node: int = 1, gib: float = 0.0) -> Cluster:
    """GPUs that are there, by their name.

    Without a speed where the table lacks the GPU, or the link that they need.
    """
    chip = next((chip for chip in CHIPS.values() if chip.name == name), Chip(name, gib))
    if (per_node > 1 and chip.link is None) or (nodes > 1 and chip.network is None):
        chip = replace(chip, tflops=None)
    return Cluster(chip, nodes, per_node)


def this_machine() -> Cluster:
    """This machine, as nvidia-smi describes it, which touches no GPU; without a GPU its CPU."""
    gpus = list_gpus()
    if not gpus:
        gib = available_memory() / 2**30
        return Cluster(Chip("cpu", gib, bf16=multiplies_bf16(), source=UNMEASURED))
    _, name, memory = gpus[0]
    cluster = cluster_of(name, 1, len(gpus), _gpu_gib(memory))
    in_table = any(chip.name == name for chip in CHIPS.values())
    if cluster.chip.integrated or (memory in NO_MEMORY_OF_ITS_OWN and not in_table):
        return replace(cluster, chip=replace(cluster.chip, gib=_shared_gib(), integrated=True))
    return cluster


def _gpu_gib(memory: str) -> float:
    """Compute what a process can have of a GPU's memory, of which a CUDA context takes 0.6 GiB.

    0 where there is no number.
    """
    try:
        return float(memory) / 1024 - 0.6
    except ValueError:
        return 0.0


def _shared_gib() -> float:
    """Read what a run can have of memory that the GPU shares with the host."""
    return unified_budget(read_memory()) / 2**30
