"""Facts from a config alone, beside the models that Transformers builds from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from errors import refuses
from tunesmith.adapter.lora import attach_lora, count_adapter_parameters
from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError, RecipeError
from tunesmith.model import spec
from tunesmith.model.measured_spec import model_spec
from tunesmith.model.shapes import SHAPES

from . import families

EIGHT_BIT = {"quant_method": "bitsandbytes", "load_in_8bit": True}
FP4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
# What config.json says, and a value of the error.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "bert"}, "encoder"),
    ({"model_type": "modernbert"}, "encoder"),
    ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
    ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "encoder"),
    ({"model_type": "brand_new"}, "config"),
    ({"architectures": ["LlamaForCausalLM"]}, "model_type"),
    ({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ({"model_type": "llama", "quantization_config": EIGHT_BIT}, "8-bit"),
    ({"model_type": "llama", "quantization_config": FP4}, "fp4"),
    ({"model_type": "llama", "hidden_size": "64"}, "hidden_size is '64'"),
    ({"model_type": "llama", "num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"model_type": "llama", "vocab_size": None}, "vocab_size is None"),
    ({"model_type": "llama", "num_key_value_heads": 3}, "share"),
]


@pytest.mark.parametrize(("values", "fact"), REFUSED)
def test_what_is_not_trained_is_refused(values: dict[str, Any], fact: str) -> None:
    with refuses(ModelError, where="some/config.json") as caught:
        spec.read_spec({**families.SMALL, **values}, where="some/config.json")
    assert fact in caught.value.text()
    assert caught.value.fix


@pytest.mark.parametrize("model_type", ["gemma3", "glm4v", "muse_glimmer"])
def test_a_config_without_its_text_model_is_refused(model_type: str) -> None:
    stated = {"model_type": model_type, "vision_config": {"hidden_size": 64}}
    with refuses(ModelError, where="config.json", names=["text_config"], fix=["tunesmith fetch"]):
        spec.check_supported(stated, "config.json")
    # Qwen2-VL's files on the Hub have the sizes at the top, DeepSeek-OCR 2's in another section.
    spec.check_supported({"model_type": "qwen2_vl", "vocab_size": 64, "vision_config": {}}, "x")
    spec.check_supported(
        {"model_type": "deepseek_ocr2", "language_config": {"vocab_size": 64}}, "x"
    )


ADAPTERS = [
    Adapter(),
    Adapter(rank=3, target=("o_proj", "down_proj"), modules_to_save=("embed_tokens",)),
    Adapter(rank=4, target=("o_proj", "lm_head")),
]


@pytest.mark.parametrize("family", families.VARIANTS)
def test_counts_are_those_of_the_built_model(family: str) -> None:
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(families.tiny_config(family))
    raw = json.loads(built.config.to_json_string(use_diff=True))
    found = spec.read_spec(built.config.to_dict(), where="config.json")
    assert spec.read_spec(raw, where="config.json") == found
    assert found.parameters == sum(p.numel() for p in built.parameters())
    layers = built.model.layers
    matrices = [m for m in layers[0].modules() if isinstance(m, nn.Linear)]
    assert found.layers[0].matmul == sum(m.weight.numel() for m in matrices)
    assert found.head_matmul == built.lm_head.weight.numel()
    assert found.tied == (built.lm_head.weight is built.model.embed_tokens.weight)
    assert found.head_dim == layers[0].self_attn.head_dim
    assert (found.depth, found.vocab) == (len(layers), 128)
    kinds = getattr(built.config, "layer_types", None)
    if kinds:
        windows = [layer.window is not None for layer in found.layers]
        assert windows == [kind == "sliding_attention" for kind in kinds]
    for adapter in ADAPTERS[: 3 if family == "llama" else 1]:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(built.config)
        attach_lora(model, adapter, seed=0)
        counted = count_adapter_parameters(model, adapter)
        assert spec.adapter_parameters(found, adapter) == counted > 0


def test_ranks_of_a_tensor_group_cut_b_of_columns_and_a_of_rows() -> None:
    """64 channels of 8 heads and 4 key-value heads, a width of 96, rank 8, 3 layers, 2 ranks."""
    whole = 64 * 5 + 64 + 64  # A of q, k, v, gate, up; B of o and down
    cut = (64 + 32 + 32 + 96 + 96) + (64 + 96)  # B of q, k, v, gate, up; A of o and down
    found = spec.read_spec(families.tiny_config("llama").to_dict(), where="")
    assert spec.adapter_parameters(found, Adapter(rank=8), 1) == 3 * 8 * (whole + cut)
    assert spec.adapter_parameters(found, Adapter(rank=8), 2) == 3 * 8 * (whole + cut // 2)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("gemma2", {"sliding_window": 8}),
        ("gemma3_text", {"sliding_window": 8, "num_hidden_layers": 14}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
def test_windows_without_layer_types_are_the_config_classes(
    kind: str, extra: dict[str, Any]
) -> None:
    theirs = AutoConfig.for_model(kind, **{**families.SMALL, **extra})
    expected = [8 if t == "sliding_attention" else None for t in theirs.layer_types]
    found = spec.read_spec({**families.SMALL, "model_type": kind, **extra}, where="config.json")
    assert [layer.window for layer in found.layers] == expected


# The counts of the models' own index files (total_size / 2 bytes); a tied head counted once.
PUBLISHED = {
    "llama3-8b": 8_030_261_248, "llama3-3b": 3_212_749_824, "llama3-70b": 70_553_706_496,
    "qwen3-8b": 8_190_735_360, "mistral-7b": 7_248_023_552,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    assert spec.read_spec(SHAPES[name].config, where=name).parameters == PUBLISHED[name]


def test_flops_agree_with_a_counter_that_watches_the_products() -> None:
    """torch's own counter sees 2 operations a product and all pairs of attention; we count the
    causal half.
    """
    shape = {**families.SMALL, "num_key_value_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="eager"))
    found = spec.read_spec({"model_type": "llama", **shape}, where="")
    length, batch = 64, 2
    ids = torch.randint(0, 128, (batch, length))
    counter = FlopCounterMode(display=False)
    with counter:
        model(ids).logits.float().sum().backward()
    everything = 12 * batch * length * length * 3 * 64
    causal = spec.flops(found, [length] * batch, batch * length, trained="full")
    attention = 12 * batch * (length * (length + 1) // 2) * 3 * 64
    # the counter also sees the rotary table's outer product (forward only): below a thousandth here
    assert counter.get_total_flops() == pytest.approx(causal - attention + everything, rel=1e-3)


def test_flops_of_parts() -> None:
    found = spec.read_spec({"model_type": "llama", **families.SMALL}, where="")
    matmul, pairs = found.layer_matrices, 12 * 3 * 64

    def flops(length: int, labels: int, trained: str = "full", **more: int) -> float:
        return spec.flops(found, [length], labels, trained=trained, **more)

    assert flops(1, 0) == 6 * matmul + pairs
    assert flops(1, 1) - flops(1, 0) == 6 * found.head_matmul
    assert flops(1, 0, "lora") == 4 * matmul + pairs
    assert flops(1, 0, "lora", adapter_parameters=10) == 4 * matmul + pairs + 60
    assert flops(20, 0) - 2 * flops(10, 0) == pairs * (210 - 2 * 55)


@pytest.mark.slow
def test_facts_and_forecasts_need_nothing_heavy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    config = {"model_type": "olmo3", **families.SMALL}
    model_spec(config, where="")  # measured once, then read from the disk
    script = f"""
import sys, tunesmith.model.spec, tunesmith.model.safetensors_files, tunesmith.cli.fetch
heavy = ("torch", "transformers", "datasets", "numpy", "huggingface_hub", "peft")
print([name for name in heavy if name in sys.modules])
from tunesmith.model.measured_spec import model_spec
assert model_spec({config}, where="")
assert model_spec({families.SMALL} | {{"model_type": "llama"}}, where="")
print([name for name in heavy if name in sys.modules and name != "numpy"])
import tunesmith.planning.forecast
print([name for name in ("transformers", "datasets", "peft") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert done.stdout.split() == [b"[]"] * 3


def rope(kind: str, key: str = "rope_scaling", **values: float) -> dict[str, Any]:
    return {key: {"rope_type": kind, **values}}


# What config.json says beside 512 positions, and how long documents may be.
LIMITS: list[tuple[dict[str, Any], int | None]] = [
    ({}, 512),
    ({"max_position_embeddings": None}, None),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 2048),
    (rope("dynamic", factor=2.0), 1024),
    (rope("yarn", factor=4.0, original_max_position_embeddings=512), 2048),
    (rope("yarn", "rope_parameters", factor=4.0, original_max_position_embeddings=128), 512),
    # Llama 3.2: what it was trained to is below the factor's reach.
    (rope("llama3", factor=32.0, original_max_position_embeddings=128), 512),
    (rope("llama3", factor=8.0, original_max_position_embeddings=512), 4096),
    ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 128}, 512),
    (rope("default", "rope_parameters", rope_theta=10000.0), 512),
    (
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "b": {}}},
        4096,
    ),
    ({"model_type": "mistral", "sliding_window": 64}, None),
    ({"model_type": "mistral", "sliding_window": 4096}, 512),
    ({"model_type": "mistral", "sliding_window": None}, 512),
]


@pytest.mark.parametrize(("changes", "limit"), LIMITS)
def test_the_positions_of_a_config_with_its_scaling(
    changes: dict[str, Any], limit: int | None
) -> None:
    stated = {"model_type": "llama", **families.SMALL, **changes}
    found = spec.read_spec(stated, where="config.json")
    assert found.position_limit == limit
    spec.check_seq_len(found, limit or 1 << 40, where="config.json")
    if limit is not None:
        fix = f"data.seq_len={limit}"
        with refuses(RecipeError, where="data.seq_len", names=[f"{limit:,}"], fix=[fix]):
            spec.check_seq_len(found, limit + 1, where="config.json")
