"""Freed memory stays with the process: seen in the resident memory of a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tunesmith.runtime.host import CACHED_SHAPES, bound_product_caches

PROBE = """
import sys, torch
from tunesmith.runtime.host import keep_freed_pages
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


CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def test_caches_of_shapes_are_bounded_unless_the_user_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it brings is told in the docstring: a process's resident memory is too unsteady to be asserted."""
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(CACHES[1], "7")
    bound_product_caches()
    assert [os.environ[name] for name in CACHES] == [CACHED_SHAPES, "7"]
    assert int(CACHED_SHAPES) < 1024, "what oneDNN keeps by itself"
