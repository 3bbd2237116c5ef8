"""What vLLM takes of a run: a folder, or an adapter; what it would compute otherwise is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import vision_models
from errors import check_shown, refuses
from invoke import invoke
from tunesmith.adapter import lora, peft_files
from tunesmith.config.schema import Adapter, Model
from tunesmith.errors import ModelError, UsageError
from tunesmith.model import load
from tunesmith.model.tiny_model import build_tiny_model
from tunesmith.tools.export import vllm_adapter
from tunesmith.tools.export.vllm_adapter import export_peft

ADAPTER = Adapter(rank=3, alpha=6, target=("experts",))


def make_base(model_type: str, folder: Path) -> Path:
    base = folder / "base"
    build_tiny_model(AutoConfig.for_model(model_type)).save_pretrained(base)
    words = models.WordLevel({f"t{i}": i for i in range(60)}, unk_token="t0")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), eos_token="t1", pad_token="t2"
    )
    tokenizer.save_pretrained(base)
    tokenizer.save_pretrained(folder / "adapter")
    return base


def make_adapter(
    model_type: str, folder: Path, adapter: Adapter = ADAPTER
) -> tuple[PreTrainedModel, Path]:
    """A model with drawn factors, and the adapter that is written of it."""
    base = make_base(model_type, folder)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    lora.attach_lora(model, adapter, seed=0)
    torch.manual_seed(2)
    for _, layer in lora.low_ranks(model):
        nn.init.normal_(layer.lora_A, std=0.1)
        nn.init.normal_(layer.lora_B, std=0.1)
    files = peft_files.adapter_files(model, adapter, str(base), None)
    peft_files.write_adapter(folder / "adapter", *files)
    return model, folder / "adapter"


@pytest.mark.slow
def test_gpt_oss_is_read_as_peft_writes_it(tmp_path: Path) -> None:
    _, folder = make_adapter("gpt_oss", tmp_path)
    export_peft(folder, tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.slow
def test_qwen3_5_is_read_stacked_beside_its_vision_tower(tiny: Path, tmp_path: Path) -> None:
    """`is_3d_moe_weight` is set on Qwen3_5MoeForConditionalGeneration."""
    base = vision_models.build("qwen3_5_moe", tmp_path / "base", tiny)
    spec = Model(name=str(base), dtype="fp32")
    config, whole = load.load_configs(base, spec)
    model = load.build_on_meta(config, spec, full_config=whole)
    load.materialize(model, torch.device("cpu"))
    lora.attach_lora(model, ADAPTER, seed=0)
    (tmp_path / "adapter").mkdir()
    files = peft_files.adapter_files(model, ADAPTER, str(base), None)
    peft_files.write_adapter(tmp_path / "adapter", *files)
    for file in base.glob("tokenizer*"):
        (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    export_peft(tmp_path / "adapter", tmp_path / "out")
    names = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    expected = "model.language_model.layers.0.mlp.experts.base_layer.lora_A.weight"
    assert f"base_model.model.{expected}" in names


REFUSED: dict[str, tuple[str, Adapter, list[str]]] = {
    "read one by one": ("mixtral", ADAPTER, ["mixtral"]),
    "without the vision tower": ("qwen3_5_moe_text", ADAPTER, ["qwen3_5_moe_text"]),
    "experts of a Llama 4": ("llama4_text", ADAPTER, ["llama4_text"]),
    "q of a Llama 4": ("llama4_text", Adapter(target=("q_proj",)), ["q_proj", "k_proj"]),
    "experts in full": (
        "qwen3_moe",
        Adapter(target=("q_proj",), modules_to_save=("experts",)),
        ["experts"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.slow
def test_what_vllm_would_compute_otherwise_is_refused(case: str, tmp_path: Path) -> None:
    model_type, adapter, names = REFUSED[case]
    _, folder = make_adapter(model_type, tmp_path, adapter)
    with refuses(ModelError, names=names):
        export_peft(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_adapter_for_vllm(trained: Path, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    needed = []
    monkeypatch.setattr(
        vllm_adapter, "require_disk_space", lambda goal, size, **_: needed.append(size)
    )
    assert export_peft(trained, tmp_path / "out") == 8
    written = ("adapter_config.json", "adapter_model.safetensors")
    assert needed == [sum((tmp_path / "out" / name).stat().st_size for name in written)]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "generation_config.json", *written}
    with refuses(UsageError, where="out", names=["--output"]):
        export_peft(trained, tmp_path / "out")
    with refuses(UsageError, where="--adapter", names=[tiny]):
        export_peft(tiny, tmp_path / "other")


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
    refused = invoke(*words, "--quant", "q8_0", "--output", tmp_path / "no")
    assert refused.code == 2
    check_shown(refused.err, where="command line: --quant", fix=["--quant bf16"])
