"""The figures of GPUs by their names, and the GPUs that nvidia-smi lists.

Importable without torch. chips.json has all figures, each with its source: `machines`, for which a
run can be planned, and `peaks`, the dense bf16 and fp16 tensor-core peaks with fp32 accumulation
from NVIDIA's data sheets (where a sheet states the figure "with sparsity", half of it). A link
reaches 80 % of what is published for it, as the cable between two Sparks does (20 of 25 GB/s): no
other link was measured.
"""

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True)
class Chip:
    """One GPU and its links, with None for what is unknown.

    Attributes:
        gib: what a process can have.
        bandwidth: of the memory, GB/s.
        tflops: what whole steps reach in bf16.
        link, network: to a neighbor in the node and to another node, GB/s in one direction of one
            GPU.
        host_link: from the host's memory, GB/s, where that is another than `link`.
        fp8, bf16: whether it multiplies these.
        grouped_mm: whether torch multiplies all experts of a mixture by one kernel on it.
        source: of tflops.
        sources: of the other figures.
    """

    name: str
    gib: float
    bandwidth: float | None = None
    tflops: float | None = None
    link: float | None = None
    network: float | None = None
    host_link: float | None = None
    integrated: bool = False
    fp8: bool = True
    bf16: bool = True
    grouped_mm: bool = False
    source: str = "unknown"
    sources: str = ""


class Peak(NamedTuple):
    """The peak that MFU is relative to: dense bf16 TFLOP/s, None if unknown, and their source."""

    tflops: float | None = None
    source: str = ""

    @property
    def published(self) -> bool:
        return self.tflops is not None and not self.source.startswith(MEASURED)


class ListedGpu(NamedTuple):
    """One GPU as nvidia-smi lists it; `memory` is MiB, or words in place of a number."""

    number: str
    name: str
    memory: str


MEASURED = "measured"  # how the source of a peak begins that no data sheet states
CHIP_TABLE = json.loads(Path(__file__).with_name("chips.json").read_text(encoding="utf-8"))
CHIPS: dict[str, Chip] = {name: Chip(**figures) for name, figures in CHIP_TABLE["machines"].items()}


def peak_of(name: str) -> Peak:
    """Dense bf16 peak of a GPU by its name.

    The first pattern of the table that fits the name wins. Laptop parts share the names of desktop
    ones at other clocks and have no peak, and a MIG slice has a part of its chip's.
    """
    for row in CHIP_TABLE["peaks"]:
        if " MIG " not in name and re.search(row["pattern"], name, re.IGNORECASE):
            return Peak(row["tflops"] or None, row["source"])
    return Peak()


def list_gpus() -> list[ListedGpu]:
    """The GPUs of this machine by nvidia-smi, which does not start CUDA on them.

    None where it is missing or fails.
    """
    command = ["nvidia-smi", "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.check_output(
            command, stderr=subprocess.DEVNULL, text=True, errors="replace", timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = []
    for line in output.splitlines():
        number, _, rest = line.partition(",")
        name, _, memory = rest.rpartition(",")
        # Other lines are no GPUs: an empty one, or `No devices were found`.
        if number.strip().isdecimal():
            gpus.append(ListedGpu(number.strip(), name.strip(), memory.strip()))
    return gpus
