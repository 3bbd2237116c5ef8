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
from page_cache import resident
from tunesmith.config.schema import Model
from tunesmith.errors import MachineError, ModelError
from tunesmith.hub import fetch
from tunesmith.hub.gguf_tokenizer import read_file_tokenizer
from tunesmith.model import load
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.model.weights import load_weights


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
def test_the_folder_is_what_transformers_reads_from_the_file(file, cache, capfd):
    from transformers import AutoModelForCausalLM

    spec = Model(name=str(file), dtype="fp32")
    for_tokens = fetch.fetch_for_tokens(spec)
    assert not [*for_tokens.glob("*.safetensors")], "a plan reads no weights"
    with logged_lines() as notes:
        assert fetch.fetch_for_tokens(spec) == for_tokens
    assert not notes, "the second time nothing is read"
    text = {path.name: path.read_text() for path in for_tokens.iterdir()}

    with logged_lines() as notes:
        folder = fetch.fetch(spec)
    if resident(folder / "config.json"):  # where this file system caches
        assert resident(folder / "model.safetensors") == 0
    assert capfd.readouterr() == ("", ""), "no bars of the libraries"
    assert folder.parent == for_tokens.parent == cache
    assert [n for n in notes if str(folder) in n]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert {path.name for path in folder.iterdir()} == {*text, "model.safetensors"}
    config = json.loads((folder / "config.json").read_text())
    of_tokens = json.loads(text.pop("config.json"))
    assert config == {**of_tokens, "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    assert text == {name: (folder / name).read_text() for name in text}
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
    assert len({for_tokens, folder, other}) == len([*cache.iterdir()]), "no scratch folder stays"


def header_like(pre: str, folder: Path) -> dict[str, Any]:
    """Of a file whose tokenizer has the steps of gpt-2."""
    plan = plan_of(random_model("llama", num_hidden_layers=1), byte_level(structure_of("gpt-2")))
    return header_of(plan, folder) | {"tokenizer.ggml.pre": pre}


def test_a_tokenizer_that_is_not_known_is_refused(tmp_path: Path) -> None:
    header = header_like("kimi-k2", tmp_path)
    with refuses(ModelError, where="a.gguf", names=["kimi-k2"], fix=["model.name"]):
        read_file_tokenizer(header, "a.gguf")
    header |= {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.model": "plamo2"}
    with refuses(ModelError, where="a.gguf", names=["plamo2"], fix=["model.name"]):
        read_file_tokenizer(header, "a.gguf")


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


@pytest.mark.parametrize(
    "name", ["page.gguf", "empty.gguf", "header.gguf", "cut.gguf", "junk.gguf"]
)
def test_a_bad_file_is_named(name: str, file: Path, cache: Path, tmp_path: Path) -> None:
    good = file.read_bytes()
    data = {
        "page.gguf": b"<html>",
        "empty.gguf": b"",
        "header.gguf": good[:200],
        "cut.gguf": good[: len(good) // 2],
        "junk.gguf": b"GGUF" + bytes(range(200)),
    }
    path = tmp_path / name
    path.write_bytes(data[name])
    readers = [fetch.fetch]
    if name != "cut.gguf":  # which has all but its weights
        readers.append(fetch.fetch_for_tokens)
    for read in readers:
        with refuses(ModelError, where=name) as caught:
            read(Model(name=str(path), dtype="bf16"))
        assert caught.value.fix
    assert not cache.exists() or not list(cache.iterdir()), "nothing half stays"


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with refuses(ModelError, where="model.name", names=[tmp_path / "none.gguf"]):
        fetch.fetch(Model(name=str(tmp_path / "none.gguf")))


def test_an_adapter_is_refused_with_the_base_that_it_is_for(cache: Path, tmp_path: Path) -> None:
    from gguf import GGUFWriter

    file = tmp_path / "faq.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_type("adapter")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, "my base-f16.gguf")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    serves_both = f"llama-server -m 'my base-f16.gguf' --lora {file}"
    for read in (fetch.fetch, fetch.fetch_for_tokens):
        with refuses(ModelError, where=str(file), names=["my base-f16.gguf"], fix=[serves_both]):
            read(Model(name=str(file), dtype="bf16"))
    assert not list(cache.iterdir()), "nothing half stays"


def test_a_missing_package_and_a_cache_that_cannot_be_written(file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file"))
    with refuses(MachineError, fix=["TUNESMITH_CACHE"]):
        fetch.fetch(Model(name=str(file), dtype="bf16"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refuses(MachineError, where=str(file), names=["gguf"], fix=["pip install 'gguf>=0.19'"]):
        fetch.fetch(Model(name=str(file), dtype="bf16"))
