"""What of a file the kernel holds in memory."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path


def resident(file: Path) -> int:
    """Pages of a file in the page cache, as mincore(2) tells, without reading the file."""
    with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        view = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(len(mapped)), pages
        )
        del view
        assert not failed
        return sum(page & 1 for page in pages)
