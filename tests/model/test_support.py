"""How a type of model trains, measured on its twin."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Llama4ForConditionalGeneration,
    PretrainedConfig,
)

from errors import check_shown, holds, refuses
from tunesmith.adapter import lora
from tunesmith.cli.main import main
from tunesmith.config.schema import Adapter, Model
from tunesmith.errors import ModelError, RecipeError
from tunesmith.model import support, tiny_model
from tunesmith.model.architectures import ARCHITECTURES
from tunesmith.model.model_types import read_model_types
from tunesmith.quant.linear_layers import linear_names, set_bypassed

# A type of each class, and whether it runs in `make test`; all of them: `make families`.
CLASSES = {
    "ministral3": False,  # as it is
    "deepseek_v3": False,  # heads of two widths, groups of experts
    "gpt_oss": True,  # sinks and windows
    "gemma3n_text": False,  # shared keys, several streams
    "stablelm": False,  # attention that gets no keyword
    "llama4_text": True,  # chunks
    "qwen3_5_text": True,  # a delta rule
    "lfm2": True,  # short convolutions
    "mamba": True,  # a state alone
    "mamba2": False,  # a fused kernel that multiplies with a weight itself
    "falcon": False,  # attention of its own
    "axk2": True,  # an indexer that pads differently
    "muse_glimmer": False,  # trained in the class of the entire model
    "voxtral": True,  # a tower that hears
    "fun_asr_nano": False,  # an adaptor whose widths are the text model's
    "mistral4": True,  # one part of a head is rotated
    "trocr": False,  # attention to an encoder
    "dbrx": False,  # experts that loop
    "xlm": True,  # tokens that see those after them, as its default config has them
    "xlm-roberta-xl": False,  # both directions
    **dict.fromkeys(ARCHITECTURES, False),
    "llama": True,
}
COMPLETE = {
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 5e5, "clip_qkv": 8}},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
}


def config_of(model_type: str, **values: object) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **{**COMPLETE.get(model_type, {}), **values})


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=pytest.mark.slow if tested else pytest.mark.nightly)
        for name, tested in CLASSES.items()
    ],
)
def test_a_type_trains_as_the_table_says(model_type: str):
    row = read_model_types()[model_type].support
    measured = support.measure_support(config_of(model_type))
    assert measured.state == ("packed" if row.state == "tuned" else row.state)
    assert measured.recurrent == row.recurrent
    assert measured.dead_targets == row.dead_targets
    # GPT-OSS makes its masks without the positions: eager documents would see each other.
    assert measured.packs_eager or model_type not in ARCHITECTURES
    assert not (measured.packs_eager and model_type in ("gpt_oss", "lfm2"))
    if measured.state in ("packed", "padded"):
        assert measured.errors is not None
        # fp32, sums in another order: 7e-7 and 2e-5 are the largest of all types.
        assert measured.errors.logits <= 1e-5
        assert measured.errors.gradients <= 1e-4


# Two of the three axes of positions must be alike, in its twin too.
ERNIE_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [22, 22, 20]}
# Models that cannot be trained, and what their refusal names.
REFUSED = {
    # It makes its own mask, so packed rows and single documents are alike.
    "xlm": ({}, "causal"),
    # One stored stack holds its experts of texts and those of pictures.
    "ernie4_5_vl_moe": (
        {"text_config": {"rope_parameters": ERNIE_ROPE}}, "ErnieFuseAndSplitTextVisionExperts"
    ),
    "blip-2": ({}, "pixel_values"),
    # It gives no text the tokens of pictures: a loss over all of them would be another.
    "chameleon": ({"vocabulary_map": {"<image>": 8711, "IMGIMGBZ": 4}}, "logits"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_trained_is_refused(model_type: str):
    values, named = REFUSED[model_type]
    measured = support.measure_support(config_of(model_type, **values))
    assert measured.state == "refused"
    assert holds(measured.why, named)


def test_twins_that_cannot_be_built_are_refused(monkeypatch: pytest.MonkeyPatch):
    with refuses(ModelError, names=["qwen2_5_omni"]):
        tiny_model.build_tiny_model(config_of("qwen2_5_omni"))
    monkeypatch.setattr(tiny_model, "MAX_TINY_PARAMETERS", 1000)
    with refuses(ModelError, names=["parameters"]):
        support.measure_support(config_of("mixtral"))


def test_most_types_train():
    states = [row.support.state for row in read_model_types().values()]
    assert states.count("tuned") + states.count("packed") >= 110
    assert len(states) - states.count("refused") >= 130


@pytest.mark.slow
def test_a_layer_whose_leak_is_not_named_is_not_packed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(support, "find_recurrent", lambda *_: ())
    measured = support.measure_support(config_of("qwen3_5_text"))
    assert measured.state == "padded"
    assert re.search(r"\de[+-]\d\d", measured.why), "by how much gradients differ"


def test_a_twin_has_each_kind_of_layer_once_and_windows_shorter_than_documents():
    config = config_of("gemma4_text")
    small = tiny_model.shrink(config)
    assert sorted(set(small.layer_types)) == ["full_attention", "sliding_attention"]
    assert small.sliding_window < min(support.DOCUMENT_LENGTHS)
    assert small.num_hidden_layers < config.num_hidden_layers
    assert small.get_text_config().per_layer_config["full_attention"].head_dim == 32


@pytest.mark.slow
def test_a_twin_sends_tokens_to_fewer_experts_than_it_has():
    """Gemma 4 has a key of its own for them."""
    mixture = {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
    config = config_of("gemma4_text", enable_moe_block=True, **mixture)
    small = tiny_model.shrink(config)
    assert small.top_k_experts < small.num_experts
    assert support.measure_support(config).state == "packed"


@pytest.mark.slow
def test_a_fault_of_the_entire_class_keeps_no_text_model_from_training(
    monkeypatch: pytest.MonkeyPatch,
):
    """Llama 4 of Transformers 5.24 fails on texts without pictures behind its text model."""

    def forward(*arguments: object, **options: object) -> None:
        raise AttributeError("image_outputs")

    monkeypatch.setattr(Llama4ForConditionalGeneration, "forward", forward)
    assert support.measure_own_class(config_of("llama4")).state == "packed"


@pytest.mark.slow
def test_what_was_measured_is_read_from_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    config = config_of("mamba")
    first = support.find_support(config, Model(name="x"), where="here")
    [file] = (tmp_path / "support").iterdir()
    monkeypatch.setattr(support, "measure_support", lambda *_, **__: support.TUNED_SUPPORT)
    assert support.find_support(config, Model(name="x"), where="here") == first
    file.write_text("{")
    assert support.find_support(config, Model(name="x"), where="here") == support.TUNED_SUPPORT
    refused = replace(first, state="refused", why="gradients differ by 1e-02")
    monkeypatch.setattr(support, "measure_support", lambda *_, **__: refused)
    with refuses(ModelError, where="some/config.json", fix=["tunesmith models"]) as caught:
        support.find_support(config_of("axk2"), Model(name="x"), where="some/config.json")
    assert holds(caught.value.why, "1e-02")


def twin(model_type: str, **values: object) -> torch.nn.Module:
    config = tiny_model.shrink(config_of(model_type, **values))
    return AutoModelForCausalLM.from_config(config)


def test_a_target_that_gets_no_gradient_is_left_out_or_refused():
    model = twin("mamba")
    set_bypassed(model, ("mixer.dt_proj",))
    with refuses(RecipeError, where="adapter.target", names=["'dt_proj'"]):
        lora.attach_lora(model, Adapter(rank=2, target=("dt_proj",)), seed=0)
    names = lora.attach_lora(model, Adapter(rank=2), seed=0)
    assert names
    assert not [name for name in names if "dt_proj" in name]
    assert "dt_proj" in lora.find_unreached(model).bypassed


def test_linear_layers_in_other_words_take_adapters():
    names = lora.attach_lora(twin("falcon"), Adapter(rank=2), seed=0)
    found = {name.rpartition(".")[2] for name in names}
    assert found == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    with refuses(RecipeError, where="adapter.target", fix=["adapter.kind=none"]):
        lora.attach_lora(twin("gpt2", n_head=4), Adapter(rank=2), seed=0)


def test_a_router_that_derives_from_a_linear_layer_takes_no_adapter():
    model = twin("llama4_text")
    assert not [name for name in linear_names(model, head=True) if name.endswith("router")]
    lora.attach_lora(model, Adapter(rank=2), seed=0)
    left_out = lora.find_unreached(model)
    assert left_out.has_routers
    assert not any("experts" in name for name in (*left_out.matrices, *left_out.bypassed))


@pytest.mark.slow
def test_models_lists_types_and_measures_a_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    assert main(["models", "--json"]) == 0
    rows = {row["model_type"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["llama"]["state"], rows["falcon"]["state"]) == ("tuned", "padded")
    assert (rows["llava"]["text"], rows["llava"]["entire"]) == ("llama", False)
    assert (rows["qwen3_vl"]["entire"], rows["qwen3_vl"]["pictures"]) == (True, "packed")
    assert rows["llama4"]["pictures"] == "refused"
    folder = tmp_path / "model"
    tiny_model.shrink(config_of("mamba")).save_pretrained(folder)
    assert main(["models", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert holds(printed, "MambaMixer", "mixer.dt_proj")
    assert main(["models", "lama"]) == 2
    check_shown(capsys.readouterr().err, fix=["llama"])
