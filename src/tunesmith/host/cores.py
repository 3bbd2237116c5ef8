"""The cores that this process may use, and whether they have units for bf16."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

# As /proc/cpuinfo lists them: of x86, and of Arm.
BF16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}
# Values of ONEDNN_MAX_CPU_ISA, in any case, with which torch's products do not use these units.
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
    """Tell whether the CPU lists units for bf16, and ONEDNN_MAX_CPU_ISA does not hide them.

    Without them a product takes up to 200 times as long as one in fp32. /proc is below `root`.
    """
    # oneDNN also reads the variable under its older name.
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
    """Cores that this process is bound to, within its control groups' share of time.

    /proc and /sys are below `root`.
    """
    cores = os.cpu_count() or 1
    if sys.platform == "linux":
        cores = len(os.sched_getaffinity(0))
    for group in control_groups("cpu", root):
        quota = _core_quota(group)
        if quota is not None:
            cores = min(cores, quota)
    return cores


def control_groups(controller: str, root: Path = Path("/")) -> list[Path]:
    """Return the folders of this process's control groups (version 1 or 2), the innermost first."""
    groups: list[Path] = []
    with suppress(OSError, ValueError):  # no control groups here
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            # `4:cpu,cpuacct:/user` of version 1, `0::/user` of version 2
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            base = root / "sys/fs/cgroup" / controllers
            # In a container it may not be there, and its limit is that of `base`.
            group = base / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(base):
                    groups.append(folder)
    return groups


def _core_quota(group: Path) -> int | None:
    """Whole cores that a control group may use, at least 1; None where it has no limit."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # no such file, or `max`
            text = " ".join((group / name).read_text(encoding="ascii") for name in names)
            quota, period = map(int, text.split())
            return max(1, quota // period) if quota > 0 else None
    return None
