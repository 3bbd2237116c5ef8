"""Properties of the machine: its description for env.json, its peak FLOP/s and its memory use."""

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

import psutil
import torch
from torch import Tensor

from tunesmith.errors import mask_words
from tunesmith.host.chips import MEASURED, Peak, peak_of
from tunesmith.host.packages import installed_versions
from tunesmith.units import ratio

MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}  # size of the square matrices for the measured peak
ROUND_SECONDS = 0.2
ROUNDS = 5


def find_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Return the peak FLOP/s with which MFU is computed. Its `tflops` is None if it is unknown.

    The peak is known only for 16-bit dtypes on CUDA. The peak of fp32 depends on whether TF32 is
    allowed, and no CPU vendor publishes a peak for the clock under AVX-512 load. The peak of an
    integrated GPU that is not in the table is measured, which takes about two seconds.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return Peak()
    chip = torch.cuda.get_device_properties(device)
    peak = peak_of(chip.name)
    if peak.tflops is not None or not chip.is_integrated:
        return peak
    return Peak(matmul_tflops(device, dtype), f"{MEASURED} at the start of this run, dense {dtype}")


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the TFLOP/s of a dense matmul of two square matrices in `dtype`.

    The result is the median of ROUNDS rounds. It is usually below the published peak, because under
    load most chips run at a lower clock than the one for which the peak is published.
    """
    n = MATMUL_SIZE[device.type]
    # Use random numbers, because zeros draw less power.
    left = torch.randn(n, n, device=device, dtype=dtype)
    right = torch.randn(n, n, device=device, dtype=dtype)
    out = torch.empty_like(left)
    return ratio(2 * n**3, seconds_of(lambda: torch.mm(left, right, out=out))) / 1e12


def seconds_of(product: Callable[[], Tensor]) -> float:
    """Measure the seconds of one matmul. Return 0 if the clock did not advance.

    The result is the median of ROUNDS rounds of about ROUND_SECONDS each, after a warm-up.
    """
    # Import here, because the import takes 0.1 s and most runs do not need it.
    from torch.utils.benchmark import Timer

    timer = Timer("product()", globals={"product": product}, num_threads=torch.get_num_threads())
    mean = timer.timeit(2).mean
    # If the clock did not advance, torch's timer returns one nanosecond, so a round of
    # ROUND_SECONDS would need too many calls and would not end.
    if mean < 1e-9:
        return 0.0
    # The timer synchronizes with the GPU only once per round, so the time of the synchronization
    # hardly changes the result.
    count = max(1, round(ROUND_SECONDS / mean))
    return statistics.median(timer.timeit(count).mean for _ in range(ROUNDS))


def memory_gib(device: torch.device | None = None) -> float:
    """Return the peak memory of this process so far in GiB.

    This is the allocated memory of the CUDA device, or the resident memory in RAM on other devices.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss is in bytes on macOS and in KiB on Linux.
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def describe_machine(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Return the software, hardware and command of a run for env.json.

    Environment variables are not stored, because they can contain secrets. Secrets in argv are
    masked.
    """
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return {
        "python": platform.python_version(),
        **installed_versions(),
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        # A container or `taskset` may allow fewer cores than the machine has.
        "cpu_cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [
            {
                "name": gpu.name,
                "memory_gib": round(gpu.total_memory / 2**30, 1),
                "capability": f"{gpu.major}.{gpu.minor}",
                "peak_tflops_bf16": peak_of(gpu.name).tflops,
            }
            for gpu in gpus
        ],
        "commit": _source_commit(Path(__file__).parents[1]),
        "command": mask_words(sys.argv if argv is None else argv),
    }


def _cpu_name() -> str:
    """Return the processor's name from /proc/cpuinfo, or else the architecture.

    /proc/cpuinfo has no name on ARM.
    """
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return match[1].strip()
    return platform.processor() or platform.machine()


def _source_commit(folder: Path) -> str | None:
    """Return the git commit of tunesmith's source in `folder`.

    "+" is appended if tracked files of the repository differ from the commit. Return None if no
    repository tracks the source, for example for an installed package.
    """
    # Check that the repository tracks tunesmith's source. The source can also be in a virtual
    # environment that is an ignored folder of another repository. The commit of that repository is
    # not the commit of tunesmith.
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
