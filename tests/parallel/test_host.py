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


SHAPES = """
import sys, torch
from tunesmith.parallel.host import bound_product_caches
if sys.argv[1] == "bound":
    bound_product_caches()
torch.set_num_threads(1)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
weight, rows = torch.randn(2048, 576).bfloat16(), torch.randn(900, 576).bfloat16()
before = resident()
for n in range(100, 900):
    torch.nn.functional.linear(rows[:n], weight)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_new_shapes_of_products_do_not_pile_up() -> None:
    """Eight hundred shapes: every one is kept without the bound, where oneDNN has kernels for bf16."""
    bound, free = (
        int(subprocess.run([sys.executable, "-c", SHAPES, how], check=True, capture_output=True, text=True).stdout)
        for how in ("bound", "free")
    )
    if free < 200:
        pytest.skip(f"this machine keeps little anyway: {free} MiB")
    assert bound < 0.6 * free
