"""Random damage under every command that reads a run directory."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from cli.bad_world import World
from cli.damaged_runs import READERS, complete, describe, try_seed
from tunesmith.cli.main import main

pytestmark = pytest.mark.slow

SEEDS = range(1000, 1030)


@pytest.fixture(scope="module")
def template(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = World(tmp_path_factory.mktemp("template"), tiny)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        assert main(["train", str(world.recipe(held=True)), "train.duration=4 steps"]) == 0
    complete(world.out)
    return world.out


@pytest.mark.parametrize("seed", SEEDS)
def test_damage_is_met_without_an_internal_error(seed: int, template: Path, tmp_path: Path) -> None:
    """`eval` and `merge`, which load a model, for every sixth seed."""
    commands = READERS if seed % 6 else None
    for outcome in try_seed(seed, template, tmp_path, commands):
        assert not outcome.is_bad, describe(outcome)


def test_a_seed_does_the_same_damage_again(template: Path, tmp_path: Path) -> None:
    changes = set()
    for number, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        changes.add(next(try_seed(seed, template, folder, READERS)).change)
    assert len(changes) == 2
