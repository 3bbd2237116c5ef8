"""Padding, added tokens, and the ids that end a turn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from errors import refuses
from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.model.arch.load import load_configs
from tunesmith.model.arch.tokenizer import eos_ids, load_tokenizer, set_padding, vocab_rows


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


X = Model(name="x")


@pytest.mark.parametrize(
    ("given", "own", "token"),
    [
        ("<|im_start|>", {}, "<|im_start|>"),
        (None, {}, "<|pad|>"),
        (None, {"pad_token": None}, "<|im_end|>"),
        (None, {"pad_token": None, "unk_token": "<|im_start|>"}, "<|im_start|>"),
    ],
    ids=["the recipe's", "the tokenizer's", "eos", "unk before eos"],
)
def test_the_padding_token(tiny: Path, given: str | None, own: dict, token: str) -> None:
    tokenizer = load_tokenizer(tiny, X)
    for name, value in own.items():
        setattr(tokenizer, name, value)
    set_padding(tokenizer, Model(name="x", pad_token=given))
    assert tokenizer.pad_token == token
    assert tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids(token)


def test_a_padding_token_that_is_none_is_refused(tiny: Path) -> None:
    outside = Model(name="x", pad_token="<nowhere>")
    fix = ["model.added_tokens"]
    with refuses(ModelError, where="model.pad_token", names=["<nowhere>"], fix=fix):
        load_tokenizer(tiny, outside)
    tokenizer = load_tokenizer(tiny, X)
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.unk_token = None
    with refuses(ModelError, where="model.pad_token"):
        set_padding(tokenizer, X)


@pytest.mark.parametrize(
    ("stated", "ids"),
    [([5, 6], {5, 6}), (7, {7}), (None, set()), ([5, 271], None), (10**30, None), ("</s>", None)],
)
def test_ids_that_end_a_turn(folder: Path, stated: Any, ids: set[int] | None) -> None:
    """None: refused, as no token of the tokenizer."""
    tokenizer = load_tokenizer(folder, X)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    if ids is not None:
        assert eos_ids(folder, tokenizer) == ids | {tokenizer.eos_token_id}
        return
    with refuses(ModelError, names=["eos_token_id"]) as caught:
        eos_ids(folder, tokenizer)
    assert caught.value.fix
    assert "generation_config.json" in caught.value.where


def test_added_tokens_are_single_special_ids_and_grow_the_rows(folder: Path) -> None:
    plain = load_tokenizer(folder, X)
    config, _ = load_configs(folder, X)
    assert vocab_rows(config, plain, X) == config.vocab_size == 272, "nothing grows that need not"
    new = tuple(f"<tool-{i}>" for i in range(20))
    model = Model(name="x", added_tokens=(*new, "<|im_start|>"))
    tokenizer = load_tokenizer(folder, model)
    assert len(tokenizer) == len(plain) + 20, "a token that is there already is not added again"
    ids = tokenizer("a<tool-3> b", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<tool-3>") in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a b"
    assert len(tokenizer) > config.vocab_size
    assert vocab_rows(config, tokenizer, model) == len(tokenizer), "as PEFT resizes the base"


def test_a_padding_token_without_a_row_is_refused(folder: Path) -> None:
    """As in a Llama 2 whose tokenizer was given `[PAD]` and whose embedding was not resized."""
    tokenizer = load_tokenizer(folder, X)
    tokenizer.add_tokens([f"<{i}>" for i in range(20)])
    tokenizer.pad_token = "<19>"
    with refuses(ModelError, names=[278, 272]) as caught:
        vocab_rows(load_configs(folder, X)[0], tokenizer, X)
    assert caught.value.fix.endswith('model.pad_token: "<|im_end|>"')
