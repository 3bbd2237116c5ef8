"""A folder to spoil, and a run to go on with, for the tests of faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.bad_world import World
from invoke import invoke


@pytest.fixture(scope="session")
def begun(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and a run of it that took four steps."""
    folder = tmp_path_factory.mktemp("begun")
    done = invoke(*World(folder, tiny, folder).train("train.duration=4 steps"))
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def world(
    tiny: Path,
    begun: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    """An own folder; the caches lie elsewhere."""
    env = {"TUNESMITH_CACHE": str(tmp_path_factory.getbasetemp() / "tunesmith"),
           "HF_HOME": str(tmp_path_factory.getbasetemp() / "hf"), "OMP_NUM_THREADS": "1"}  # fmt: skip
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    made = World(tmp_path, tiny, begun, env)
    made.recipe()
    return made
