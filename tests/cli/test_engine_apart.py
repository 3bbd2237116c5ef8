"""The engine without some of its tools: their folders are deleted in a copy, whose tests then run."""

from __future__ import annotations

import os
import re
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

# What a test that can meet a tool has in its text: its name, the package's own names, a command,
# a program. The engine's source imports none: import-linter holds that.
REACHES_A_TOOL = re.compile(
    r"tunesmith\.tools|tools/|(from|import) tunesmith\b(?!\.)|cli\.main|\bmain\(|run_warm|Warm\(|run_python"
)

# No server for the few processes that these tests start.
ENVIRONMENT = {"PYTEST_ADDOPTS": "", "TUNESMITH_TESTS_FORK": "0"}

pytestmark = [pytest.mark.nightly, pytest.mark.long]


def test_the_tests_of_the_engine_pass_without_three_tools(tmp_path: Path) -> None:
    """Those that can meet a tool, if they take less than a third of a second."""
    # Bytecode goes along: it counts by the time of its source, which a copy keeps.
    left_out = shutil.ignore_patterns("node_modules")
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
    every = sorted((tmp_path / "tests").rglob("test_*.py"))
    files = [file for file in every if REACHES_A_TOOL.search(file.read_text())]
    files.remove(tmp_path / "tests/test_house.py")
    assert len(files) > 30
    words = ["-m", "not slow and not nightly", "-q", "-p", "no:cacheprovider", *map(str, files)]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=tmp_path,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:]
