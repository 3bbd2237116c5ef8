"""Cores of a machine: how many control groups leave, and units for bf16, as /proc/cpuinfo lists them
and oneDNN's variable hides them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tunesmith.host.cores import available_cores, multiplies_bf16

# Lines of /proc/cpuinfo of real machines; flags that all x86 servers share are left out.
X86 = """processor\t: 0
model name\t: {name}
flags\t\t: fpu vme sse4_1 sse4_2 fma f16c rdrand avx2 bmi1 bmi2 adx {units}
bugs\t\t: spectre_v1
"""
ARM = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm {units}
CPU implementer\t: 0x41
"""
SAPPHIRE_RAPIDS = X86.format(
    name="Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
    units="avx512f avx512dq avx512bw avx512vl avx_vnni avx512_bf16 avx512_vnni amx_bf16 avx512_fp16"
    " amx_tile amx_int8",
)
ZEN_4 = X86.format(
    name="AMD EPYC 9R14",
    units="avx512f avx512dq avx512bw avx512vl avx512_bf16 avx512_vbmi avx512_vnni",
)
CASCADE_LAKE = X86.format(
    name="Intel(R) Xeon(R) CPU @ 2.80GHz", units="avx512f avx512dq avx512bw avx512vl avx512_vnni"
)
ZEN_2 = X86.format(name="AMD EPYC 7R32", units="clwb sha_ni xsaveopt xsavec")
GRAVITON_3 = ARM.format(
    units="jscvt fcma lrcpc dcpop sha3 sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm"
    " ssbs paca pacg dcpodp svei8mm svebf16 i8mm bf16 dgh rng"
)
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
        (ZEN_2, False),
        (GRAVITON_2, False),
        (X86.format(name="bf16 amx_bf16", units=""), False),  # a name is no unit
    ],
)
def test_units_are_those_that_the_processor_lists(
    text: str, has_units: bool, tmp_path: Path
) -> None:
    assert not multiplies_bf16(tmp_path), "a machine without a list"
    assert multiplies_bf16(machine(tmp_path, text)) == has_units


# As they were measured on a Sapphire Rapids: with these a product of 512^3 took 4 to 80 times as long
# in bf16 as in fp32, and a word that oneDNN does not know changed nothing.
WITHOUT_UNITS = ("AVX2", "avx2", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
WITH_UNITS = ("AVX512_CORE_BF16", "AVX512_CORE_AMX", "AVX10_1_512", "DEFAULT", "NONSENSE", "")


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_onednn_may_be_told_not_to_use_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = machine(tmp_path, SAPPHIRE_RAPIDS)
    for isa in (*WITHOUT_UNITS, *WITH_UNITS):
        monkeypatch.setenv(name, isa)
        assert multiplies_bf16(root) == (isa in WITH_UNITS), isa


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/", {"cpu.max": "200000 100000\n"}, 2),
        # A parent's limit counts
        (
            "0::/a/b",
            {"a/cpu.max": "350000 100000\n", "a/b/cpu.max": "max 100000\n"},
            3,
        ),
        ("0::/", {"cpu.max": "max 100000\n"}, 8),
        ("0::/", {"cpu.max": "50000 100000\n"}, 1),
        ("4:memory:/x\n3:cpu,cpuacct:/docker/1", {"cpu,cpuacct/cpu.cfs_quota_us": "400000\n"}, 4),
        ("3:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1\n"}, 8),
        ("3:memory:/", {"memory/cpu.cfs_quota_us": "100000\n"}, 8),
        ("", {}, 8),
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
