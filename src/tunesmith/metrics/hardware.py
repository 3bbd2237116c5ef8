"""The machine under a run: its description for env.json, its published peak and its memory."""

import contextlib
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunesmith.errors import mask_words
from tunesmith.host_files import physical_memory
from tunesmith.packages import installed_versions
from tunesmith.units import ratio

MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}  # of the measured peak
ROUND_SECONDS, ROUNDS = 0.2, 5
MEASURED = "measured"  # how the source of a peak begins that no data sheet states

# Dense bf16 / fp16 tensor-core peaks with fp32 accumulation, TFLOP/s, from NVIDIA's data sheets (where a sheet states
# the figure "with sparsity", half of it). The first pattern that fits the device's name wins; laptop parts share the
# names of desktop ones at other clocks and are left out.
_PEAKS: tuple[tuple[str, float, str], ...] = (
    (
        r"\bRTX PRO 6000 .*Max-Q\b",
        438.9,
        "data sheet: 3,511 TOPS of fp4 with sparsity, an eighth of it",
    ),
    (r"laptop|max-q", 0.0, ""),
    (r"\bRTX PRO 6000 .*Server\b", 468.0, "product page: 234 of TF32, twice that"),
    (r"\bRTX PRO 6000\b", 503.8, "RTX Blackwell PRO white paper"),
    (r"\bGB10\b", 92.0, f"{MEASURED} on a DGX Spark, dense bf16"),
    (r"\bGB[23]00\b", 2500.0, "GB200 and GB300 NVL72 data sheets: 360 PFLOPS with sparsity for 72"),
    (r"\bB[23]00\b", 2250.0, "HGX B200 and B300 data sheets: 36 PFLOPS with sparsity for 8"),
    (r"\bH[12]00 NVL\b", 835.5, "H100 NVL and H200 NVL data sheets: 1,671 with sparsity"),
    (r"\bH[18]00 PCIe\b", 756.5, "H100 and H800 PCIe data sheets: 1,513 with sparsity"),
    (r"\bGH200\b|\bH200\b", 989.5, "H200 data sheet: 1,979 with sparsity"),
    (r"\bH[18]00\b", 989.5, "H100 SXM data sheet: 1,979 with sparsity"),
    (r"\bH20\b", 148.0, "H20 data sheet"),
    (r"\bA[18]00\b", 312.0, "A100 data sheet"),
    (r"\bL40S\b", 362.0, "L40S data sheet"),
    (r"\bL40\b", 181.0, "L40 data sheet"),
    (r"\bL4\b", 121.0, "L4 data sheet"),
    (r"\bA40\b", 149.7, "A40 data sheet"),
    (r"\bA30\b", 165.0, "A30 data sheet"),
    (r"\bA10G\b", 70.0, "A10G data sheet"),
    (r"\bA10\b", 125.0, "A10 data sheet"),
    (r"\bRTX A6000\b", 154.8, "Ampere GA102 white paper"),
    (
        r"\bRTX 6000 Ada\b",
        364.2,
        "RTX 6000 Ada data sheet: 1,457 of fp8 with sparsity, a quarter of it",
    ),
    (r"\bRTX 5090(?! ?D)\b", 209.5, "RTX Blackwell white paper"),
    (r"\bRTX 4090(?! ?D)\b", 165.2, "Ada white paper"),
    (r"\bRTX 3090\b(?! ?Ti)", 71.0, "Ampere GA102 white paper"),
)
# A MIG slice is named after its compute slices: `NVIDIA H100 PCIe MIG 1g.10gb`, or `MIG 1c.2g.20gb` for a part of two.
_MIG = re.compile(r"\bMIG (?:(\d)c\.)?(\d)g\.")


class Peak(NamedTuple):
    """What MFU is taken against: dense bf16 TFLOP/s, None where unknown, and where the figure is from."""

    tflops: float | None = None
    source: str = ""

    @property
    def published(self) -> bool:
        return self.tflops is not None and not self.source.startswith(MEASURED)


def peak_of(name: str) -> Peak:
    """Dense bf16 peak of a GPU by its name; that of a MIG slice is its share of compute slices.

    The share errs by up to a tenth, upwards: 1g of an A100 has 14 of 108 multiprocessors, and counts a seventh.
    """
    found = (row for row in _PEAKS if re.search(row[0], name, re.IGNORECASE))
    _, tflops, source = next(found, ("", 0.0, ""))
    if tflops and (mig := _MIG.search(name)):
        slices, of = int(mig[1] or mig[2]), 4 if re.search(r"\bA30\b|\bRTX PRO\b", name) else 7
        return Peak(tflops * slices / of, f"{source}; {slices} of {of} MIG slices")
    return Peak(tflops or None, source)


def find_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak that MFU is taken against, without a figure where none is known.

    Only 16-bit types on CUDA have one: fp32's depends on whether TF32 is allowed, and no CPU publishes a peak that its
    clock under AVX-512 holds. An integrated chip without a row of its own is measured; it takes about two seconds.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return Peak()
    chip = torch.cuda.get_device_properties(device)
    known = peak_of(chip.name)
    if known.tflops is None and chip.is_integrated:
        return Peak(
            matmul_tflops(device, dtype), f"{MEASURED} at the start of this run, dense {dtype}"
        )
    return known


def matmul_tflops(device: torch.device, dtype: torch.dtype, *, size: int | None = None) -> float:
    """The measured peak: TFLOP/s of a dense product [size, size] x [size, size] in `dtype`, the median of ROUNDS.

    Few chips hold the clock of their published peak under load. Random numbers, as zeros draw less power.
    """
    n = size or MATMUL_SIZE[device.type]
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    return ratio(2 * n**3, seconds_of(lambda: torch.mm(left, right, out=out))) / 1e12


def bf16_slowdown(device: torch.device) -> float:
    """How many times as long a product in bf16 takes as one in fp32: below 1, except on CPUs that emulate bf16.

    A CPU without AVX-512 or AMX took 198 times as long for this product of 256^3, and 85 times for one of 1024^3 (0.9 and 79
    GFLOP/s a thread). There it takes a tenth of a second.
    """
    x = torch.randn(256, 256, device=device)
    wide, narrow = (
        min(timeit.repeat(partial(torch.mm, y, y), number=1, repeat=3)) for y in (x, x.bfloat16())
    )
    return ratio(narrow, wide)


def seconds_of(product: Callable[[], Tensor]) -> float:
    """Seconds of one product, 0 where the clock did not move: the median of ROUNDS rounds of about ROUND_SECONDS each, after a warm-up."""
    from torch.utils.benchmark import Timer  # a tenth of a second, which most runs can spare

    timer = Timer("product()", globals={"product": product}, num_threads=torch.get_num_threads())
    mean = timer.timeit(2).mean
    if mean < 1e-9:
        return 0.0  # the clock stood still, for which torch's timer puts a nanosecond: rounds of that would never end
    count = max(1, round(ROUND_SECONDS / mean))  # on a GPU, waiting once per round costs nothing
    return statistics.median(timer.timeit(count).mean for _ in range(ROUNDS))


def memory_gib(device: torch.device | None = None) -> float:
    """Peak memory of this process so far, GiB: allocated on the CUDA device, else resident in RAM."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB on Linux


def describe_machine(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Software, hardware and command for env.json: an allow-list, which never dumps the environment, with argv masked."""
    gpus = []
    for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count())):
        size, capability = round(gpu.total_memory / 2**30, 1), f"{gpu.major}.{gpu.minor}"
        about = {"name": gpu.name, "memory_gib": size, "capability": capability}
        gpus.append(about | {"peak_tflops_bf16": peak_of(gpu.name).tflops})
    return {
        "python": platform.python_version(),
        **installed_versions(),
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "memory_gib": round(physical_memory() / 2**30, 1),
        "gpus": gpus,
        "commit": _commit(),
        "command": mask_words(sys.argv if argv is None else argv),
    }


def _cpu_name() -> str:
    """The processor's name from /proc/cpuinfo, or the architecture (on ARM, which has no name there)."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The git commit of the working directory, with "+" if tracked files differ from it; None outside a repository."""
    words = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.check_output(
            words, stderr=subprocess.DEVNULL, text=True, timeout=5
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None
