"""Padding, added tokens, and the ids that end a turn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from errors import refuses
from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.hub.fetch import tokenizer_folder
from tunesmith.model.load import load_configs
from tunesmith.model.tokenizer import eos_ids, load_tokenizer, set_padding, vocab_rows


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def without(folder: Path, *names: str) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(
        json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in names})
    )


@pytest.mark.parametrize(
    ("given", "lost", "token"),
    [
        ("<|im_start|>", (), "<|im_start|>"),
        (None, (), "<|pad|>"),
        (None, ("pad_token",), "<|im_end|>"),
    ],
    ids=["the recipe's", "the tokenizer's own", "the tokenizer's eos"],
)
def test_the_padding_token(folder: Path, given, lost, token) -> None:
    without(folder, *lost)
    tokenizer = load_tokenizer(folder, Model(name="x"))
    if lost:
        tokenizer.pad_token = None
    set_padding(tokenizer, Model(name="x", pad_token=given))
    assert tokenizer.pad_token == token
    assert tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids(token)


def test_unk_is_taken_before_eos(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, Model(name="x"))
    tokenizer.unk_token = "<|im_start|>"
    tokenizer.pad_token = None
    set_padding(tokenizer, Model(name="x"))
    assert tokenizer.pad_token == "<|im_start|>"


def test_a_padding_token_outside_the_vocabulary_is_refused(folder: Path) -> None:
    with refuses(ModelError, where="model.pad_token", names=["<nowhere>"]) as caught:
        load_tokenizer(folder, Model(name="x", pad_token="<nowhere>"))
    assert "model.added_tokens" in caught.value.fix


def test_a_tokenizer_without_any_candidate_is_refused(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, Model(name="x"))
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.unk_token = None
    with refuses(ModelError, where="model.pad_token"):
        set_padding(tokenizer, Model(name="x"))


def test_added_tokens_are_single_special_ids_and_grow_the_rows(folder: Path) -> None:
    plain = load_tokenizer(folder, Model(name="x"))
    config, _ = load_configs(folder, Model(name="x"))
    assert vocab_rows(config, plain, Model(name="x")) == config.vocab_size == 272, (
        "nothing grows that need not"
    )
    new = tuple(f"<tool-{i}>" for i in range(20))
    model = Model(name="x", added_tokens=(*new, "<|im_start|>"))
    tokenizer = load_tokenizer(folder, model)
    assert len(tokenizer) == len(plain) + 20, "a token that is there already is not added again"
    ids = tokenizer("a<tool-3> b", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<tool-3>") in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a b"
    assert len(tokenizer) > config.vocab_size
    assert vocab_rows(config, tokenizer, model) == len(tokenizer), (
        "to so many PEFT resizes the base"
    )
    assert vocab_rows(config, tokenizer, Model(name="x")) == config.vocab_size, (
        "no row that was not asked for"
    )


def test_a_padding_token_without_a_row_is_refused(folder: Path) -> None:
    """As in a Llama 2 whose tokenizer was given `[PAD]` and whose embedding was not resized."""
    tokenizer = load_tokenizer(folder, Model(name="x"))
    tokenizer.add_tokens([f"<{i}>" for i in range(20)])
    tokenizer.pad_token = "<19>"
    with refuses(ModelError, names=[278, 272]) as caught:
        vocab_rows(load_configs(folder, Model(name="x"))[0], tokenizer, Model(name="x"))
    assert caught.value.fix.endswith('model.pad_token: "<|im_end|>"')


@pytest.mark.parametrize("beyond", [271, 10**6, 10**30])
def test_an_end_id_that_is_no_token_is_refused(folder: Path, beyond: int) -> None:
    tokenizer = load_tokenizer(folder, Model(name="x"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, beyond]}))
    with refuses(ModelError, names=["eos_token_id", beyond]) as caught:
        eos_ids(folder, tokenizer)
    assert "generation_config.json" in caught.value.where
    assert str(tokenizer.eos_token_id) in caught.value.fix


def test_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (folder / "tokenizer.json").unlink()
    spec = Model(name="x", tokenizer=str(other))
    assert len(load_tokenizer(tokenizer_folder(spec, folder), spec)) > 256
    assert tokenizer_folder(Model(name="x"), folder) == folder
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        tokenizer_folder(Model(name="x", tokenizer="someone/nowhere"), folder)


@pytest.mark.parametrize(("generation", "expected"), [([5, 6], {5, 6}), (7, {7}), (None, set())])
def test_ids_that_end_a_turn(folder: Path, generation, expected) -> None:
    tokenizer = load_tokenizer(folder, Model(name="x"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert eos_ids(folder, tokenizer) == expected | {tokenizer.eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ModelError, match="eos_token_id is '</s>'"):
        eos_ids(folder, tokenizer)
