"""Freed memory stays with the process: counted in page faults, in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROBE = """
import resource, sys, torch
from tunesmith.parallel.host import keep_freed_pages
if sys.argv[1] == "keep":
    assert keep_freed_pages()
def turn():
    torch.ones(4 << 20, dtype=torch.uint8)
turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_pages_are_taken_from_the_kernel_once():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", PROBE, how], check=True, capture_output=True, text=True).stdout)
        for how in ("keep", "give")
    }
    # 4 MiB are 1024 pages of 4 KiB; with huge pages fewer faults, but still some in every turn.
    assert faults["keep"] < 50 <= faults["give"]
