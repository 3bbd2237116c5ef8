"""Units for bf16, as /proc/cpuinfo lists them and oneDNN's variable hides them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tunesmith.host.cores import multiplies_bf16

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
    assert multiplies_bf16(machine(tmp_path, text)) == has_units


def test_a_machine_without_a_list_has_none(tmp_path: Path) -> None:
    assert not multiplies_bf16(tmp_path)


# As they were measured on a Sapphire Rapids: with the first five a product of 512^3 took 4 to 80
# times as long in bf16 as in fp32, and a word that oneDNN does not know changed nothing.
@pytest.mark.parametrize(
    ("isa", "has_units"),
    [
        ("AVX2", False),
        ("avx2", False),
        ("AVX2_VNNI_2", False),
        ("AVX512_CORE", False),
        ("AVX512_CORE_VNNI", False),
        ("AVX512_CORE_BF16", True),
        ("AVX512_CORE_AMX", True),
        ("AVX10_1_512", True),
        ("DEFAULT", True),
        ("NONSENSE", True),
        ("", True),
    ],
)
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_onednn_may_be_told_not_to_use_them(
    name: str, isa: str, has_units: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, isa)
    assert multiplies_bf16(machine(tmp_path, SAPPHIRE_RAPIDS)) == has_units
