"""`scripts/hf_job.py`: what it uploads, and that a token without write access trains nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

import hf_job
from recipes import write_rows


def start(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["hf_job.py", *map(str, words), "--to", "ada/bot"])
    return hf_job.main()


@pytest.mark.slow
def test_a_job_trains_and_uploads(monkeypatch, tiny: Path, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **options: asked.append(options))
    monkeypatch.setattr(HfApi, "upload_folder", lambda *args, **options: asked.append(options))
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    more = ["adapter.kind=none", "train.duration=2 steps", "log.samples=0"]
    assert start(monkeypatch, "--model", tiny, "--data", rows, *more) == 0
    created, uploaded = asked
    assert created["private"] is True
    assert uploaded["repo_id"] == "ada/bot"
    assert (uploaded["folder_path"] / "model.safetensors").is_file()
    assert uploaded["folder_path"].name == "final"


def test_a_token_that_may_not_write_trains_nothing(monkeypatch, tmp_path: Path) -> None:
    def refuse(*args: object, **options: object) -> None:
        response: Any = SimpleNamespace(status_code=403, headers={}, request=None)
        raise HfHubHTTPError("refused", response=response)

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    monkeypatch.chdir(tmp_path)
    assert start(monkeypatch, "--model", "demo", "--data", "rows.jsonl") == 2
    assert not (tmp_path / "runs").exists()


def test_a_stopped_run_has_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (90, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert hf_job.newest_weights(tmp_path).name == "checkpoint-100"
