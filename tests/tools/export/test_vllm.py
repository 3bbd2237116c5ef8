"""What vLLM takes of a run: a folder, or an adapter; what it would compute otherwise is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from errors import check_shown, refuses
from export.tiny_gguf import word_tokenizer
from invoke import invoke
from tunesmith.adapter import lora, peft_files
from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError
from tunesmith.model.measuring.tiny_model import build_tiny_model
from tunesmith.tools.export.vllm_adapter import export_peft

ADAPTER = Adapter(rank=3, alpha=6, target=("experts",))


def make_adapter(model_type: str, folder: Path, adapter: Adapter = ADAPTER) -> Path:
    """An adapter on a tiny model."""
    base = folder / "base"
    build_tiny_model(AutoConfig.for_model(model_type)).save_pretrained(base)
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(base)
    tokenizer.save_pretrained(folder / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    lora.attach_lora(model, adapter, seed=0)
    files = peft_files.adapter_files(model, adapter, str(base), None)
    peft_files.write_adapter(folder / "adapter", *files)
    return folder / "adapter"


@pytest.mark.slow
def test_gpt_oss_is_read_as_peft_writes_it(tmp_path: Path) -> None:
    folder = make_adapter("gpt_oss", tmp_path)
    export_peft(folder, tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "adapter", "names"),
    [
        ("mixtral", ADAPTER, ["mixtral"]),  # experts are read one by one
        ("qwen3_5_moe_text", ADAPTER, ["qwen3_5_moe_text"]),  # without the vision tower
        ("llama4_text", Adapter(target=("q_proj",)), ["q_proj", "k_proj"]),
        ("qwen3_moe", Adapter(target=("q_proj",), modules_to_save=("experts",)), ["experts"]),
    ],
)
def test_what_vllm_would_compute_otherwise_is_refused(model_type, adapter, names, tmp_path):
    folder = make_adapter(model_type, tmp_path, adapter)
    with refuses(ModelError, names=names):
        export_peft(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command(trained: Path, tmp_path: Path) -> None:
    words = ["export", trained, "--to", "vllm"]
    done = invoke(*words, "--quant", "bf16", "--output", tmp_path / "bf16", "--json")
    assert json.loads(done.out)["dtype"] == "bf16"
    done = invoke(*words, "--output", tmp_path / "folder")
    assert f"next: vllm serve {tmp_path / 'folder'}" in done.out
    done = invoke(*words, "--adapter", "--output", tmp_path / "lora")
    command = f"--max-lora-rank 8 --lora-modules lora={tmp_path / 'lora'}"
    template = trained / "final" / "chat_template.jinja"
    assert f"{command} --chat-template {template}" in done.out
    names = {path.name for path in (tmp_path / "lora").iterdir()}
    written = {"adapter_config.json", "adapter_model.safetensors"}
    assert names == {"README.md", "generation_config.json", *written}
    refused = invoke(*words, "--quant", "q8_0", "--output", tmp_path / "no")
    assert refused.code == 2
    check_shown(refused.err, where="command line: --quant", fix=["--quant bf16"])
