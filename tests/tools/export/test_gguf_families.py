"""The header and the rows of each family, a LoRA and a tokenizer; what llama.cpp would compute
otherwise is refused.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from errors import refuses
from export.tiny_gguf import (
    LINEAR,
    LLAMA3,
    TEMPLATE,
    YARN,
    byte_level,
    header_of,
    plan_of,
    random_model,
    rows_of,
    sentencepiece,
    structure_of,
    tensor_rows,
)
from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError
from tunesmith.tools.export.gguf import converted_adapter as module
from tunesmith.tools.export.gguf.adapter import AdapterTarget, plan_adapter
from tunesmith.tools.export.gguf.converted_adapter import plan_converted_adapter
from tunesmith.tools.export.gguf.converter import Converter
from tunesmith.tools.export.gguf.families import read_family
from tunesmith.tools.export.gguf.plan import GgufPlan, plan_gguf
from tunesmith.tools.export.gguf.tokenizer import (
    PRE_TOKENIZER_TABLE,
    TokenType,
    model_name,
    read_gguf_tokenizer,
)

TOKENIZER = byte_level(structure_of("gpt-2"))


@pytest.mark.parametrize(
    ("variant", "values"),
    [
        ("gemma3_text", {"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "attention.sliding_window": 16, "attention.key_length": 16}),
        ("granite", {"logit_scale": 4.0, "embedding_scale": 3.0, "residual_scale": 0.5, "attention.scale": 0.2}),
    ],
)  # fmt: skip
def test_the_header_has_the_config(variant: str, values: dict, tmp_path: Path) -> None:
    header = header_of(plan_of(random_model(variant), TOKENIZER), tmp_path)
    arch = header["general.architecture"]
    assert variant.startswith(arch)
    assert {key: header[f"{arch}.{key}"] for key in values} == pytest.approx(values)


@cache
def config_of(variant: str) -> dict:
    return random_model(variant).config.to_dict()


REFUSED = {
    "another family": ("llama", {"model_type": "qwen3_moe"}, "qwen3_moe"),
    "dynamic rope": ("llama", {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, "rope_type = dynamic"),
    "llama3 rope of qwen2": ("qwen2", {"rope_parameters": LLAMA3}, "rope_type = llama3"),
    "yarn of gemma": ("gemma2", {"rope_parameters": YARN}, "rope_type = yarn"),
    "a factor of yarn": ("llama", {"rope_parameters": {**YARN, "attention_factor": 2.0}}, "attention_factor = 2.0"),
    "a part of the head rotated": ("llama", {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    "other activation": ("llama", {"hidden_act": "gelu"}, "hidden_act = gelu"),
    "other layers without rope": ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1]}, "no_rope_layers"),
    "other windows": ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "layer_types"),
    "other scale": ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 64"),
    "no soft cap": ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping = None"),
    "a soft cap": ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
}  # fmt: skip


@pytest.mark.parametrize(("variant", "change", "what"), REFUSED.values(), ids=REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(variant, change, what: str) -> None:
    config = config_of(variant)
    read_family(config)
    with pytest.raises(ModelError, match=what) as error:
        read_family({**config, **change})
    assert error.value.fix


def test_a_weight_without_a_place_is_refused() -> None:
    for variant, name in (
        ("olmo2", "model.layers.0.self_attn.q_proj.bias"),
        ("gemma2", "lm_head.weight"),
    ):
        model = random_model(variant)
        weights = {**rows_of(model), name: tensor_rows(torch.zeros(128))}
        with refuses(ModelError, names=[name], fix=["tunesmith merge RUN"]):
            plan_gguf(model.config.to_dict(), weights, TOKENIZER, quant="f16", name="tiny")


def plan_of_adapter(variant: str, *, added_tokens: int = 0, **settings: Any) -> GgufPlan:
    """The plan of an adapter as PEFT initializes and saves it."""
    model = random_model(variant)
    config = model.config.to_dict()
    settings = {"target_modules": ["q_proj"], **settings}
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **settings))
    tensors = get_peft_model_state_dict(tuned)
    if settings.get("bias") == "lora_only":  # which PEFT saves from 0.21 on
        tensors[BIAS] = torch.ones(128)
    rows = {name: tensor_rows(tensor.detach().contiguous()) for name, tensor in tensors.items()}
    target = AdapterTarget("tiny", Adapter(rank=4, alpha=6), added_tokens=added_tokens)
    return plan_adapter(config, rows, target)


BIAS = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"


@pytest.mark.parametrize(
    ("variant", "settings", "name"),
    [
        ("llama", {"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ("llama-3", {"bias": "lora_only"}, "bias"),
        ("llama", {"use_dora": True}, "lora_magnitude_vector"),
        ("llama-tied", {"target_modules": ["lm_head"]}, "tied"),
        ("llama", {"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
        ("llama", {"added_tokens": 2}, "2 added"),
    ],
)
def test_what_was_trained_beside_matrices_is_refused(variant, settings, name) -> None:
    with pytest.raises(ModelError, match=name) as error:
        plan_of_adapter(variant, **settings)
    assert "without --adapter" in error.value.fix


def test_an_untied_head_and_a_model_without_a_bias_can_be_adapted() -> None:
    plan = plan_of_adapter("llama", target_modules=["lm_head"], bias="all")
    names = {tensor.name for tensor in plan.tensors}
    assert names == {"output.weight.lora_a", "output.weight.lora_b"}


def plan_of_moe(layer: str, folder: Path, model_type: str = "qwen3_moe", **more: int) -> GgufPlan:
    """The plan of an adapter of one layer, which is refused before the converter is used."""
    config = AutoConfig.for_model(model_type, num_hidden_layers=2)
    rows = {
        f"base_model.model.{layer}.lora_A.weight": tensor_rows(torch.zeros(4, 64)),
        f"base_model.model.{layer}.lora_B.weight": tensor_rows(torch.zeros(8, 4)),
    }
    target = AdapterTarget("tiny", Adapter(rank=4, alpha=6), **more)
    converter = Converter(folder, folder, "")
    return plan_converted_adapter(config.to_dict(), config, rows, target, converter)


QUERY = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("layer", "more", "what"),
    [
        ("model.layers.0.mlp.experts.base_layer", {}, "experts"),
        ("model.layers.0.mlp.experts.1.up_proj", {}, "experts"),
        ("model.embed_tokens", {}, "embedding"),
        ("model.per_layer_model_projection", {}, "per_layer_model_projection"),
        (QUERY, {"added_tokens": 2}, "2 added tokens"),
    ],
)
def test_what_llama_cpp_does_not_apply_is_refused(layer, more, what, tmp_path):
    with refuses(ModelError, where="--adapter", names=[what], fix=["without --adapter"]):
        plan_of_moe(layer, tmp_path, **more)


def test_a_family_or_a_converter_that_was_not_compared_is_refused(tmp_path: Path) -> None:
    """llama.cpp multiplies by some weights of DeepSeek without their adapters."""
    with refuses(ModelError, names=["deepseek_v3"], fix=["without --adapter"]):
        plan_of_moe(QUERY, tmp_path, "deepseek_v3")
    with refuses(ModelError, where=str(tmp_path), names=[module.SCRIPT], fix=["--converter"]):
        plan_of_moe(QUERY, tmp_path)


def state_of(tokenizer: PreTrainedTokenizerFast) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def test_tokens_have_their_types() -> None:
    tokenizer = byte_level(structure_of("gpt-2"))
    added = ("<order>", "<|tool|>", "<unused7>", "<\uff5cUser\uff5c>")
    tokenizer.add_tokens([AddedToken(text, special=False) for text in added])
    read = read_gguf_tokenizer(tokenizer, len(tokenizer) + 3, {})
    tokens = read.keys["token_list"]
    types = dict(zip(tokens, read.keys["token_types"], strict=True))
    assert {types[text] for text in ("<s>", *added[1:])} == {TokenType.CONTROL}
    assert (types["<order>"], types["he"]) == (TokenType.USER_DEFINED, TokenType.NORMAL)
    assert tokens[-1] == f"[PAD{len(tokenizer) + 2}]"
    assert read.keys["token_types"][-3:] == [TokenType.UNUSED] * 3
    assert read.keys["token_merges"][0] == " ".join(state_of(tokenizer)["model"]["merges"][0])
    special = {key: value for key, value in read.keys.items() if key.endswith("_token_id")}
    expected = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 3, "pad_token_id": 0}
    assert special == expected
    assert (read.keys["add_bos_token"], read.keys["add_eos_token"]) == (True, False)
    assert read.keys["chat_template"] == TEMPLATE
    # Gemma 3's text models have an image token past their embedding.
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    fewer = read_gguf_tokenizer(tokenizer, len(tokenizer) - 1, {})
    assert "<image>" not in fewer.keys["token_list"]


def test_special_ids_come_from_the_config_where_the_tokenizer_has_none() -> None:
    """The end of a turn is written where it is not the end of a text."""
    tokenizer = byte_level(structure_of("gpt-2"))
    assert "eot_token_id" not in read_gguf_tokenizer(tokenizer, 600, {}, turn_end=2).keys
    assert read_gguf_tokenizer(tokenizer, 600, {}, turn_end=3).keys["eot_token_id"] == 3
    tokenizer.bos_token = None
    assert read_gguf_tokenizer(tokenizer, 600, {"bos_token_id": 7}).keys["bos_token_id"] == 7


def test_a_new_vocabulary_keeps_its_pre_tokenizer() -> None:
    for row in PRE_TOKENIZER_TABLE["structures"]:
        read = read_gguf_tokenizer(byte_level(row, vocab_size=400), 600, {})
        assert read.keys["tokenizer_pre"] == row["pre"]


def test_equal_ways_to_write_a_structure_are_one() -> None:
    tokenizer = byte_level(structure_of("qwen2"))
    expression = Regex(structure_of("qwen2")["splits"][0])
    split = pre_tokenizers.Split(expression, "removed", invert=True)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    steps = [pre_tokenizers.Sequence([split]), last]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    read = read_gguf_tokenizer(tokenizer, 600, {})
    assert read.keys["tokenizer_pre"] == "qwen2"
    assert "NFC" in read.notes[0]


WITH_PREFIX, NO_SPLIT = (
    pre_tokenizers.ByteLevel(add_prefix_space=is_prefixed, use_regex=is_prefixed)
    for is_prefixed in (True, False)
)
OTHER_WORDS = pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated")
SUFFIXED = models.BPE({"a": 0, "</w>b": 1, "b</w>": 2}, [], end_of_word_suffix="</w>")
# Steps in place of GPT-2's, or another model.
OTHER_STEPS = {
    "an unknown expression": pre_tokenizers.Sequence([OTHER_WORDS, NO_SPLIT]),
    "a space in front": WITH_PREFIX,
    "no split": NO_SPLIT,
    "words": pre_tokenizers.Whitespace(),
    "a suffix": SUFFIXED,
    "unigram": models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0),
    "lower case": normalizers.Lowercase(),
}


@pytest.mark.parametrize("name", OTHER_STEPS)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(name: str) -> None:
    tokenizer, part = byte_level(structure_of("gpt-2")), OTHER_STEPS[name]
    if isinstance(part, models.Model):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(part))
    elif isinstance(part, normalizers.Normalizer):
        tokenizer.backend_tokenizer.normalizer = part
    else:
        tokenizer.backend_tokenizer.pre_tokenizer = part
    with refuses(ModelError, where="tokenizer.json", fix=["tunesmith merge"]):
        read_gguf_tokenizer(tokenizer, 600, {})


def test_merges_that_scores_cannot_say_are_refused() -> None:
    """llama.cpp would join a pair that is left out, and a score stands for one merge of a token."""
    state = state_of(sentencepiece())
    merges = state["model"]["merges"]
    joined = ["".join(merge) for merge in merges]
    index = next(i for i, token in enumerate(joined) if joined.count(token) > 1)
    moved = [*merges[:index], *merges[index + 1 :], merges[index]]
    for changed, tokens in ((merges[1:], merges[0]), (moved, [joined[index]])):
        state["model"]["merges"] = changed
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
        with refuses(ModelError, where="tokenizer.json", names=map(repr, tokens)):
            read_gguf_tokenizer(tokenizer, 600, {})


def test_a_name_says_phi_3_where_spaces_are_stripped_and_only_there() -> None:
    """llama.cpp reads `general.name` for that, and fails to load a Phi-3 without four tokens."""
    assert model_name("my-Phi-3.5-orders", False) == "my-phi 3.5-orders"
    assert model_name("orders", True) == "orders (Phi-3)"
