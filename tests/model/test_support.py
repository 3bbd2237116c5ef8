"""How a model trains, measured on its twin: one type of each class, and the measurement itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Llama4ForConditionalGeneration,
    PretrainedConfig,
)

from errors import check_shown, holds
from tunesmith.adapter import lora
from tunesmith.cli.main import main
from tunesmith.config.schema import Adapter, Model
from tunesmith.errors import ModelError, RecipeError
from tunesmith.model import support, tiny_model
from tunesmith.model.architectures import ARCHITECTURES
from tunesmith.model.decoder import find_layers
from tunesmith.model.model_types import read_model_types
from tunesmith.quant.linear_layers import linear_names, set_bypassed

# A type of each class; all of them: `make families`.
CLASSES = {
    "ministral3": "as it is",
    "deepseek_v3": "heads of two widths, groups of experts",
    "gpt_oss": "sinks and windows",
    "gemma3n_text": "shared keys, several streams",
    "stablelm": "attention that gets no keyword",
    "llama4_text": "chunks",
    "qwen3_5_text": "a delta rule",
    "lfm2": "short convolutions",
    "mamba": "a state alone",
    "falcon": "attention of its own",
    "axk2": "an indexer that pads differently",
    "muse_glimmer": "a text model that is trained in the class of the entire model",
    "trocr": "attention to an encoder",
    "dbrx": "experts that loop",
    "xlm": "tokens that see those after them, as its default config has them",
    "xlm-roberta-xl": "both directions",
}
COMPLETE = {
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 5e5, "clip_qkv": 8}},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
}


def config_of(model_type: str, **values: object) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **{**COMPLETE.get(model_type, {}), **values})


@pytest.mark.slow
@pytest.mark.parametrize("model_type", CLASSES)
def test_a_type_of_each_class_trains_as_the_table_says(model_type: str):
    row = read_model_types()[model_type].support
    measured = support.measure_support(config_of(model_type))
    assert measured.state == row.state
    assert measured.recurrent == row.recurrent
    assert measured.dead_targets == row.dead_targets
    if measured.state in ("packed", "padded"):
        assert measured.errors is not None
        # fp32, sums in another order: 7e-7 and 2e-5 are the largest of all types.
        assert measured.errors.logits <= 1e-5
        assert measured.errors.gradients <= 1e-4


def test_most_types_train():
    states = [row.support.state for row in read_model_types().values()]
    assert states.count("tuned") + states.count("packed") >= 110
    assert len(states) - states.count("refused") >= 130


def test_a_model_that_sees_what_it_is_to_predict_is_refused():
    """XLM makes its own mask, so packed rows and single documents were found alike."""
    measured = support.measure_support(config_of("xlm"))
    assert measured.state == "refused"
    assert "causal" in measured.why
    assert support.measure_support(config_of("xlm", causal=True)).state != "refused"


@pytest.mark.slow
def test_packed_rows_under_eager_attention_are_measured():
    """GPT-OSS makes its masks without the positions, and OPT too: documents would see each other,
    and nothing would say so.
    """
    assert support.measure_support(config_of("olmo3")).packs_eager
    assert not support.measure_support(config_of("gpt_oss")).packs_eager
    assert not support.measure_support(config_of("opt")).packs_eager
    assert not support.measure_support(config_of("lfm2")).packs_eager


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_a_type_of_the_table_packs_under_eager_attention(model_type: str):
    assert support.measure_support(config_of(model_type)).packs_eager
    assert support.TUNED_SUPPORT.packs_eager


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


def test_a_twin_sends_tokens_to_fewer_experts_than_it_has():
    """Gemma 4 has a key of its own for them."""
    config = config_of(
        "gemma4_text",
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    )
    small = tiny_model.shrink(config)
    assert small.top_k_experts < small.num_experts
    assert support.measure_support(config).state == "packed"


# A class of Transformers that has parts beside its text model: what its twin has to keep together.
@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("muse_glimmer", {}),  # a tower with a list by layer; logits that are scaled and capped
        ("voxtral", {}),  # a tower that hears
        ("fun_asr_nano", {}),  # an adaptor whose widths are the text model's
        ("mistral4", {}),  # in no list of text models; one part of a head is rotated
    ],
)
def test_a_twin_is_built_of_a_model_with_other_parts(model_type: str, values: dict[str, object]):
    measured = support.measure_support(config_of(model_type, **values))
    assert measured.state in ("packed", "padded"), measured.why


def test_a_model_whose_checkpoints_cannot_be_read_is_refused():
    """One stored stack holds ERNIE's experts of texts and those of pictures."""
    # Two of the three axes of positions must be alike, in its twin too.
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [22, 22, 20]}
    config = config_of("ernie4_5_vl_moe", text_config={"rope_parameters": rotary})
    measured = support.measure_support(config)
    assert measured.state == "refused"
    assert holds(measured.why, "ErnieFuseAndSplitTextVisionExperts")


def test_layers_are_those_of_the_text_model():
    """Phi-4's towers may have as many layers, which are larger in its twin."""
    small = tiny_model.build_tiny_model(config_of("phi4_multimodal"))
    assert find_layers(small) == "model.layers"


def test_a_fault_of_the_entire_class_keeps_no_text_model_from_training(
    monkeypatch: pytest.MonkeyPatch,
):
    """Llama 4 of Transformers 5.24 fails on texts without pictures behind its text model."""

    def forward(*arguments: object, **options: object) -> None:
        raise AttributeError("image_outputs")

    monkeypatch.setattr(Llama4ForConditionalGeneration, "forward", forward)
    assert support.measure_own_class(config_of("llama4")).state == "packed"


def test_a_text_model_inside_another_part_is_refused():
    with pytest.raises(ModelError) as caught:
        tiny_model.build_tiny_model(config_of("qwen2_5_omni"))
    assert holds(caught.value.what, "qwen2_5_omni")


def test_a_model_that_takes_no_text_alone_is_named_with_what_it_needs():
    measured = support.measure_support(config_of("blip-2"))
    assert measured.state == "refused"
    assert holds(measured.why, "pixel_values")


def test_masked_logits_are_refused():
    """Chameleon gives no text the tokens of pictures: a loss over all of them would be another."""
    vocabulary = {"<image>": 8711, "IMGIMGBZ": 4}
    measured = support.measure_support(config_of("chameleon", vocabulary_map=vocabulary))
    assert measured.state == "refused"
    assert holds(measured.why, "logits")


def test_a_twin_that_does_not_shrink_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiny_model, "MAX_TINY_PARAMETERS", 1000)
    with pytest.raises(ModelError) as caught:
        support.measure_support(config_of("mixtral"))
    assert "parameters" in caught.value.why


def test_what_was_measured_is_read_from_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    config = config_of("mamba")
    first = support.find_support(config, Model(name="x"), where="here")
    [file] = (tmp_path / "support").iterdir()
    monkeypatch.setattr(support, "measure_support", lambda *_, **__: support.TUNED_SUPPORT)
    assert support.find_support(config, Model(name="x"), where="here") == first
    file.write_text("{")
    assert support.find_support(config, Model(name="x"), where="here") == support.TUNED_SUPPORT


def test_a_refused_model_is_named_with_its_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        support.find_support(config_of("axk2"), Model(name="x"), where="some/config.json")
    assert len(re.findall(r"\de[+-]\d\d", caught.value.why)) >= 2, "of logits and of gradients"
    assert caught.value.where == "some/config.json"
    assert "tunesmith models" in caught.value.fix


def test_a_weight_that_a_fused_kernel_takes_has_no_adapter():
    """The kernel of Mamba 2, which is not installed here, multiplies with `out_proj` itself; PEFT
    refuses an adapter on it.
    """
    assert support.measure_support(config_of("mamba2")).dead_targets == ("mixer.out_proj",)


def tiny_mamba() -> torch.nn.Module:
    model = AutoModelForCausalLM.from_config(tiny_model.shrink(config_of("mamba")))
    set_bypassed(model, ("mixer.dt_proj",))
    return model


def test_a_target_that_gets_no_gradient_is_left_out_or_refused():
    model = tiny_mamba()
    names = lora.attach_lora(model, Adapter(rank=2), seed=0)
    assert names
    assert not [name for name in names if "dt_proj" in name]
    assert "dt_proj" in lora.find_unreached(model).bypassed
    with pytest.raises(RecipeError) as caught:
        lora.attach_lora(tiny_mamba(), Adapter(rank=2, target=("dt_proj",)), seed=0)
    assert caught.value.where == "adapter.target"
    assert holds(caught.value.what, "'dt_proj'")


def test_a_linear_layer_in_other_words_takes_an_adapter():
    model = AutoModelForCausalLM.from_config(tiny_model.shrink(config_of("falcon")))
    names = lora.attach_lora(model, Adapter(rank=2), seed=0)
    assert {name.rpartition(".")[2] for name in names} == {
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
    }


def test_a_model_without_linear_layers_takes_no_adapter():
    model = AutoModelForCausalLM.from_config(tiny_model.shrink(config_of("gpt2", n_head=4)))
    with pytest.raises(RecipeError) as caught:
        lora.attach_lora(model, Adapter(rank=2), seed=0)
    assert caught.value.where == "adapter.target"
    assert "adapter.kind=none" in caught.value.fix


def test_a_router_that_derives_from_a_linear_layer_takes_no_adapter():
    model = AutoModelForCausalLM.from_config(tiny_model.shrink(config_of("llama4_text")))
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
    assert rows["llama"]["state"] == "tuned"
    assert rows["falcon"]["state"] == "padded"
    assert rows["llava"]["text"] == "llama"
    assert not rows["llava"]["entire"]
    assert rows["qwen3_vl"]["entire"]
    assert rows["qwen3_vl"]["pictures"] == "packed"
    assert rows["llama4"]["pictures"] == "refused"
    assert "pixel_values" in rows["blip"]["why"]
    folder = tmp_path / "model"
    tiny_model.shrink(config_of("mamba")).save_pretrained(folder)
    assert main(["models", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "MambaMixer" in printed
    assert "dt_proj" in printed
    assert main(["models", "demo"]) == 0
    assert "llama" in capsys.readouterr().out.split()
    assert main(["models", "lama"]) == 2
    check_shown(capsys.readouterr().err, fix=["llama"])
