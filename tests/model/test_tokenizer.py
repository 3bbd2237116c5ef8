"""Padding, added tokens, and the ids that end a turn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.model import load


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def without(folder: Path, *names: str) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in names}))


@pytest.mark.parametrize(
    ("given", "lost", "token", "source"),
    [
        ("<|im_start|>", (), "<|im_start|>", "the recipe's"),
        (None, (), "<|pad|>", "the tokenizer's own"),
        (None, ("pad_token",), "<|im_end|>", "the tokenizer's eos"),
    ],
)
def test_the_padding_token(folder: Path, given, lost, token, source) -> None:
    without(folder, *lost)
    spec = Model(name="x", pad_token=given)
    tokenizer = load.load_tokenizer(folder, Model(name="x"))
    if lost:
        tokenizer.pad_token = None
    said = load.set_padding(tokenizer, spec)
    assert tokenizer.pad_token == token
    assert source in said
    assert f"id {tokenizer.pad_token_id}" in said


def test_unk_is_taken_before_eos(folder: Path) -> None:
    tokenizer = load.load_tokenizer(folder, Model(name="x"))
    tokenizer.unk_token = "<|im_start|>"
    tokenizer.pad_token = None
    assert "unk" in load.set_padding(tokenizer, Model(name="x"))
    assert tokenizer.pad_token == "<|im_start|>"


def test_a_padding_token_outside_the_vocabulary_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="not in the vocabulary") as caught:
        load.load_tokenizer(folder, Model(name="x", pad_token="<nowhere>"))
    assert "model.added_tokens" in caught.value.fix


def test_a_tokenizer_without_any_candidate_is_refused(folder: Path) -> None:
    tokenizer = load.load_tokenizer(folder, Model(name="x"))
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.unk_token = None
    with pytest.raises(ModelError, match="no padding, unknown or end token"):
        load.set_padding(tokenizer, Model(name="x"))


def test_added_tokens_are_single_special_ids_and_grow_the_rows(folder: Path) -> None:
    plain = load.load_tokenizer(folder, Model(name="x"))
    config = load.load_config(folder, Model(name="x"))
    assert load.vocab_rows(config, plain) == config.vocab_size == 272, "nothing grows that need not"
    new = tuple(f"<tool-{i}>" for i in range(20))
    tokenizer = load.load_tokenizer(folder, Model(name="x", added_tokens=(*new, "<|im_start|>")))
    assert len(tokenizer) == len(plain) + 20, "a token that is there already is not added again"
    ids = tokenizer("a<tool-3> b", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<tool-3>") in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a b"
    assert len(tokenizer) > config.vocab_size
    assert load.vocab_rows(config, tokenizer) == 320


def test_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (folder / "tokenizer.json").unlink()
    tokenizer = load.load_tokenizer(folder, Model(name="x", tokenizer=str(other)))
    assert len(tokenizer) > 256
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        load.load_tokenizer(folder, Model(name="x", tokenizer="someone/nowhere"))


@pytest.mark.parametrize(("generation", "expected"), [([5, 6], {5, 6}), (7, {7}), (None, set())])
def test_ids_that_end_a_turn(folder: Path, generation, expected) -> None:
    tokenizer = load.load_tokenizer(folder, Model(name="x"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert load.eos_ids(folder, tokenizer) == expected | {tokenizer.eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ModelError, match="eos_token_id is '</s>'"):
        load.eos_ids(folder, tokenizer)
