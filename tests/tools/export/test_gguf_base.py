"""A .gguf file as the base of a run: it becomes a folder once, and a bad file is refused."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import refuses
from export.tiny_gguf import byte_level, header_of, plan_of, random_model, structure_of, write_model
from logged import logged_lines
from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.hub import fetch
from tunesmith.hub.gguf_tokenizer import read_file_tokenizer
from tunesmith.model.arch import load
from tunesmith.model.arch.tokenizer import load_tokenizer
from tunesmith.model.weights.weights import load_weights


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A random Llama in GGUF, in fp16."""
    tokenizer = byte_level(structure_of("gpt-2"))
    path = tmp_path_factory.mktemp("gguf") / "tiny.F16.gguf"
    return write_model(path, random_model("llama"), tokenizer, "f16")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.mark.slow
def test_the_folder_is_what_transformers_reads_from_the_file(file, cache):
    from transformers import AutoModelForCausalLM

    spec = Model(name=str(file), dtype="fp32")
    for_tokens = fetch.fetch_for_tokens(spec)
    assert not [*for_tokens.glob("*.safetensors")], "a plan reads no weights"
    names = {path.name for path in for_tokens.iterdir()}
    with logged_lines() as notes:
        folder = fetch.fetch(spec)
    assert folder.parent == for_tokens.parent == cache
    assert [n for n in notes if str(folder) in n]
    assert {path.name for path in folder.iterdir()} == {*names, "model.safetensors"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")
    assert not {"quantization_config", str(file.parent)} & {*config, *map(str, config.values())}
    assert fetch.fetch_for_tokens(spec) == folder, "which is there by now"

    model = load.build_on_meta(load.load_configs(folder, spec)[0], spec)
    load.materialize(model, torch.device("cpu"))
    load_weights(model, folder)
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, theirs.eval()(ids).logits)
    tokenizer = load_tokenizer(folder, spec)
    assert tokenizer.decode(tokenizer("hello")["input_ids"], skip_special_tokens=True) == "hello"

    with logged_lines() as notes:
        assert fetch.fetch(spec) == folder
    assert not notes, "the second time nothing is converted"
    other = fetch.fetch(Model(name=str(file), dtype="bf16"))
    assert json.loads((other / "config.json").read_text())["dtype"] == "bfloat16"
    assert {*cache.iterdir()} == {for_tokens, folder, other}, "no scratch folder stays"


def header_like(pre: str, folder: Path) -> dict[str, Any]:
    """Of a file whose tokenizer has the steps of gpt-2."""
    plan = plan_of(random_model("llama", num_hidden_layers=1), byte_level(structure_of("gpt-2")))
    return header_of(plan, folder) | {"tokenizer.ggml.pre": pre}


def test_a_tokenizer_that_is_not_known_is_refused(tmp_path: Path) -> None:
    header = header_like("gpt-2", tmp_path)
    for key, name in (("pre", "kimi-k2"), ("model", "plamo2")):
        with refuses(ModelError, where="a.gguf", names=[name], fix=["model.name"]):
            read_file_tokenizer(header | {f"tokenizer.ggml.{key}": name}, "a.gguf")


def test_what_a_header_leaves_out_is_as_in_llama_cpp(tmp_path: Path) -> None:
    """A begin token goes by the name, and a file without a name has expressions of its own."""
    header = header_like("gpt-2", tmp_path)
    (begin,) = read_file_tokenizer(header, "").encode("")
    assert begin == header["tokenizer.ggml.bos_token_id"]
    del header["tokenizer.ggml.add_bos_token"]
    assert read_file_tokenizer(header, "").encode("") == []
    header["tokenizer.ggml.pre"] = "llama-bpe"
    assert read_file_tokenizer(header, "").encode("") == [begin]
    header["tokenizer.ggml.add_eos_token"] = True
    end = header["tokenizer.ggml.eos_token_id"]
    assert read_file_tokenizer(header, "").encode("") == [begin, end]
    del header["tokenizer.ggml.pre"]
    backend = read_file_tokenizer(header, "").backend_tokenizer
    pieces = backend.pre_tokenizer.pre_tokenize_str("a=12345")
    assert [piece for piece, _ in pieces] == ["a", "=", "123", "45"]


@pytest.mark.slow
def test_a_file_that_transformers_would_split_in_another_way_is_refused(cache, tmp_path):
    """It loads the tokenizer of every qwen2 as a class with expressions of its own."""
    model = random_model("qwen2", num_hidden_layers=1)
    for pre, is_read in (("qwen2", True), ("smollm", False)):
        file = write_model(tmp_path / f"{pre}.gguf", model, byte_level(structure_of(pre)))
        with nullcontext() if is_read else refuses(ModelError, where=file.name):
            fetch.fetch_for_tokens(Model(name=str(file), dtype="fp32"))


def test_a_bad_file_is_named(file: Path, cache: Path, tmp_path: Path) -> None:
    good = file.read_bytes()
    files = {
        "page.gguf": b"<html>",
        "header.gguf": good[:200],
        "cut.gguf": good[: len(good) // 2],
        "junk.gguf": b"GGUF" + bytes(range(200)),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        # All but the weights of cut.gguf is there.
        for read in (fetch.fetch, fetch.fetch_for_tokens)[: 1 + (name != "cut.gguf")]:
            with refuses(ModelError, where=name):
                read(Model(name=str(tmp_path / name), dtype="bf16"))
    with refuses(ModelError, where="model.name", names=[tmp_path / "none.gguf"]):
        fetch.fetch(Model(name=str(tmp_path / "none.gguf")))
    assert not cache.exists() or not list(cache.iterdir()), "nothing half stays"
