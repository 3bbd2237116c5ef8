"""env.json is an allow-list; peaks are those of the data sheets."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tunesmith.host.chips import Peak, peak_of
from tunesmith.metrics.hardware import _source_commit, describe_machine, find_peak


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        # One name is the beginning of another.
        ("NVIDIA H200", 989.5), ("NVIDIA H200 NVL", 835.5), ("NVIDIA H100 PCIe", 756.5), ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0), ("NVIDIA L40", 181.0), ("NVIDIA L4", 121.0), ("NVIDIA GB10", 92.0), ("NVIDIA GB200", 2500.0),
        ("NVIDIA A10G", 70.0), ("NVIDIA A10", 125.0), ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 468.0),
        # Chips of other speeds that are named like a chip of the table.
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3090 Ti", None),
        ("Quadro RTX 6000", None), ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
    ],
)  # fmt: skip
def test_a_name_finds_its_own_peak_and_no_other(name: str, tflops: float | None) -> None:
    found = peak_of(name)
    assert found.tflops == tflops
    assert bool(found.source) == (tflops is not None)
    assert found.published == (tflops is not None and "GB10" not in name)


@pytest.mark.parametrize(
    ("name", "integrated", "tflops"),
    [("NVIDIA GB10", True, 92.0), ("NVIDIA Thor", True, 7.0), ("NVIDIA Tesla X9", False, None)],
)
def test_an_integrated_chip_without_a_published_peak_is_measured_and_says_so(
    monkeypatch, name, integrated, tflops
):
    chip = SimpleNamespace(name=name, is_integrated=integrated)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    monkeypatch.setattr("tunesmith.metrics.hardware.matmul_tflops", lambda device, dtype: 7.0)
    found = find_peak(torch.device("cuda"), torch.bfloat16)
    assert (found.tflops, found.published) == (tflops, False)
    assert ("measured" in found.source) == (tflops is not None)
    assert find_peak(torch.device("cpu"), torch.bfloat16) == Peak(None, "")


def git(folder: Path, *words: str) -> str:
    person = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.check_output(["git", "-C", folder, *person, *words], text=True).strip()


def test_the_description_is_an_allow_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commit is not that of the working directory."""
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    monkeypatch.setenv("A_VARIABLE", "its-value")
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-qm", "first", "--allow-empty")
    monkeypatch.chdir(tmp_path)
    found = describe_machine(["tunesmith", "train", "r.yaml"])
    assert {"python", "torch", "transformers", "peft", "gpus", "commit", "command"} <= set(found)
    text = json.dumps(found)
    assert "hf_abc" not in text
    assert "its-value" not in text
    # `torch.__version__` may add +cu130 to it
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["memory_gib"] > 0.5
    assert git(tmp_path, "rev-parse", "HEAD") not in text


def test_the_commit_is_that_of_the_repository_that_tracks_the_source(tmp_path: Path) -> None:
    """A virtual environment in somebody's repository has none, ignored or only not added."""
    (tmp_path / ".gitignore").write_text(".venv\n")
    folders = [tmp_path / ".venv" / "tunesmith", tmp_path / "env" / "tunesmith", tmp_path / "src"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("1")
    assert _source_commit(folders[2]) is None  # no repository yet
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "src", ".gitignore")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert [_source_commit(folder) for folder in folders] == [None, None, commit]
    (folders[2] / "__init__.py").write_text("2")
    assert _source_commit(folders[2]) == commit + "+"
