"""A tokenizer that is read from its copy in the cache equals the original, and needs no torch."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from chat_tokenizers import train
from invoke import invoke
from rows import alpaca
from time_limit import time_limit
from tunesmith.config.schema import Model
from tunesmith.model.arch.tokenizer import load_original_tokenizer, load_tokenizer
from tunesmith.model.arch.tokenizer_copy import CORE_FILE, find_copy
from tunesmith.model.known.architectures import ARCHITECTURES
from tunesmith.tokens.text.template import tokenizer_hash

MODEL = Model(name="x")
TEXTS = ["  The answer:\n\n is 12.", "<|x|> Τι είναι; 这是 🎉 e\u0301 \u00e9", "", "a<|x|>b </s>"]
TIER_1 = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenizers"


def write_folder(folder: Path, model_type: str = "llama", kind: str = "trimmed") -> Path:
    """The class of the tokenizer follows from the model's type, as in the models of the families."""
    tokenizer = train(kind, ("<|x|>",), kind != "trimmed")
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["tokenizer_class"]
    file.write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def everything(tokenizer: Any) -> list[object]:
    encoded = [dict(tokenizer(text, return_offsets_mapping=True)) for text in TEXTS]
    decoded = [tokenizer.decode(each["input_ids"]) for each in encoded]
    special = (tokenizer.special_tokens_map, tokenizer.all_special_ids, tokenizer.padding_side)
    named = (tokenizer.chat_template, tokenizer.name_or_path, tokenizer.model_max_length)
    return [tokenizer_hash(tokenizer), tokenizer.get_vocab(), encoded, decoded, special, named]


@pytest.mark.parametrize("kind", ["trimmed", "llama2"])
@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=pytest.mark.slow if name in TIER_1 else pytest.mark.nightly)
        for name in ARCHITECTURES
    ],
)
def test_a_copy_equals_the_original(tmp_path: Path, model_type: str, kind: str) -> None:
    folder = write_folder(tmp_path / "model", model_type, kind)
    original = load_original_tokenizer(folder, MODEL)
    first = load_tokenizer(folder, MODEL)
    assert type(first) is type(original)
    assert (find_copy(folder) / CORE_FILE).is_file()
    second = load_tokenizer(folder, MODEL)
    assert type(second).__name__ == "TokenizersBackend"
    assert everything(first) == everything(second) == everything(original)
    # Worker processes get the tokenizer as a pickle, if its class is one of Transformers.
    assert type(second).__module__.startswith("transformers.")
    assert everything(pickle.loads(pickle.dumps(second))) == everything(original)


def test_changed_files_and_a_damaged_copy_have_another_copy(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    first = everything(load_tokenizer(folder, MODEL))
    copy = find_copy(folder)
    whole = (copy / CORE_FILE).read_bytes()
    (copy / CORE_FILE).write_text("{")
    assert everything(load_tokenizer(folder, MODEL)) == first
    assert (copy / CORE_FILE).read_bytes() == whole
    assert type(load_tokenizer(folder, MODEL)).__name__ == "TokenizersBackend"
    (folder / "chat_template.jinja").write_text("{{ messages[0] }}")
    assert find_copy(folder) != copy
    for _ in range(2):
        assert load_tokenizer(folder, MODEL).chat_template == "{{ messages[0] }}"


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", CORE_FILE])
@pytest.mark.parametrize("is_removed", [False, True])
def test_a_changed_copy_is_not_read(tmp_path: Path, name: str, is_removed: bool) -> None:
    folder = write_folder(tmp_path / "model")
    first = everything(load_tokenizer(folder, MODEL))
    file = find_copy(folder) / name
    if is_removed:
        file.unlink()
    else:
        file.write_text(file.read_text().replace("messages", "messages[1:]") + " ")
    assert everything(load_tokenizer(folder, MODEL)) == first


def test_a_large_file_beside_the_tokenizer_is_not_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    (folder / "notes.txt").write_bytes(b"")
    os.truncate(folder / "notes.txt", 1 << 40)
    with time_limit(20, "a large file beside the tokenizer"):
        load_tokenizer(folder, MODEL)


@pytest.mark.parametrize(
    ("model_type", "tokenizer_class"),
    [
        *((name, None) for name in ("granitemoehybrid", "qwen2", "gpt_neox", "cohere2", None)),
        *(("llama", "GPT2Tokenizer"), (None, "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")),
    ],
)
def test_the_tokens_are_those_of_the_file(
    tmp_path: Path, model_type: str | None, tokenizer_class: str | None
) -> None:
    """Some classes of Transformers build a pre-tokenizer of their own over that of the file."""
    folder = tmp_path / "model"
    tokenizer = copy.deepcopy(train("bytes", ("<|x|>",), False))
    split = pre_tokenizers.Split(Regex(r"\d| ?\w+|\s+"), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = {**json.loads(file.read_text()), "tokenizer_class": tokenizer_class}
    file.write_text(json.dumps({key: config[key] for key in config if config[key] is not None}))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    written = Tokenizer.from_file(str(folder / CORE_FILE))
    for load in (load_tokenizer, load_tokenizer, load_original_tokenizer):
        loaded = load(folder, MODEL)
        for text in ("The answer is 12345, isn't it?", *TEXTS):
            assert loaded(text)["input_ids"] == written.encode(text).ids


@pytest.mark.slow
def test_a_second_start_of_data_imports_no_torch(tiny: Path, write: Any) -> None:
    words = ["data", "--model", tiny, "--data", write("rows.jsonl", alpaca(60))]
    assert invoke(*words).code == 0
    program = (
        "import sys; from tunesmith.cli.main import main; code = main(sys.argv[1:]);"
        " sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, *map(str, words)], check=False)
    assert done.returncode == 0
