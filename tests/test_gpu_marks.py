"""`pytest -m gpu` on a machine that has torch, Transformers and pytest, and little else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

TESTS = Path(__file__).parent
OPTIONAL = (  # some in Transformers' reach, some only in that of our tests
    "bitsandbytes datasets gguf hypothesis jsonschema nbclient nbformat peft tensorboard trl wandb xdist".split()
)
COLLECT = """import sys; sys.modules |= dict.fromkeys(sys.argv[1].split())
import pytest; sys.exit(pytest.main(sys.argv[2:]))"""


def collected(*, hidden: list[str], marks: str) -> set[str]:
    """Names of the tests that a pytest of its own finds with these packages hidden."""
    words = ["-m", marks, "--collect-only", "-p", "no:cacheprovider", str(TESTS)]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-c", COLLECT, " ".join(hidden), *words]
    done = subprocess.run(
        command, cwd=TESTS.parent, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {line for line in done.stdout.splitlines() if "::" in line}


def gpu_tests(session: pytest.Session) -> set[str]:
    """Those of all files with everything there: of this session where it has read them all."""
    options = session.config.option
    folders = {session.config.rootpath / argument for argument in session.config.args}
    if options.markexpr or options.keyword or folders != {TESTS}:
        return collected(hidden=[], marks="(gpu)")
    return {item.nodeid for item in session.items if item.get_closest_marker("gpu")}


def test_missing_packages_stop_no_gpu_test(request: pytest.FixtureRequest) -> None:
    found = collected(hidden=OPTIONAL, marks="gpu")
    assert len(found) >= 5
    assert found == gpu_tests(request.session)
