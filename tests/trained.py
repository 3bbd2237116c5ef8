"""One trained run for all tests that read a run: report, eval, export, merge, chat and generate."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from invoke import invoke
from recipes import recipe
from tunesmith.config.dump import to_yaml


@pytest.fixture(scope="session")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete LoRA run of 8 steps. Tests change a `trained_copy` alone."""
    folder = tmp_path_factory.mktemp("trained")
    file = folder / "recipe.yaml"
    file.write_text(to_yaml(recipe(tiny, folder, log={"samples": 2})))
    result = invoke("train", file)
    assert result.code == 0, result.err
    return folder / "run"


@pytest.fixture
def trained_copy(trained: Path, tmp_path: Path) -> Callable[[], Path]:
    """Return a function that copies the run of `trained`; its recipe names the new folder."""

    def copy() -> Path:
        folder = tmp_path / f"trained-{len(list(tmp_path.glob('trained-*')))}"
        shutil.copytree(trained.parent, folder)
        for file in (folder / "recipe.yaml", folder / "run" / "config.yaml"):
            file.write_text(file.read_text().replace(str(trained.parent), str(folder)))
        return folder / "run"

    return copy
