"""Freed memory stays with the process: seen in the resident memory of a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROBE = """
import sys, torch
from tunesmith.parallel.host import keep_freed_pages
if sys.argv[1] == "keep":
    assert keep_freed_pages()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
before = resident()
blocks = [torch.ones(10 << 20, dtype=torch.uint8) for _ in range(20)]
assert resident() - before > 150
del blocks
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_two_hundred_mib_that_were_freed_are_kept():
    kept, given = (
        int(subprocess.run([sys.executable, "-c", PROBE, how], check=True, capture_output=True, text=True).stdout)
        for how in ("keep", "give")
    )
    assert given < 50 < 150 < kept
