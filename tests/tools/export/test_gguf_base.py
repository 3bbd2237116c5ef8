"""A .gguf file becomes a folder, once."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from errors import refuses
from export.tiny_gguf import byte_level, header_of, plan_of, random_model, structure_of, write_model
from logged import logged_lines
from page_cache import resident
from recipes import write_rows
from tunesmith.cli.main import main
from tunesmith.config.schema import Model
from tunesmith.data.text.template import tokenizer_hash
from tunesmith.errors import MachineError, ModelError
from tunesmith.hub import fetch
from tunesmith.hub.gguf_tokenizer import read_file_tokenizer
from tunesmith.model import load
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.model.weights import load_weights

LAYERS, WIDTH, INNER, HEADS, KV, VOCAB = 2, 64, 128, 8, 4, 262


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A random Llama in GGUF, in fp16, as llama.cpp's converter lays it out."""
    from gguf import GGUFWriter
    from tokenizers import pre_tokenizers

    path = tmp_path_factory.mktemp("gguf") / "tiny.F16.gguf"
    writer = GGUFWriter(path, "llama")
    for value, add in (
        (VOCAB, writer.add_vocab_size), (512, writer.add_context_length), (WIDTH, writer.add_embedding_length),
        (INNER, writer.add_feed_forward_length), (LAYERS, writer.add_block_count), (HEADS, writer.add_head_count),
        (KV, writer.add_head_count_kv), (WIDTH // HEADS, writer.add_rope_dimension_count),
        (1e-5, writer.add_layer_norm_rms_eps), (1e4, writer.add_rope_freq_base), (2, writer.add_eos_token_id),
        (1, writer.add_bos_token_id), ("gpt2", writer.add_tokenizer_model),
    ):  # fmt: skip
        add(value)
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        "<pad>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "ab",
        "cd",
    ]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * 258)
    writer.add_token_merges(["a b", "c d"])
    random = np.random.default_rng(3)
    shapes = {"token_embd": (VOCAB, WIDTH), "output": (VOCAB, WIDTH), "output_norm": (WIDTH,)}
    for i in range(LAYERS):
        head = WIDTH // HEADS
        shapes |= {
            f"blk.{i}.{name}": shape
            for name, shape in {
                "attn_q": (WIDTH, WIDTH), "attn_k": (KV * head, WIDTH), "attn_v": (KV * head, WIDTH),
                "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH),
                "ffn_down": (WIDTH, INNER), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
            }.items()
        }  # fmt: skip
    for name, shape in shapes.items():
        kind = np.float32 if len(shape) == 1 else np.float16
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.mark.slow
def test_the_folder_is_what_transformers_reads_from_the_file(
    file: Path, cache: Path, capfd
) -> None:
    from transformers import AutoModelForCausalLM

    spec = Model(name=str(file), dtype="fp32")
    with logged_lines() as notes:
        folder = fetch.fetch(spec)
    if resident(folder / "config.json"):  # where this file system caches
        assert resident(folder / "model.safetensors") == 0
    assert capfd.readouterr() == ("", ""), "no bars of the libraries"
    assert folder.parent == cache
    assert [n for n in notes if str(folder) in n]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, (
        "the weights' mode is that of the rest"
    )
    model = load.build_on_meta(load.load_configs(folder, spec)[0], spec)
    load.materialize(model, torch.device("cpu"))
    load_weights(model, folder)
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, theirs.eval()(ids).logits)
    assert str(file.parent) not in (folder / "config.json").read_text()
    assert "quantization" not in (folder / "config.json").read_text()
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert (
        load_tokenizer(folder, spec).decode(load_tokenizer(folder, spec)("hello")["input_ids"])
        == "hello"
    )

    with logged_lines() as notes:
        assert fetch.fetch(spec) == folder
    assert not notes, "the second time nothing is converted"
    other = fetch.fetch(Model(name=str(file), dtype="bf16"))
    assert other != folder
    assert json.loads((other / "config.json").read_text())["dtype"] == "bfloat16"
    assert sorted(p.name for p in cache.iterdir()) == sorted([folder.name, other.name]), (
        "no scratch folder stays"
    )


@pytest.mark.slow
def test_the_folder_for_tokens_has_no_weights_and_says_the_same(file: Path, cache: Path) -> None:
    spec = Model(name=str(file), dtype="bf16")
    folder = fetch.fetch_for_tokens(spec)
    assert folder.parent == cache
    names = {path.name for path in folder.iterdir()}
    with logged_lines() as notes:
        assert fetch.fetch_for_tokens(spec) == folder
    assert not notes, "the second time nothing is read"

    complete = fetch.fetch(spec)
    assert {path.name for path in complete.iterdir()} - names == {"model.safetensors"}
    for name in names - {"config.json"}:
        assert (folder / name).read_text() == (complete / name).read_text()
    config, of_complete = (json.loads((f / "config.json").read_text()) for f in (folder, complete))
    assert config == {key: of_complete[key] for key in config}
    assert of_complete.keys() - config.keys() == {"architectures", "dtype"}
    assert fetch.fetch_for_tokens(spec) == complete, "which is there by now"


@pytest.mark.slow
def test_a_plan_reads_no_weights(file: Path, cache: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    assert main(["plan", "--model", str(file), "--data", str(rows), "--on", "h100"]) == 0
    assert [*cache.rglob("config.json")]
    assert not [*cache.rglob("*.safetensors")]


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
def test_a_file_that_transformers_would_split_in_another_way_is_refused(
    cache: Path, tmp_path: Path
) -> None:
    """It loads the tokenizer of every qwen2 as a class with expressions of its own."""
    model = random_model("qwen2", num_hidden_layers=1)
    for pre, is_read in (("qwen2", True), ("smollm", False)):
        file = write_model(tmp_path / f"{pre}.gguf", model, byte_level(structure_of(pre)))
        with nullcontext() if is_read else refuses(ModelError, where=file.name):
            fetch.fetch_for_tokens(Model(name=str(file), dtype="fp32"))


def test_tokens_cached_before_are_not_those_of_a_changed_tokenizer(tmp_path: Path) -> None:
    hashes = {
        tokenizer_hash(read_file_tokenizer(header_like(pre, tmp_path), ""))
        for pre in ("gpt-2", "smollm", "default")
    }
    assert len(hashes) == 3


def bad(tmp_path: Path, name: str, data: bytes) -> Model:
    (tmp_path / name).write_bytes(data)
    return Model(name=str(tmp_path / name), dtype="bf16")


def test_bad_files_are_named(file: Path, cache: Path, tmp_path: Path) -> None:
    good = file.read_bytes()
    for name, data, words in (
        ("page.gguf", b"<html>", "is not a GGUF file"),
        ("empty.gguf", b"", "is not a GGUF file"),
        ("header.gguf", good[:200], "cannot be read as a model"),
        ("cut.gguf", good[: len(good) // 2], "cannot be read as a model"),
        ("junk.gguf", b"GGUF" + bytes(range(200)), "cannot be read as a model"),
    ):
        readers = [fetch.fetch]
        if name != "cut.gguf":  # which has all but its weights
            readers.append(fetch.fetch_for_tokens)
        for read in readers:
            with pytest.raises(ModelError, match=words) as caught:
                read(bad(tmp_path, name, data))
            assert caught.value.fix
            assert name in caught.value.where
    with refuses(ModelError, where="model.name", names=[tmp_path / "none.gguf"]):
        fetch.fetch(Model(name=str(tmp_path / "none.gguf")))
    assert not cache.exists() or not list(cache.iterdir()), "nothing half stays"


@pytest.mark.parametrize("read", [fetch.fetch, fetch.fetch_for_tokens])
def test_an_adapter_is_refused_with_the_base_that_it_is_for(
    read: Callable[[Model], Path], cache: Path, tmp_path: Path
) -> None:
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
    with refuses(ModelError, where=str(file), names=["my base-f16.gguf"], fix=[serves_both]):
        read(Model(name=str(file), dtype="bf16"))
    assert not list(cache.iterdir()), "nothing half stays"


def test_a_missing_package_and_a_cache_that_cannot_be_written(
    file: Path, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file"))
    with refuses(MachineError, fix=["TUNESMITH_CACHE"]) as caught:
        fetch.fetch(Model(name=str(file), dtype="bf16"))
    assert "TUNESMITH_CACHE" in caught.value.fix
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refuses(MachineError, where=str(file), names=["gguf"], fix=["pip install 'gguf>=0.19'"]):
        fetch.fetch(Model(name=str(file), dtype="bf16"))
