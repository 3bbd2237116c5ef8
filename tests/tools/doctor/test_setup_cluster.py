"""`scripts/setup-cluster`: what would fail later fails first, before PyTorch is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hub.standin import Repo, StandIn
from recipes import recipe

SCRIPT = Path(__file__).parents[3] / "scripts" / "setup-cluster"


@pytest.fixture
def place(tiny: Path, tmp_path: Path) -> Path:
    """A recipe of a gated model, and an environment whose pip notes what it is asked for."""
    values = recipe(tiny, tmp_path, held=False, model={"name": "owner/gated"})
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    noted = f'echo "$@" >>{tmp_path}/asked; exit 0'
    python.write_text(f'#!/bin/sh\n[ "$2" = pip ] && {{ {noted}; }}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return tmp_path


def set_up(place: Path, hub: StandIn, token: str | None) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "0"}
    env |= {"HF_TOKEN": token} if token else {}
    command = ["bash", SCRIPT, "recipe.yaml", "env"]
    return subprocess.run(
        command, cwd=place, env=env, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.slow
def test_it_fails_before_the_large_install_and_then_goes_on(tiny: Path, place: Path) -> None:
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    with StandIn({"owner/gated": Repo(files, gated=True, granted="hf_granted0123")}) as hub:
        refused = {None: "hf auth login", "hf_other01234567": "this account"}
        for token, said in refused.items():
            done = set_up(place, hub, token)
            assert done.returncode == 2
            assert said in done.stderr
            assert done.stderr.count("error:") == 1
            installs = (place / "asked").read_text().splitlines()
            assert installs[-1].endswith(f"--no-deps {SCRIPT.parents[1]}")
            assert "huggingface_hub" in installs[-2]
            assert not any("torch" in line for line in installs)
            assert not hub.downloads("model.safetensors")
        done = set_up(place, hub, "hf_granted0123")
    assert done.returncode == 0, done.stderr
    last = (place / "asked").read_text().splitlines()[-1]
    assert last.endswith(f"--quiet --disable-pip-version-check {SCRIPT.parents[1]}")
    assert "ready: . " in done.stdout
    assert list((place / "hf" / "hub").rglob("model.safetensors"))
