"""Cores that control groups leave, and units for bf16 as /proc/cpuinfo lists them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tunesmith.host.cores import available_cores, multiplies_bf16

# Lines of /proc/cpuinfo of real machines; flags that all x86 servers share are left out.
X86 = "processor\t: 0\nmodel name\t: {name}\nflags\t\t: fpu fma f16c avx2 {units}\nbugs\t\t: none\n"
ARM = "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd aes {units}\nCPU implementer\t: 0x41\n"
SAPPHIRE_RAPIDS = X86.format(name="Intel", units="avx512f avx512_bf16 amx_bf16 amx_tile")
ZEN_4 = X86.format(name="AMD", units="avx512f avx512_bf16 avx512_vnni")
CASCADE_LAKE = X86.format(name="Intel", units="avx512f avx512bw avx512_vnni")
GRAVITON_3 = ARM.format(units="sve svei8mm svebf16 i8mm bf16 dgh")
GRAVITON_2 = ARM.format(units="lrcpc dcpop asimddp ssbs")


@pytest.fixture(autouse=True)
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


def machine(root: Path, text: str) -> Path:
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(text)
    return root


@pytest.mark.parametrize(
    ("text", "has_units"),
    [
        (SAPPHIRE_RAPIDS, True),
        (ZEN_4, True),
        (GRAVITON_3, True),
        (CASCADE_LAKE, False),
        (GRAVITON_2, False),
        (X86.format(name="bf16 amx_bf16", units=""), False),  # a name is no unit
    ],
)
def test_units_are_those_that_the_processor_lists(text, has_units, tmp_path):
    assert not multiplies_bf16(tmp_path), "a machine without a list"
    assert multiplies_bf16(machine(tmp_path, text)) == has_units


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        # A parent's limit counts
        ("0::/a/b", {"a/cpu.max": "350000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/", {"cpu.max": "50000 100000\n"}, 1),
        ("4:memory:/x\n3:cpu,cpuacct:/docker/1", {"cpu,cpuacct/cpu.cfs_quota_us": "400000\n"}, 4),
        ("3:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1\n"}, 8),
    ],
)
def test_cores_follow_the_control_groups_of_both_versions(
    groups: str, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    written = {"proc/self/cgroup": groups}
    for name, text in files.items():
        written[f"sys/fs/cgroup/{name}"] = text
        written.setdefault(f"sys/fs/cgroup/{Path(name).parent}/cpu.cfs_period_us", "100000\n")
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="ascii")
    assert available_cores(tmp_path) == cores
