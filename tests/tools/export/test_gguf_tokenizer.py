"""Tokenizers as the header has them, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from errors import holds, refuses
from export.tiny_gguf import (
    TEMPLATE,
    byte_level,
    header_of,
    plan_of,
    random_model,
    sentencepiece,
    structure_of,
)
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


def test_tokens_without_a_row_are_left_out() -> None:
    """Gemma 3's text models have an image token past their embedding."""
    tokenizer = byte_level(GPT2)
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    read = read_gguf_tokenizer(tokenizer, len(tokenizer) - 1, {})
    assert "<image>" not in read.keys["token_list"]


def test_special_ids_come_from_the_config_where_the_tokenizer_has_none() -> None:
    tokenizer = byte_level(GPT2)
    tokenizer.bos_token = None
    assert read_gguf_tokenizer(tokenizer, 600, {"bos_token_id": 7}).keys["bos_token_id"] == 7
    several = read_gguf_tokenizer(tokenizer, 600, {"bos_token_id": [7, 8]})
    assert "bos_token_id" not in several.keys


def test_the_end_of_a_turn_is_written_where_it_is_not_eos() -> None:
    tokenizer = byte_level(GPT2)
    assert "eot_token_id" not in read_gguf_tokenizer(tokenizer, 600, {}, turn_end=2).keys
    assert read_gguf_tokenizer(tokenizer, 600, {}, turn_end=3).keys["eot_token_id"] == 3


def test_the_header_has_the_tokenizer(tmp_path: Path) -> None:
    header = header_of(plan_of(random_model("llama"), byte_level(GPT2), turn_end=3), tmp_path)
    expected = {
        "model": "gpt2", "pre": "gpt-2", "bos_token_id": 1, "eos_token_id": 2, "eot_token_id": 3,
        "unknown_token_id": 3, "padding_token_id": 0, "add_bos_token": True, "add_eos_token": False,
    }  # fmt: skip
    for key, value in expected.items():
        assert header[f"tokenizer.ggml.{key}"] == value, key
    assert header["tokenizer.chat_template"] == TEMPLATE
    assert len(header["tokenizer.ggml.tokens"]) == 600


@pytest.mark.parametrize("row", PRE_TOKENIZER_TABLE["structures"], ids=lambda row: row["pre"])
def test_a_new_vocabulary_keeps_its_pre_tokenizer(row: dict) -> None:
    assert name_of(byte_level(row)) == row["pre"]
    assert name_of(byte_level(row, vocab_size=400)) == row["pre"]


def test_ids_of_the_text_decide_before_the_structure(monkeypatch) -> None:
    """Those of another tokenizer with the same structure may have a name of their own."""
    import hashlib

    tokenizer = byte_level(GPT2)
    digest = hashlib.sha256(str(tokenizer.encode(PRE_TOKENIZER_TABLE["text"])).encode()).hexdigest()
    monkeypatch.setitem(PRE_TOKENIZER_TABLE["hashes"], digest, "jais")
    assert name_of(tokenizer) == "jais"
    assert name_of(byte_level(GPT2, vocab_size=400)) == "gpt-2"


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
    "ends of words": PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>"))
    ),
    "unigram": PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0))
    ),
}


@pytest.mark.parametrize("tokenizer", REFUSED.values(), ids=REFUSED)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tokenizer) -> None:
    with refuses(ModelError, where="tokenizer.json") as error:
        read_gguf_tokenizer(tokenizer, 600, {})
    assert error.value.why
    assert "tunesmith merge" in error.value.fix


@pytest.mark.parametrize(
    ("affix", "tokens"),
    [("continuing_subword_prefix", ["a", "##b"]), ("end_of_word_suffix", ["a", "b</w>"])],
)
def test_the_refusal_names_the_key_of_the_affix(affix: str, tokens: list[str]) -> None:
    text = tokens[1].replace("b", "")
    model = models.BPE({token: i for i, token in enumerate(tokens)}, [], **{affix: text})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    with refuses(ModelError, where="tokenizer.json") as error:
        read_gguf_tokenizer(tokenizer, 600, {})
    assert f"{affix} = {text!r}" in error.value.why


def test_the_refusal_comes_before_a_weight_is_read() -> None:
    class Unreadable:
        shape = (600, 128)

        def rows(self, first: int, last: int) -> None:
            raise AssertionError("a weight was read")

    from tunesmith.tools.export.gguf.plan import plan_gguf

    model = random_model("llama")
    weights = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), Unreadable())
    config = model.config.to_dict()
    with refuses(ModelError, where="tokenizer.json"):
        plan_gguf(config, weights, REFUSED["words"], quant="f16", name="x")
    plan_gguf(config, weights, byte_level(GPT2), quant="f16", name="x")


def test_sentencepiece_has_scores_in_the_order_of_merges() -> None:
    tokenizer = sentencepiece()
    read = read_gguf_tokenizer(tokenizer, len(tokenizer), {})
    assert (read.keys["tokenizer_model"], read.keys["tokenizer_pre"]) == ("llama", "default")
    assert read.keys["token_merges"] is None
    types = dict(zip(read.keys["token_list"], read.keys["token_types"], strict=True))
    scores = dict(zip(read.keys["token_list"], read.keys["token_scores"], strict=True))
    assert types["<unk>"] == TokenType.UNKNOWN
    assert types["<0x0A>"] == TokenType.BYTE
    assert types["</s>"] == TokenType.CONTROL
    joined = ["".join(merge) for merge in state_of(tokenizer)["model"]["merges"]]
    in_order = [scores[token] for token in dict.fromkeys(joined)]
    assert in_order == sorted(in_order, reverse=True)
    assert len(set(in_order)) == len(in_order) > 50
    assert read.keys["add_space_prefix"] is True
    without = read_gguf_tokenizer(sentencepiece(prepend=False), 600, {})
    assert without.keys["add_space_prefix"] is False


def changed_merges(change) -> PreTrainedTokenizerFast:
    tokenizer = sentencepiece()
    state = state_of(tokenizer)
    state["model"]["merges"] = change(state["model"]["merges"])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>"
    )


def test_a_pair_that_llama_cpp_would_join_is_refused() -> None:
    halves: list[str] = []

    def without_the_first(merges: list) -> list:
        halves.extend(merges[0])
        return merges[1:]

    tokenizer = changed_merges(without_the_first)
    with refuses(ModelError, where="tokenizer.json", names=[repr(half) for half in halves]):
        read_gguf_tokenizer(tokenizer, 600, {})


def test_an_order_that_scores_cannot_say_is_refused() -> None:
    moved: list[str] = []

    def move_one_to_the_end(merges: list) -> list:
        joined = ["".join(merge) for merge in merges]
        index = next(i for i, token in enumerate(joined) if joined.count(token) > 1)
        moved.append(joined[index])
        return [*merges[:index], *merges[index + 1 :], merges[index]]

    tokenizer = changed_merges(move_one_to_the_end)
    with refuses(ModelError, where="tokenizer.json", names=[repr(moved[0])]):
        read_gguf_tokenizer(tokenizer, 600, {})


def test_a_byte_without_a_token_is_refused() -> None:
    tokenizer = sentencepiece()
    state = state_of(tokenizer)
    state["model"]["vocab"]["<0x0B>"] = state["model"]["vocab"].pop("<0x0A>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    with pytest.raises(ModelError) as error:
        read_gguf_tokenizer(tokenizer, 600, {})
    assert "<0x0A>" in error.value.why


def test_metaspace_is_noted() -> None:
    for scheme, text in (("always", "starts with a space"), ("first", "after every special token")):
        tokenizer = sentencepiece()
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme=scheme, split=False
        )
        read = read_gguf_tokenizer(tokenizer, 600, {})
        assert read.keys["add_space_prefix"]
        assert text in read.notes[0]


def test_space_after_special_tokens_goes_by_the_name() -> None:
    """llama.cpp reads `general.name` for that, and fails to load a Phi-3 without four tokens."""
    plain = read_gguf_tokenizer(sentencepiece(), 600, {})
    assert not plain.strips_space
    assert model_name("my-Phi-3.5-orders", plain.strips_space) == "my-phi 3.5-orders"
    assert model_name("orders", plain.strips_space) == "orders"
    phi = sentencepiece()
    phi.add_tokens([AddedToken("<|endoftext|>", special=True)])
    phi.add_tokens(
        [AddedToken(text, rstrip=True, special=True) for text in ("<|end|>", "<|user|>")]
    )
    read = read_gguf_tokenizer(phi, 600, {})
    assert read.strips_space
    assert model_name("orders", read.strips_space) == "orders (Phi-3)"
    assert model_name("Phi-3-orders", read.strips_space) == "Phi-3-orders"
    few = sentencepiece()
    few.add_tokens([AddedToken("<|end|>", rstrip=True, special=True)])
    read = read_gguf_tokenizer(few, 600, {})
    assert not read.strips_space
    assert holds(read.notes[-1], "<|end|>")


def test_what_llama_cpp_splits_otherwise_is_noted() -> None:
    assert "Hindi" in read_gguf_tokenizer(byte_level(structure_of("tekken")), 600, {}).notes[0]
    assert read_gguf_tokenizer(byte_level(GPT2), 600, {}).notes == ()
