"""Tokenizers as the header of a GGUF file has them, and which are refused."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from errors import refuses
from export.tiny_gguf import TEMPLATE, byte_level, sentencepiece, structure_of
from tunesmith.errors import ModelError
from tunesmith.hub.gguf_tokenizer import PRE_TOKENIZER_TABLE, TokenType
from tunesmith.tools.export.gguf.tokenizer import (
    model_name,
    pre_tokenizer_name,
    read_gguf_tokenizer,
)

GPT2 = structure_of("gpt-2")


def state_of(tokenizer: PreTrainedTokenizerFast) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def name_of(tokenizer: PreTrainedTokenizerFast) -> str:
    return pre_tokenizer_name(tokenizer, state_of(tokenizer))


def test_tokens_have_their_types() -> None:
    tokenizer = byte_level(GPT2)
    tokenizer.add_tokens(
        [
            AddedToken(text, special=False)
            for text in ("<order>", "<|tool|>", "<unused7>", "<\uff5cUser\uff5c>")
        ]
    )
    read = read_gguf_tokenizer(tokenizer, len(tokenizer) + 3, {})
    tokens = read.keys["token_list"]
    types = dict(zip(tokens, read.keys["token_types"], strict=True))
    assert types["<s>"] == types["<|tool|>"] == TokenType.CONTROL
    assert types["<unused7>"] == types["<\uff5cUser\uff5c>"] == TokenType.CONTROL
    assert types["<order>"] == TokenType.USER_DEFINED
    assert types["he"] == TokenType.NORMAL
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
    tokenizer = byte_level(GPT2)
    assert "eot_token_id" not in read_gguf_tokenizer(tokenizer, 600, {}, turn_end=2).keys
    assert read_gguf_tokenizer(tokenizer, 600, {}, turn_end=3).keys["eot_token_id"] == 3
    tokenizer.bos_token = None
    assert read_gguf_tokenizer(tokenizer, 600, {"bos_token_id": 7}).keys["bos_token_id"] == 7
    several = read_gguf_tokenizer(tokenizer, 600, {"bos_token_id": [7, 8]})
    assert "bos_token_id" not in several.keys


@pytest.mark.parametrize("row", PRE_TOKENIZER_TABLE["structures"], ids=lambda row: row["pre"])
def test_a_new_vocabulary_keeps_its_pre_tokenizer(row: dict) -> None:
    assert name_of(byte_level(row)) == row["pre"]
    assert name_of(byte_level(row, vocab_size=400)) == row["pre"]


def test_equal_ways_to_write_a_structure_are_one() -> None:
    expression = structure_of("qwen2")["splits"][0]
    tokenizer = byte_level(structure_of("qwen2"))
    split = pre_tokenizers.Split(Regex(expression), "removed", invert=True)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Sequence([split]), last]
    )
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert name_of(tokenizer) == "qwen2"
    (note,) = read_gguf_tokenizer(tokenizer, 600, {}).notes
    assert "NFC" in note


def with_pre_tokenizer(step: object, normalizer: object = None) -> PreTrainedTokenizerFast:
    tokenizer = byte_level(GPT2)
    tokenizer.backend_tokenizer.pre_tokenizer = step
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


def byte_step(**settings: bool) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": True, **settings})


def bpe(**affix: str) -> PreTrainedTokenizerFast:
    text = "".join(affix.values())
    model = models.BPE({"a": 0, f"{text}b": 1, f"b{text}": 2}, [], **affix)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


REFUSED = {
    "an unknown expression": with_pre_tokenizer(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated"), byte_step(use_regex=False)]
        )
    ),
    "a space in front": with_pre_tokenizer(byte_step(add_prefix_space=True)),
    "no split": with_pre_tokenizer(byte_step(use_regex=False)),
    "lower case": with_pre_tokenizer(byte_step(), normalizers.Lowercase()),
    "words": with_pre_tokenizer(pre_tokenizers.Whitespace()),
    "continuing_subword_prefix": bpe(continuing_subword_prefix="##"),
    "end_of_word_suffix": bpe(end_of_word_suffix="</w>"),
    "unigram": PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0))
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(name: str) -> None:
    with refuses(ModelError, where="tokenizer.json", fix=["tunesmith merge"]) as error:
        read_gguf_tokenizer(REFUSED[name], 600, {})
    assert error.value.why
    assert "_" not in name or name in error.value.why


def without_the_first(merges: list) -> tuple[list, list[str]]:
    """llama.cpp would join the pair: scores cannot leave it out."""
    return merges[1:], list(merges[0])


def move_one_to_the_end(merges: list) -> tuple[list, list[str]]:
    """An order that scores, one a token, cannot say."""
    joined = ["".join(merge) for merge in merges]
    index = next(i for i, token in enumerate(joined) if joined.count(token) > 1)
    return [*merges[:index], *merges[index + 1 :], merges[index]], [joined[index]]


@pytest.mark.parametrize("change", [without_the_first, move_one_to_the_end])
def test_merges_that_scores_cannot_say_are_refused(change) -> None:
    state = state_of(sentencepiece())
    state["model"]["merges"], tokens = change(state["model"]["merges"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    with refuses(ModelError, where="tokenizer.json", names=map(repr, tokens)):
        read_gguf_tokenizer(tokenizer, 600, {})


def test_space_after_special_tokens_goes_by_the_name() -> None:
    """llama.cpp reads `general.name` for that, and fails to load a Phi-3 without four tokens."""
    plain, phi = sentencepiece(), sentencepiece()
    assert not read_gguf_tokenizer(plain, 600, {}).strips_space
    assert model_name("my-Phi-3.5-orders", False) == "my-phi 3.5-orders"
    tokens = [AddedToken(text, rstrip=True, special=True) for text in ("<|end|>", "<|user|>")]
    plain.add_tokens(tokens[:1])
    assert not read_gguf_tokenizer(plain, 600, {}).strips_space
    phi.add_tokens([AddedToken("<|endoftext|>", special=True), *tokens])
    assert read_gguf_tokenizer(phi, 600, {}).strips_space
    assert model_name("orders", True) == "orders (Phi-3)"
    assert model_name("Phi-3-orders", True) == "Phi-3-orders"
