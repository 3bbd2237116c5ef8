"""How a type of model trains, measured on its twin."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from errors import check_shown, holds, refuses
from invoke import invoke
from tunesmith.adapter import lora
from tunesmith.config.schema import Adapter, Model
from tunesmith.errors import ModelError, RecipeError
from tunesmith.model.known.architectures import ARCHITECTURES
from tunesmith.model.known.model_types import read_model_types
from tunesmith.model.measuring import support, tiny_model
from tunesmith.quant.linear_layers import set_bypassed


def twin(model_type: str, **values: object) -> torch.nn.Module:
    config = tiny_model.shrink(config_of(model_type, **values))
    return AutoModelForCausalLM.from_config(config)


# A type of each class, and whether it runs in `make test`; all of them: `make families`.
CLASSES = {
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
    "xlm": True,  # tokens that see those after them, as its default config has them
    "xlm-roberta-xl": False,  # both directions
    **dict.fromkeys(ARCHITECTURES, False),
    "llama": True,
}
LFM2 = {"layer_types": ["conv", "full_attention"] * 16}


def config_of(model_type: str, **values: object) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **(LFM2 if model_type == "lfm2" else values))


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


# Models that cannot be trained, and what their refusal names.
REFUSED = {
    # It makes its own mask, so packed rows and single documents are alike.
    "xlm": ({}, "causal"),
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


@pytest.mark.slow
def test_a_layer_whose_leak_is_not_named_is_not_packed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(support, "find_recurrent", lambda *_: ())
    measured = support.measure_support(config_of("qwen3_5_text"))
    assert measured.state == "padded"
    assert re.search(r"\de[+-]\d\d", measured.why), "by how much gradients differ"


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


def test_linear_layers_in_other_words_take_adapters():
    falcon, gpt2 = map(tiny_model.build_tiny_model, map(config_of, ("falcon", "gpt2")))
    names = lora.attach_lora(falcon, Adapter(rank=2), seed=0)
    found = {name.rpartition(".")[2] for name in names}
    assert found == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    with refuses(RecipeError, where="adapter.target", fix=["adapter.kind=none"]):
        lora.attach_lora(gpt2, Adapter(rank=2), seed=0)


@pytest.mark.slow
def test_models_lists_types_and_measures_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    rows = {row["model_type"]: row for row in json.loads(invoke("models", "--json").out)}
    assert (rows["llama"]["state"], rows["falcon"]["state"]) == ("tuned", "padded")
    assert rows["llava"]["text"] == "llama"
    assert (rows["qwen3_vl"]["pictures"], rows["llama4"]["pictures"]) == ("packed", "refused")
    writers = {"llama": "own", "gemma3": "own", "qwen3_moe": "converter", "olmoe": "untried"}
    writers |= {"bailing_hybrid": "", "axk2": ""}
    assert {name: rows[name]["gguf"] for name in writers} == writers
    folder = tmp_path / "model"
    tiny_model.shrink(config_of("mamba")).save_pretrained(folder)
    assert holds(invoke("models", str(folder)).out, "MambaMixer", "mixer.dt_proj")
    check_shown(invoke("models", "lama").err, fix=["llama"])


def test_a_target_that_gets_no_gradient_is_left_out_or_refused():
    model = twin("mamba")
    set_bypassed(model, ("mixer.dt_proj",))
    with refuses(RecipeError, where="adapter.target", names=["'dt_proj'"]):
        lora.attach_lora(model, Adapter(rank=2, target=("dt_proj",)), seed=0)
    names = lora.attach_lora(model, Adapter(rank=2), seed=0)
    assert names
    assert not [name for name in names if "dt_proj" in name]
    assert "dt_proj" in lora.find_unreached(model).bypassed
