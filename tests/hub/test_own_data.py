"""The README's first command, with a model that is not on the machine yet."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from errors import lines_with
from warm import read_hub_settings, run_warm

from .standin import Repo, StandIn

pytestmark = pytest.mark.slow


def test_a_model_from_the_hub_learns_a_file_of_ones_own(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "faq.csv").write_text(
        "question,answer\n" + "".join(f"Say {n},number {n}\n" for n in range(24))
    )
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("HF_") and not k.lower().endswith("_proxy")
    }
    env |= {
        "HF_HOME": str(tmp_path / "home"),
        "TUNESMITH_CACHE": str(tmp_path / "own"),
        "HF_HUB_DISABLE_XET": "1",
    }
    words = [
        "--model",
        "someone/Tiny-1B",
        "--data",
        "faq.csv",
        "model.dtype=fp32",
        "train.duration=2 steps",
    ]

    def tunesmith(verb: str, hub: StandIn) -> subprocess.CompletedProcess[str]:
        return run_warm(
            [verb, *words],
            env=env | {"HF_ENDPOINT": hub.url},
            cwd=tmp_path,
            prepare=read_hub_settings,
        )

    with StandIn({"someone/Tiny-1B": Repo(files)}) as hub:
        looked = tunesmith("data", hub)
        assert looked.returncode == 0, looked.stderr
        assert not any(seen.path.endswith(".safetensors") for seen in hub.seen), (
            "a look needs no weights"
        )
        trained = tunesmith("train", hub)
    assert trained.returncode == 0, trained.stderr
    read = "question, answer -> prompt-completion"
    assert lines_with(trained.stderr, "faq.csv", "24 rows", read)
    assert lines_with(trained.stderr, "someone/Tiny-1B", "apache-2.0")
    assert "name: someone/Tiny-1B\n" in (tmp_path / "runs/faq-tiny-1b.yaml").read_text()
    assert (tmp_path / "runs/faq-tiny-1b/final/adapter_model.safetensors").is_file()
