"""The machine under a run: its description for env.json, its published peak and its memory."""

import contextlib
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.errors import mask_words
from tunesmith.host.chips import MEASURED, Peak, peak_of
from tunesmith.host.memory import physical_memory
from tunesmith.host.packages import installed_versions
from tunesmith.units import ratio

MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}  # of the measured peak
ROUND_SECONDS = 0.2
ROUNDS = 5


def find_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak that MFU is relative to, without a figure for an unknown chip.

    Only 16-bit types on CUDA have one: fp32's depends on whether TF32 is allowed, and no CPU
    publishes a peak that its clock under AVX-512 holds. An integrated chip without a row of its own
    is measured; it takes about two seconds.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return Peak()
    chip = torch.cuda.get_device_properties(device)
    peak = peak_of(chip.name)
    if peak.tflops is not None or not chip.is_integrated:
        return peak
    tflops = matmul_tflops(device, dtype)
    return Peak(tflops, f"{MEASURED} at the start of this run, dense {dtype}")


def matmul_tflops(device: torch.device, dtype: torch.dtype, *, size: int | None = None) -> float:
    """The measured peak: TFLOP/s of a dense product [size, size] x [size, size] in `dtype`, the
    median of ROUNDS.

    Few chips hold the clock of their published peak under load.
    """
    n = size or MATMUL_SIZE[device.type]
    # Random numbers: zeros draw less power.
    left = torch.randn(n, n, device=device, dtype=dtype)
    right = torch.randn(n, n, device=device, dtype=dtype)
    out = torch.empty(n, n, device=device, dtype=dtype)
    return ratio(2 * n**3, seconds_of(lambda: torch.mm(left, right, out=out))) / 1e12


def seconds_of(product: Callable[[], Tensor]) -> float:
    """Seconds of one product, 0 where the clock did not move.

    The median of ROUNDS rounds of about ROUND_SECONDS each, after a warm-up.
    """
    # The import takes a tenth of a second, which most runs can spare.
    from torch.utils.benchmark import Timer

    timer = Timer("product()", globals={"product": product}, num_threads=torch.get_num_threads())
    mean = timer.timeit(2).mean
    # The clock stood still, for which torch's timer puts a nanosecond: rounds of that would never
    # end.
    if mean < 1e-9:
        return 0.0
    # On a GPU, waiting once per round costs nothing.
    count = max(1, round(ROUND_SECONDS / mean))
    return statistics.median(timer.timeit(count).mean for _ in range(ROUNDS))


def memory_gib(device: torch.device | None = None) -> float:
    """Peak memory of this process so far, GiB: allocated on the CUDA device, else resident in
    RAM."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, KiB on Linux.
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def describe_machine(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Software, hardware and command for env.json: an allow-list, which never dumps the
    environment, with argv masked."""
    gpus = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": gpu.name,
                "memory_gib": round(gpu.total_memory / 2**30, 1),
                "capability": f"{gpu.major}.{gpu.minor}",
                "peak_tflops_bf16": peak_of(gpu.name).tflops,
            }
        )
    return {
        "python": platform.python_version(),
        **installed_versions(),
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        # A container or `taskset` may allow fewer cores than the machine has.
        "cpu_cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "memory_gib": round(physical_memory() / 2**30, 1),
        "gpus": gpus,
        "commit": _source_commit(Path(__file__).parents[1]),
        "command": mask_words(sys.argv if argv is None else argv),
    }


def _cpu_name() -> str:
    """The processor's name from /proc/cpuinfo, or the architecture (on ARM, which has no name
    there)."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def _source_commit(folder: Path) -> str | None:
    """The git commit of tunesmith's source in `folder`, with "+" if tracked files of that
    repository differ from it; None where no repository tracks the source, as for an installed
    package.
    """
    # An environment inside somebody's repository is ignored there: its commit is not ours.
    is_tracked = ["ls-files", "--error-unmatch", "__init__.py"]
    describe = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        for words in (is_tracked, describe):
            output = subprocess.check_output(
                ["git", "-C", folder, *words], stderr=subprocess.DEVNULL, text=True, timeout=5
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return output.strip()
