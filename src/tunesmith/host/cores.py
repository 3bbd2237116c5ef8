"""The cores that this process may use."""

import os
import sys
from contextlib import suppress
from pathlib import Path


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


def control_groups(controller: str, root: Path = Path("/"), process: str = "self") -> list[Path]:
    """The folders of a process's control groups that may limit it, the innermost first.

    Of version 1 or 2.
    """
    groups: list[Path] = []
    with suppress(OSError, ValueError):  # no control groups here
        for line in (root / "proc" / process / "cgroup").read_text(encoding="utf-8").splitlines():
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
