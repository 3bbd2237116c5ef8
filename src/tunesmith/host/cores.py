"""Functions that find out how many CPU cores this process may use, and whether the cores have bf16
instructions.
"""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

# CPU flags in /proc/cpuinfo. If one of them is present, the CPU has bf16 instructions. The first
# two are from x86, the last is from Arm.
BF16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}
# Values of the environment variable ONEDNN_MAX_CPU_ISA with which oneDNN, and therefore torch's
# matmuls, do not use bf16 instructions. The values are not case-sensitive.
ISAS_WITHOUT_BF16 = (
    "sse41",
    "avx",
    "avx2",
    "avx2_vnni",
    "avx2_vnni_2",
    "avx512_core",
    "avx512_core_vnni",
)


def multiplies_bf16(root: Path = Path("/")) -> bool:
    """Return whether the CPU has bf16 instructions and ONEDNN_MAX_CPU_ISA does not disable them.

    Without these instructions a bf16 matmul takes up to 200 times as long as an fp32 matmul.

    Args:
        root: the folder that contains /proc. Tests use another folder.
    """
    # DNNL_MAX_CPU_ISA is the older name of the variable, which oneDNN still reads.
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")
    if isa.lower() in ISAS_WITHOUT_BF16:
        return False
    with suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            words = ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
            return subprocess.check_output(words, stderr=subprocess.DEVNULL, timeout=5) == b"1\n"
        for line in (root / "proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, units = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return not BF16_UNITS.isdisjoint(units.split())
    return False


def available_cores(root: Path = Path("/")) -> int:
    """Return the number of CPU cores that this process may use.

    This is the number of cores in the process's affinity mask, limited by the CPU quotas of its
    control groups.

    Args:
        root: the folder that contains /proc and /sys. Tests use another folder.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    for group in control_groups("cpu", root):
        quota = _core_quota(group)
        if quota is not None:
            cores = min(cores, quota)
    return cores


def control_groups(controller: str, root: Path = Path("/")) -> list[Path]:
    """Return the folders of this process's control groups (version 1 or 2), the innermost first."""
    groups = []
    with suppress(OSError, ValueError):  # this system has no control groups
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            # A line is `4:cpu,cpuacct:/user` in version 1, and `0::/user` in version 2.
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            base = root / "sys/fs/cgroup" / controllers
            # In a container, the folder of the group may not exist. In this case the files with the
            # limits are in `base`.
            group = base / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(base):
                    groups.append(folder)
    return groups


def _core_quota(group: Path) -> int | None:
    """Return how many cores a control group may use, rounded down but at least 1.

    Return None if the group has no limit.
    """
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # the file does not exist, or the quota is `max`
            text = " ".join((group / name).read_text(encoding="ascii") for name in names)
            quota, period = map(int, text.split())
            return max(1, quota // period) if quota > 0 else None
    return None
