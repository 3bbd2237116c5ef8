"""Sizes counted on the meta model, beside published ones and beside the table's formulas."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from errors import refuses
from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError
from tunesmith.model import measured_spec, meta_forward, spec, text_config, tiny_model
from tunesmith.model.count_layers import count_layers
from tunesmith.model.decoder import find_layers
from tunesmith.model.measure_on_meta import build_to_measure
from tunesmith.model.measured_spec import measure_spec, model_spec
from tunesmith.planning import measured_layers
from tunesmith.planning.measured_layers import measure_activations

from . import families

# config.json of Qwen/Qwen3-30B-A3B; Transformers' defaults of `mixtral` are those of Mixtral-8x7B.
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
GPT_OSS_20B = {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "total", "active", "counts_embedding"),
    [
        # Model cards: 30.5B, 3.3B activated ("Qwen3 Technical Report", arXiv:2505.09388, table 2).
        (QWEN3_30B_A3B, 30.5, 3.3, True),
        # "gpt-oss-120b & gpt-oss-20b Model Card", arXiv:2508.10925, table 1: 20.91B, 3.61B active.
        # Its active parameters leave the embedding out, but not the head.
        (GPT_OSS_20B, 20.91, 3.61, False),
        # "Mixtral of Experts", arXiv:2401.04088: 47B, 13B; 46.7B and 12.9B in the announcement.
        pytest.param({"model_type": "mixtral"}, 46.7, 12.9, True, marks=pytest.mark.nightly),
    ],
    ids=["qwen3-30b-a3b", "gpt-oss-20b", "mixtral"],
)
def test_published_sizes(config: dict, total: float, active: float, counts_embedding: bool) -> None:
    """1 % of what is published; 2 % where that has two digits: Qwen's 3.3 are 3.35 by hand too."""
    found = measure_spec(config, where="test")
    tables = 2 if counts_embedding else 1
    counted = found.active + tables * found.head_matmul
    assert found.parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert counted / 1e9 == pytest.approx(active, rel=0.02 if active == 3.3 else 0.01)


@pytest.mark.slow
def test_experts_that_loop_over_those_that_are_chosen_are_measured() -> None:
    """By hand, of LongCat: what every token is multiplied with, and what one expert takes of it.

    Transformers allots `gate_up_proj` for the experts without weights too, and `down_proj` not.
    """
    config = tiny_model.shrink(AutoConfig.for_model("longcat_flash", moe_topk=2))
    found = measure_spec(config.to_dict(), where="test")
    layer = found.layers[0]
    # Two attentions of 4 heads: each has its own keys.
    assert (layer.heads, layer.kv_heads) == (8, 8)
    hidden, width, experts = config.hidden_size, config.expert_ffn_hidden_size, 4
    everyone = experts + config.zero_expert_num
    gate_up, down = everyone * 2 * width * hidden, experts * hidden * width
    assert layer.experts == gate_up + down
    assert layer.active == layer.matmul + 2 * gate_up // everyone + 2 * down // everyone
    per_token = measure_activations(found, Adapter(), "fp32")
    # Of two experts: their input, gate and up, what the activation makes of them, and the output.
    assert per_token.by_token[0] >= 2 * 4 * (hidden + 3 * width + hidden)


def test_a_layer_of_several_sublayers_is_one():
    """LongCat's `num_hidden_layers` counts the two attentions of each layer."""
    model = tiny_model.build_tiny_model(AutoConfig.for_model("longcat_flash"))
    layers = model.get_submodule(find_layers(model))
    assert len(layers) == model.config.num_layers < model.config.num_hidden_layers


def test_an_infinite_number_is_read_as_transformers_writes_it():
    config = {"model_type": "mamba2", "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    assert text_config.read_configs(config, "test")[0].time_step_limit == [0.0, float("inf")]


@pytest.mark.parametrize("name", ["gemma2", "phi3", "qwen3"])
def test_measured_is_what_the_table_says(name: str) -> None:
    """But where attention is wider than the MLP, which the table does not count."""
    values = {**families.SMALL, **families.VARIANTS.get(name, {})}
    # It has no weights, and Phi 3's reads positions in Transformers 5.17: meta has none.
    values.pop("rope_parameters", None)
    config = AutoConfig.for_model(name, **values)
    table = spec.read_spec(config.to_dict(), where=name)
    model = build_to_measure(config)
    calls, _ = meta_forward.run_on_meta(model, 64)
    found = count_layers(model, calls, None)
    expected = replace(table, position_limit=None)
    assert replace(found, layers=()) == replace(expected, layers=())
    for measured, layer in zip(found.layers, table.layers, strict=True):
        attention = layer.heads * layer.head_dim
        widest = max(layer.intermediate, attention)
        assert measured == replace(layer, intermediate=widest, largest=measured.largest)


@pytest.mark.slow
def test_layers_differ_where_the_config_says_so() -> None:
    """Transformers' defaults of Gemma 4 (head_dim 256 in layers with a window, else 512), Qwen3.5
    (three of four layers are recurrent) and Llama 4 (chunks of 8,192 but in every fourth layer).
    """
    gemma = measure_spec({"model_type": "gemma4_text"}, where="test")
    assert {(layer.head_dim, layer.window) for layer in gemma.layers} == {(256, 512), (512, None)}
    # Of 5.08B parameters 2.62B are embeddings: one is the head, the others are lookups.
    assert gemma.parameters / 1e9 == pytest.approx(5.08, rel=0.01)
    assert (gemma.active + gemma.head_matmul) / 1e9 == pytest.approx(5.08 - 2.62 + 0.6, rel=0.01)
    assert gemma.head_dim == 512

    qwen = measure_spec({"model_type": "qwen3_5_text"}, where="test")
    assert [layer.mixing for layer in qwen.layers[:4]] == ["recurrent"] * 3 + ["attention"]
    assert qwen.layers[0].state == 32 * 128 * 128  # heads, channels of keys and of values
    assert qwen.layers[3].state == qwen.layers[0].heads == 0

    # A checkpoint with a vision part is its text model.
    outer = measure_spec({"model_type": "qwen3_5"}, where="test")
    assert outer.layers == qwen.layers

    llama = measure_spec({"model_type": "llama4_text"}, where="test")
    assert [layer.chunk for layer in llama.layers[:4]] == [8192, 8192, 8192, None]


@pytest.mark.nightly
def test_layers_that_another_stands_for_count_as_if_they_ran(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The last layers use the keys and values of others."""
    config = {"model_type": "gemma4_text", "num_hidden_layers": 15, "num_kv_shared_layers": 5}
    adapter = Adapter(kind="lora", rank=8)
    some = measure_spec(config, where="test")
    kept_of_some = measure_activations(some, adapter, "bf16")

    ran = []
    layer_form = meta_forward.layer_form

    def form_of_its_own(*words: object) -> object:
        ran.append(layer_form(*words))
        return object()

    monkeypatch.setattr(meta_forward, "layer_form", form_of_its_own)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "all layers"))
    measured_layers._measure.cache_clear()
    every = measure_spec(config, where="test")
    assert some == every
    assert kept_of_some == measure_activations(every, adapter, "bf16")
    # Else this shows nothing.
    assert len(set(ran)) <= len(ran) // 3


def test_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By sizes alone; a file that is cut off is measured again."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    config = {"model_type": "olmo3", **families.SMALL}
    first = measure_spec(config, where="test")
    [file] = (tmp_path / "specs").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(measured_spec, "_measure", lambda *args: pytest.fail("measured again"))
        assert measure_spec({**config, "eos_token_id": 5}, where="other") == first
    file.write_text(file.read_text()[:-9])
    assert measure_spec(config, where="test") == first
    assert json.loads(file.read_text())["parameters"] == first.parameters


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        ({"model_type": "no_such_type"}, ["no_such_type"]),
        ({"model_type": "olmo3", "num_attention_heads": 0}, ["olmo3"]),
        ({"model_type": "bert"}, ["bert"]),
        ({}, ["model_type"]),
        ("hrm_text", ["2 layers", "hrm_text"]),
        ("jetmoe", ["jetmoe"]),
    ],
)
def test_what_cannot_be_measured_is_refused(config: dict | str, facts: list[str]) -> None:
    if isinstance(config, str):
        config = tiny_model.shrink(AutoConfig.for_model(config)).to_dict()
    with refuses(ModelError, where="some/config.json", names=facts) as caught:
        model_spec(config, where="some/config.json")
    assert caught.value.fix


def test_flops_count_windows_chunks_states_and_the_experts_of_a_token() -> None:
    """By hand, for one layer of each kind and a document of 10 tokens."""
    layer = spec.Layer("attention", 2, 2, 4, 6, intermediate=8, matmul=100, active=130, largest=60)
    one = spec.ModelSpec(
        "x", (layer,), hidden=8, vocab=16, tied=False, context=99, position_limit=None,
        parameters=999, head_matmul=128, quantized=None, other_matmul=7,
    )  # fmt: skip

    def flops(**changes: object) -> float:
        layers = (replace(layer, **changes),)
        return spec.flops(replace(one, layers=layers), [10], 0, trained="full")

    products = 6 * (130 + 7) * 10
    pair = 6 * 2 * (4 + 6)
    assert flops() == products + 55 * pair
    assert flops(window=3) == products + (1 + 2 + 8 * 3) * pair
    assert flops(chunk=4) == products + (10 + 10 + 3) * pair
    assert flops(heads=0, state=5) == products + 18 * 5 * 10
