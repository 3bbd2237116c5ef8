"""Table of GPU properties by name, and the list of GPUs from nvidia-smi. Does not import torch.

chips.json has all numbers with their sources. `machines` lists the GPUs for which a run can be
planned. `peaks` lists the dense bf16 and fp16 tensor-core peaks with fp32 accumulation from
NVIDIA's data sheets. If a data sheet gives the peak "with sparsity", the table has half of this
number. The bandwidth of a link is assumed to be 80 % of the published bandwidth. This fraction was
measured on the cable between two DGX Sparks (20 of 25 GB/s). No other link was measured.
"""

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True)
class Chip:
    """The performance and memory of a GPU, and the bandwidth of its links. None means unknown.

    Attributes:
        gib: memory that a process can allocate, in GiB.
        bandwidth: memory bandwidth in GB/s.
        tflops: bf16 TFLOP/s that an entire training step reaches.
        link, network: bandwidth from one GPU to another GPU of the same node, and to another node,
            in GB/s in one direction.
        host_link: bandwidth from host memory in GB/s, if it differs from `link`.
        integrated: whether the GPU shares the host's memory.
        fp8, bf16: whether the GPU has matmul units for this dtype.
        grouped_mm: whether torch can multiply all experts of a mixture in one kernel on this GPU.
        source: the source of `tflops`.
        sources: the sources of all other numbers of this GPU.
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
    """The peak performance of a GPU. MFU is the fraction of this peak that a run reaches.

    Attributes:
        tflops: dense bf16 TFLOP/s, or None if the peak is unknown.
        source: the source of the number, such as a data sheet.
    """

    tflops: float | None = None
    source: str = ""

    @property
    def published(self) -> bool:
        return self.tflops is not None and not self.source.startswith(MEASURED)


class ListedGpu(NamedTuple):
    """A GPU in the list of nvidia-smi. `memory` is in MiB, or a text such as "[N/A]"."""

    number: str
    name: str
    memory: str


# First word of `Peak.source` if the peak was measured. This is done if no data sheet states it.
MEASURED = "measured"
CHIP_TABLE = json.loads(Path(__file__).with_name("chips.json").read_text(encoding="utf-8"))
CHIPS: dict[str, Chip] = {name: Chip(**figures) for name, figures in CHIP_TABLE["machines"].items()}


def peak_of(name: str) -> Peak:
    """Return the dense bf16 peak of a GPU by its name.

    The first row of the table whose pattern matches the name is used. The peak of a laptop GPU is
    unknown, because its clock differs from that of the desktop GPU with the same number. The peak
    of a MIG slice is unknown too, because a slice is only a part of the GPU.
    """
    for row in CHIP_TABLE["peaks"]:
        if " MIG " not in name and re.search(row["pattern"], name, re.IGNORECASE):
            return Peak(row["tflops"] or None, row["source"])
    return Peak()


def list_gpus() -> list[ListedGpu]:
    """Return the GPUs of this machine from nvidia-smi, which does not create a CUDA context.

    Return an empty list if nvidia-smi is missing or fails.
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
        # Skip lines without a GPU, such as an empty line or `No devices were found`.
        if number.strip().isdecimal():
            gpus.append(ListedGpu(number.strip(), name.strip(), memory.strip()))
    return gpus
