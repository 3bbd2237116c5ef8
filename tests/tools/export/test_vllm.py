"""Folders in fp8 against compressed-tensors, and what vLLM takes of an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from errors import check_shown, holds, lines_with, refuses
from runs import make_run, peft_model
from tunesmith.errors import ModelError, UsageError
from tunesmith.inference.load_run import locate_run, read_run_files
from tunesmith.tools.export import tuned_weights, vllm_adapter
from tunesmith.tools.export.tuned_weights import open_tuned_model
from tunesmith.tools.export.vllm import export_rounded, round_weights
from tunesmith.tools.export.vllm_adapter import export_peft
from warm import run_warm


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Path:
    make_run(tmp_path / "run", tiny, peft_model(tiny))
    return tmp_path / "run"


@pytest.mark.slow
def test_compressed_tensors_reads_the_values_that_are_said(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors")
    monkeypatch.setattr(tuned_weights, "BAND", 64 * 4 * 4)
    done = export_rounded(run, tmp_path / "out", device="cpu")
    assert done.base is not None
    assert done.rounded.mean_kl < done.base.mean_kl
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.bfloat16,
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    ).state_dict()
    weights = round_weights(open_tuned_model(read_run_files(locate_run(run))))
    assert done.layers == len(weights) == 14
    for name, weight in weights.items():
        said = weight.rows(0, weight.shape[0])
        # The library computes in bf16.
        torch.testing.assert_close(loaded[name].float(), said, rtol=2**-7, atol=1e-6)


@pytest.mark.slow
def test_the_folder_holds_what_the_format_says(run: Path, tmp_path: Path) -> None:
    """Read by the words of the format alone; the error is that of e4m3 on random weights."""
    export_rounded(run, tmp_path / "out", device="cpu")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tuned = open_tuned_model(read_run_files(locate_run(run)))
    for name in (n for n in tuned.weights if n.endswith("_proj.weight")):
        layer = name.removesuffix(".weight")
        dense = tensors[name].float() * tensors[f"{layer}.weight_scale"].float()
        exact = tuned.weights[name].rows(0, tuned.weights[name].shape[0])
        assert (dense - exact).norm() / exact.norm() < 0.03, name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]


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
    done = run_warm([*words, "--quant", "fp8", "--device", "cpu", "--output", tmp_path / "fp8"])
    assert done.returncode == 0, done.stderr
    assert lines_with(done.stdout, 14, "fp8")
    assert f"next: vllm serve {tmp_path / 'fp8'}" in done.stdout
    # Two layers of the tuned model, the rounded one and the base
    assert lines_with(done.stderr, 6, "--no-check")
    assert lines_with(done.stderr, "6/6")
    unchecked = [*words, "--quant", "fp8", "--device", "cpu", "--no-check", "--json"]
    report = json.loads(run_warm([*unchecked, "--output", tmp_path / "unchecked"]).stdout)
    assert (report["positions"], report["rounded"], report["base"]) == (0, None, None)
    assert holds(done.stdout.splitlines()[-1], tmp_path / "fp8")
    done = run_warm([*words, "--output", tmp_path / "bf16", "--json"])
    assert json.loads(done.stdout)["dtype"] == "bf16"
    done = run_warm([*words, "--adapter", "--output", tmp_path / "lora"])
    command = f"--max-lora-rank 8 --lora-modules lora={tmp_path / 'lora'}"
    template = run / "final" / "chat_template.jinja"
    assert f"{command} --chat-template {template}" in done.stdout
    for quant in ("nvfp4", "q8_0"):
        refused = run_warm([*words, "--quant", quant, "--output", tmp_path / "no"])
        assert refused.returncode == 2
        assert holds(refused.stderr, quant, "fp8")
    check_shown(refused.stderr, where="command line: --quant", fix=["bf16, fp8"])
