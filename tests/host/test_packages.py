"""What an error says about a missing package can be typed as it stands."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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


def test_no_text_tells_to_install_tunesmith_from_an_index_that_has_none() -> None:
    found, checked = [], 0
    files = [ROOT / "README.md"]
    for folder, suffix in (
        ("src", "py"),
        ("scripts", "py"),
        ("demo", "py"),
        ("docs", "md"),
        ("recipes", "yaml"),
    ):
        files += (ROOT / folder).rglob(f"*.{suffix}")
    for file in files:
        checked += 1
        for line in file.read_text(encoding="utf-8").splitlines():
            if re.search(r"pip install[^#\n]*\btunesmith\b", line):
                found.append(f"{file.relative_to(ROOT)}: {line.strip()}")
    assert checked > 100
    assert found == []
