"""A process that enters a network namespace by itself, as `ip netns exec` starts one inside."""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path

from warm import fork_ranks

# Of <sched.h> and <sys/mount.h>
CLONE_NEWNS, CLONE_NEWNET = 0x20000, 0x40000000
MS_REC, MS_SLAVE, MNT_DETACH = 0x4000, 0x80000, 2


def start_in(name: str) -> None:
    """`prepare` of an agent: it and its ranks are in the namespace, whose devices /sys shows."""
    with Path(f"/run/netns/{name}").open() as namespace:
        _call("setns", namespace.fileno(), CLONE_NEWNET)
    _call("unshare", CLONE_NEWNS)
    _call("mount", b"", b"/", b"none", MS_SLAVE | MS_REC, None)
    _call("umount2", b"/sys", MNT_DETACH)
    _call("mount", name.encode(), b"/sys", b"sysfs", 0, None)
    tempfile.tempdir = None  # the environment's, read again
    fork_ranks()


def _call(function: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
