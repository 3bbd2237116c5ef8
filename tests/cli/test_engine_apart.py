"""The engine without some of its tools: their folders are deleted in a copy, whose tests then run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# One that starts ranks, one that loads models, one of files alone.
TOOLS = ("sweep", "bench", "importers")
# Folders of tests that need tools.
TESTS_OF_TOOLS = ("tools", "cli")

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_the_tests_of_the_engine_pass_without_three_tools(tmp_path: Path) -> None:
    """Those that take less than a third of a second, as `make quick` runs them."""
    left_out = shutil.ignore_patterns("__pycache__", "node_modules")
    for name in (
        "src",
        "tests",
        "recipes",
        "scripts",
        "benchmarks",
        "demo",
        "docs",
        "docker",
        "nix",
    ):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=left_out)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    for tool in TOOLS:
        shutil.rmtree(tmp_path / "src" / "tunesmith" / "tools" / tool)
    for folder in TESTS_OF_TOOLS:
        shutil.rmtree(tmp_path / "tests" / folder)
    # The house's own tests look at pages and commands of all tools.
    words = ["-m", "not slow", "-q", "-p", "no:cacheprovider", "--ignore", "tests/test_house.py"]
    # A copy has no commit to name.
    words += ["-k", "not the_working_directory_says_nothing_of_the_commit"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "src"), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:]
