"""How this process uses the host's memory."""

from __future__ import annotations

import ctypes
import platform
import sys

# Parameters of glibc's mallopt(3), from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no more on 64 bit
NEVER = 2**31 - 1


def keep_freed_pages() -> bool:
    """Let malloc keep what is freed: training on a CPU frees and takes the same activations in every layer.

    By default glibc gives blocks above 128 KiB back at once and has the kernel zero them again when they are next
    taken; kept pages are 6 % of a LoRA step of SmolLM2-135M on 2 cores. Peak memory does not change.

    Returns:
        whether it was done: on Linux with glibc.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and libc.mallopt(M_TRIM_THRESHOLD, NEVER))
