"""What an error says about a missing package can be typed as it stands."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from errors import refuses
from tunesmith.errors import MachineError
from tunesmith.host import packages
from tunesmith.host.packages import pip_install

ROOT = Path(__file__).parents[2]


def extras() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("extra", ["nf4", "gguf", "wandb"])
def test_the_packages_of_an_extra_are_named_with_their_version(extra: str) -> None:
    for line in extras()[extra]:
        assert pip_install(Requirement(line).name) == f"pip install '{line}'"


def test_a_package_of_no_extra_is_named_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pip_install("never-heard-of") == "pip install never-heard-of"

    def not_installed(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", not_installed)
    assert pip_install("gguf") == "pip install gguf"


def test_a_package_of_a_wrong_version_is_refused_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages.check_versions()
    place = tmp_path / "transformers-4.57.0.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    packages.installed_versions.cache_clear()
    allowed = "transformers<6,>=5.17"
    try:
        with refuses(
            MachineError, names=["transformers 4.57.0", allowed], cause="version"
        ) as caught:
            packages.check_versions()
    finally:
        packages.installed_versions.cache_clear()
    assert caught.value.fix == f"pip install '{allowed}'"


def test_no_text_tells_to_install_tunesmith_from_an_index_that_has_none() -> None:
    files = [ROOT / "README.md"]
    for pattern in ("src/**/*.py", "scripts/*.py", "demo/*.py", "docs/**/*.md", "recipes/*.yaml"):
        files += ROOT.glob(pattern)
    assert len(files) > 100
    told = re.compile(r"pip install[^#\n]*\btunesmith\b")
    assert [file for file in files if told.search(file.read_text(encoding="utf-8"))] == []
