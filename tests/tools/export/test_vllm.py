"""What vLLM takes of a run: a folder, or an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from errors import check_shown, holds, refuses
from runs import make_run, peft_model
from tunesmith.errors import ModelError, UsageError
from tunesmith.tools.export import vllm_adapter
from tunesmith.tools.export.vllm_adapter import export_peft
from warm import run_warm


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Path:
    make_run(tmp_path / "run", tiny, peft_model(tiny))
    return tmp_path / "run"


@pytest.mark.slow
def test_an_adapter_for_vllm(
    run: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = []
    monkeypatch.setattr(
        vllm_adapter, "require_disk_space", lambda goal, size, **_: needed.append(size)
    )
    assert export_peft(run, tmp_path / "out") == 8
    written = ("adapter_config.json", "adapter_model.safetensors")
    assert needed == [sum((tmp_path / "out" / name).stat().st_size for name in written)]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
    ]
    options: dict[str, Any] = {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}
    recipe = {"modules_to_save": ["embed_tokens"], "target": ["q_proj"]}
    make_run(tmp_path / "full", tiny, peft_model(tiny, **options), adapter=recipe)
    with refuses(ModelError, where="--adapter", names=["embed_tokens"]):
        export_peft(tmp_path / "full", tmp_path / "other")
    with refuses(UsageError, where="out", names=["--output"]):
        export_peft(run, tmp_path / "out")
    with refuses(UsageError, where="--adapter", names=[tiny]):
        export_peft(tiny, tmp_path / "other")


@pytest.mark.slow
def test_the_command(run: Path, tmp_path: Path) -> None:
    words = ["export", run, "--to", "vllm"]
    done = run_warm([*words, "--output", tmp_path / "folder"])
    assert done.returncode == 0, done.stderr
    assert f"next: vllm serve {tmp_path / 'folder'}" in done.stdout
    done = run_warm([*words, "--quant", "bf16", "--output", tmp_path / "bf16", "--json"])
    assert json.loads(done.stdout)["dtype"] == "bf16"
    done = run_warm([*words, "--adapter", "--output", tmp_path / "lora"])
    command = f"--max-lora-rank 8 --lora-modules lora={tmp_path / 'lora'}"
    template = run / "final" / "chat_template.jinja"
    assert f"{command} --chat-template {template}" in done.stdout
    refused = run_warm([*words, "--quant", "q8_0", "--output", tmp_path / "no"])
    assert refused.returncode == 2
    assert holds(refused.stderr, "q8_0")
    check_shown(refused.stderr, where="command line: --quant", fix=["--quant bf16"])
