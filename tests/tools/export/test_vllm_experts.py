"""Adapters of experts in the form that vLLM reads for a family, and that form read here.

What vLLM does with names is written down here from the source of its release 0.33.0:
`parse_fine_tuned_lora_name` of lora/utils.py takes off "base_model.model." and the factor;
`process_packed_modules_mapping` there looks, under the module that has all experts, for the names
that the model's `get_expert_mapping` says, as (w1, w2, w3) = (gate, down, up); `pack_moe` of
lora/lora_weights.py stacks them. A name that is not among these is not read.
"""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import vision_models
from errors import refuses
from tunesmith.adapter import lora, peft_files
from tunesmith.adapter.expert_lora import expert_updates
from tunesmith.config.schema import Adapter, Model
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.model import load
from tunesmith.model.twin import build_twin
from tunesmith.model.weights import StoredTensor
from tunesmith.tools.export.vllm_adapter import export_peft

GATED = ("gate_proj", "down_proj", "up_proj")
MIXTRAL = ("w1", "w2", "w3")
OPTIONS: dict[str, dict] = {
    "gemma4_text": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2,
                    "moe_intermediate_size": 24},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 12, "num_hidden_layers": 24},
}  # fmt: skip
# The module with all experts in a layer of vLLM's class, and the class's names of projections.
READ_BY_VLLM: dict[str, tuple[str, tuple[str, str, str | None]]] = {
    "qwen3_moe": ("mlp.experts", GATED),
    "mixtral": ("block_sparse_moe.experts", MIXTRAL),
    "nemotron_h": ("mixer.experts", ("up_proj", "down_proj", None)),
    "gemma4_text": ("experts", GATED),
    "granitemoe": ("block_sparse_moe.experts", GATED),
    "minimax_m2": ("block_sparse_moe.experts", MIXTRAL),
    "lfm2_moe": ("feed_forward.experts", MIXTRAL),
    "glm4_moe_lite": ("mlp.experts", GATED),
    "jamba": ("feed_forward.experts", GATED),
}
ADAPTER = Adapter(rank=3, alpha=6, target=("experts",))


def make_base(model_type: str, folder: Path) -> Path:
    base = folder / "base"
    build_twin(AutoConfig.for_model(model_type, **OPTIONS.get(model_type, {}))).save_pretrained(
        base
    )
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


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 25).view(2, 11)).logits


def updates_in_vllm(file: Path, model_type: str, scaling: float) -> dict[str, Tensor]:
    """What vLLM adds to its stacks: the input stack [experts, out, in] under w13, the other w2."""
    path, names = READ_BY_VLLM[model_type]
    shards = {name: shard for name, shard in zip(names, ("w1", "w2", "w3"), strict=True) if name}
    factors: dict[tuple[str, str], dict[int, dict[str, Tensor]]] = {}
    for name, tensor in load_file(file).items():
        *module, factor, weight = name.removeprefix("base_model.model.").split(".")
        assert weight == "weight"
        *stack, expert, projection = module
        layer = ".".join(stack).removesuffix(f".{path}")
        assert ".".join(stack) == f"{layer}.{path}", name
        assert layer.rpartition(".")[0] == "model.layers", name
        of_expert = factors.setdefault((layer, shards[projection]), {})
        of_expert.setdefault(int(expert), {})[factor] = tensor
    stacked = {}
    for (layer, shard), experts in factors.items():
        products = [experts[e]["lora_B"] @ experts[e]["lora_A"] for e in range(len(experts))]
        stacked[layer, shard] = scaling * torch.stack(products)
    updates = {}
    for layer, shard in stacked:
        if shard == "w1":
            halves = [stacked[layer, s] for s in ("w1", "w3") if (layer, s) in stacked]
            updates[f"{layer} w13"] = torch.cat(halves, dim=1)
            updates[f"{layer} w2"] = stacked[layer, "w2"]
    return updates


QUICK = ("qwen3_moe", "mixtral", "nemotron_h")
FAMILIES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in READ_BY_VLLM
]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_vllm_reads_the_experts_one_by_one(model_type: str, tmp_path: Path) -> None:
    model, adapter = make_adapter(model_type, tmp_path)
    assert export_peft(adapter, tmp_path / "out") == 8
    file = tmp_path / "out" / "adapter_model.safetensors"
    read = updates_in_vllm(file, model_type, scaling=2.0)
    expected = {}
    for name, update in expert_updates(model):
        layer = ".".join(name.split(".")[:3])
        shard = "w2" if name.endswith("down_proj") else "w13"
        expected[f"{layer} {shard}"] = update.update()
    assert read.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(read[name], update, rtol=1e-6, atol=1e-7)


def test_experts_one_by_one_are_not_read_back(tmp_path: Path) -> None:
    _, folder = make_adapter("mixtral", tmp_path)
    export_peft(folder, tmp_path / "out")
    with refuses(
        ModelError,
        where="adapter_model.safetensors",
        names=["model.layers.0.block_sparse_moe.experts.0.w1.lora_A.weight"],
    ):
        peft_files.read_adapter(tmp_path / "out")


def test_linear_layers_of_the_names_of_projections_stay_targets(tmp_path: Path) -> None:
    """DeepSeek's shared experts have a gate_proj, too."""
    adapter = Adapter(rank=2, target=("experts", "gate_proj"))
    _, folder = make_adapter("deepseek_v3", tmp_path, adapter)
    export_peft(folder, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    assert "target_parameters" not in settings


def test_gpt_oss_is_read_as_peft_writes_it(tmp_path: Path) -> None:
    _, folder = make_adapter("gpt_oss", tmp_path)
    export_peft(folder, tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("is_whole", [True, False])
def test_qwen3_5_is_read_stacked_beside_its_vision_tower_alone(
    is_whole: bool, tiny: Path, tmp_path: Path
) -> None:
    """`is_3d_moe_weight` is set on Qwen3_5MoeForConditionalGeneration."""
    if is_whole:
        base = vision_models.build("qwen3_5_moe", tmp_path / "base", tiny)
        spec = Model(name=str(base), dtype="fp32")
        config, whole = load.load_configs(base, spec)
        model = load.build_on_meta(config, spec, whole=whole)
        load.materialize(model, torch.device("cpu"))
        lora.attach_lora(model, ADAPTER, seed=0)
        (tmp_path / "adapter").mkdir()
        files = peft_files.adapter_files(model, ADAPTER, str(base), None)
        peft_files.write_adapter(tmp_path / "adapter", *files)
        for file in base.glob("tokenizer*"):
            (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    else:
        make_adapter("qwen3_5_moe_text", tmp_path)
    export_peft(tmp_path / "adapter", tmp_path / "out")
    names = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    expected = "model.layers.0.mlp.experts.0.gate_proj.lora_A.weight"
    if is_whole:
        expected = "model.language_model.layers.0.mlp.experts.base_layer.lora_A.weight"
    assert f"base_model.model.{expected}" in names


def test_the_stacks_of_one_layer_are_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = make_adapter("qwen3_moe", tmp_path)
    read = StoredTensor.read
    results: list[weakref.ref[Tensor]] = []
    alive = []

    def watched(stored: StoredTensor) -> Tensor:
        alive.append(sum(result() is not None for result in results))
        values = read(stored)
        results.append(weakref.ref(values))
        return values

    monkeypatch.setattr(StoredTensor, "read", watched)
    export_peft(folder, tmp_path / "out")
    assert len(alive) > 4
    assert max(alive) <= 4
    assert len(alive) == len(load_file(folder / "adapter_model.safetensors")), "each is read once"


REFUSED: dict[str, tuple[str, Adapter, str]] = {
    "no LoRA at all": ("mimo_v2_flash", ADAPTER, "vLLM does not support LoRA for mimo_v2_flash"),
    "an unknown format": ("phimoe", ADAPTER, "the format in which vLLM reads those of a phimoe"),
    "experts of a Llama 4": ("llama4_text", ADAPTER, "experts of a Llama 4"),
    "q of a Llama 4": ("llama4_text", Adapter(target=("q_proj",)), "q_proj or k_proj of a Llama 4"),
    "experts in full": (
        "qwen3_moe",
        Adapter(target=("q_proj",), modules_to_save=("experts",)),
        "fully trained modules: experts",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_would_compute_otherwise_is_refused(case: str, tmp_path: Path) -> None:
    model_type, adapter, what = REFUSED[case]
    _, folder = make_adapter(model_type, tmp_path, adapter)
    with pytest.raises(TunesmithError, match=what):
        export_peft(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
