"""Control groups with a limit, made for a test: as root, of version 1 or 2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def control_group(
    controller: str, version_1: dict[str, str], version_2: dict[str, str]
) -> Iterator[Path]:
    """The folder of a new group with these files; skip the test where none can be made."""
    root = Path("/sys/fs/cgroup")
    new = (root / "cgroup.controllers").exists()
    group = (root if new else root / controller) / f"tunesmith-test-{os.getpid()}"
    try:
        group.mkdir()
        for name, value in (version_2 if new else version_1).items():
            (group / name).write_text(value)
    except OSError as error:
        pytest.skip(
            f"no control group with a limit of {controller} can be made here: {error.strerror}"
        )
    yield group
    group.rmdir()
