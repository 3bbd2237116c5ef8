"""Weights into memory: names, ties, growth, bounds on memory; and damaged files."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from errors import refuses
from ranks import run_ranks
from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.hub import fetch
from tunesmith.model.arch import load
from tunesmith.model.arch.tokenizer import load_tokenizer
from tunesmith.model.known.dtypes import DTYPES
from tunesmith.model.weights import safetensors_files
from tunesmith.model.weights.weights import load_weights

pytestmark = pytest.mark.slow

FP32 = Model(name="here", dtype="fp32")
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def filled(folder: Path, rows: int | None = None, dtype: str = "fp32", **more):
    spec = Model(name="here", dtype=dtype)
    model = load.build_on_meta(load.load_configs(folder, spec)[0], spec, rows=rows)
    load.materialize(model, torch.device("cpu"))
    load_weights(model, folder, **more)
    return model


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(change(tensors), folder / "model.safetensors")


def config(folder: Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def same(left, right) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True)
    )


OTHERWISE = {
    "the backbone alone": lambda t: {n.removeprefix("model."): v for n, v in t.items()},
    "old rotary buffers": lambda t: {
        **t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)
    },
    "a tied head twice": lambda t: {**t, "lm_head.weight": t[EMBEDDING].clone()},
    "a tied head under its own name": lambda t: {
        **{n: v for n, v in t.items() if n != EMBEDDING}, "lm_head.weight": t[EMBEDDING]
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_other_names_are_read(name: str, folder: Path) -> None:
    expected = filled(folder)
    rewrite(folder, OTHERWISE[name])
    model = filled(folder)
    assert same(model, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shards_and_their_index(folder: Path) -> None:
    expected = filled(folder)
    sharded = folder / "shards"
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(
        sharded, max_shard_size="100KB"
    )
    files = list(safetensors_files.read_headers(sharded))
    assert len(files) > 1
    assert same(filled(sharded), expected)

    (sharded / "below").mkdir()
    for file in files:
        file.rename(sharded / "below" / file.name)
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-", "below/model-"))
    assert same(filled(sharded), expected), "shards in a subfolder"


def test_new_rows_are_the_mean_of_the_old(folder: Path) -> None:
    rewrite(folder, lambda t: {**t, "lm_head.weight": torch.randn(272, 64)})
    config(folder, tie_word_embeddings=False)
    model = filled(folder, rows=320, grow_from=272)
    for module in (model.model.embed_tokens, model.lm_head):
        assert module.weight.shape == (320, 64)
        expected = module.weight[:272].mean(0)
        assert all(torch.equal(row, module.weight[272]) for row in module.weight[273:])
        # A sum of 272 numbers in another order, which goes by where in memory they lie.
        torch.testing.assert_close(module.weight[272], expected, rtol=1e-5, atol=1e-7)


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Damage = Callable[[Path], object]


def tensors(change: Callable[[dict], dict]) -> Damage:
    return lambda folder: rewrite(folder, change)


def as_type(dtype: torch.dtype) -> Damage:
    return tensors(lambda t: {n: v.to(dtype) if "up_proj" in n else v for n, v in t.items()})


def stated(**values: object) -> Damage:
    return lambda folder: config(folder, **values)


def written(name: str, data: str | bytes, *without: str) -> Damage:
    def write(folder: Path) -> None:
        for other in without:
            (folder / other).unlink()
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return write


def fifo(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


UP = "model.layers.1.mlp.up_proj.weight"
# What is done to a good folder, and a value of the error.
BAD: list[tuple[Damage, str]] = [
    (tensors(lambda t: {n: v for n, v in t.items() if n != UP}), UP),
    (tensors(lambda t: {**t, "model.vision": torch.ones(1)}), "model.vision"),
    (stated(intermediate_size=96), "[128, 64] in model.safetensors, [96, 64]"),
    (tensors(lambda t: {**t, "lm_head.weight": torch.randn(272, 64)}), "tie_word_embeddings"),
    (stated(tie_word_embeddings=False), "lm_head.weight"),
    (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1000]), "damaged"),
    (as_type(torch.int8), "integers"),
    (fifo, f"{WEIGHTS} is a named pipe"),
    (as_type(torch.float8_e4m3fn), "unsupported dtype"),
    (written("pytorch_model.bin", "x", WEIGHTS), "from transformers import AutoModelForCausalLM"),
    (written("tiny.gguf", "GGUF", WEIGHTS, "config.json"), "tiny.gguf"),
    (written("adapter_config.json", "{}", WEIGHTS, "config.json"), "adapter.from"),
    (lambda f: (f / WEIGHTS).unlink(), "weights"),
    (written("config.json", '{\n "a": 1,\n}'), "config.json:3"),
    (written("config.json", "[]"), "JSON"),
    (written(INDEX, '{"weight_map": {"a": "model-1.safetensors"}}'), "model-1.safetensors"),
    (written(INDEX, '{"weight_map": {"a": "../a.safetensors"}}'), "'../a.safetensors'"),
    (written(INDEX, '{"weight_map": {"a": "."}}'), "'.'"),
    (lambda f: (f / "tokenizer.json").unlink(), "model.tokenizer"),
]


@pytest.mark.parametrize(("damage", "fact"), BAD)
def test_a_bad_folder_is_named_with_what_mends_it(folder: Path, damage: Damage, fact: str) -> None:
    damage(folder)
    with refuses(ModelError) as caught:
        found = fetch.fetch(Model(name=str(folder), dtype="fp32"))
        filled(found)
        load_tokenizer(found, FP32)
    text = caught.value.text()
    assert fact in text
    assert caught.value.where
    assert caught.value.fix, text


@pytest.mark.parametrize(
    ("stored", "dtype", "value"),
    [("fp32", "bf16", torch.nan), ("bf16", "bf16", torch.inf), ("fp16", "fp16", -torch.inf)],
)
def test_a_weight_that_is_not_finite_is_named_with_its_file(
    folder: Path, stored: str, dtype: str, value: float
) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.to(DTYPES[stored]) for name, tensor in tensors.items()}
        tensors[UP][3, 5] = value
        return tensors

    rewrite(folder, damage)
    with refuses(ModelError, where="model.safetensors", names=[UP], fix=["tunesmith fetch"]):
        filled(folder, dtype=dtype)


def test_large_finite_weights_are_loaded(folder: Path) -> None:
    """Their sum, and the distance between two of them, are beyond what the dtype holds."""

    def enlarge(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
        tensors[UP][0, :2] = torch.tensor([65504.0, -65504.0])
        return tensors

    rewrite(folder, enlarge)
    model = filled(folder, dtype="fp16")
    assert dict(model.named_parameters())[UP][0, 1] == -65504


def status(key: str) -> int:
    return next(
        int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key)
    )


def measure(folder: Path) -> list[tuple[str, int, int]]:
    """Bytes beside each model at the peak of loading it, and its own."""
    # glibc keeps what was freed, more of it each time: what is taken next would not show
    M_MMAP_THRESHOLD = -3
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 << 10)
    found = []
    for dtype in ("bf16", "bf16", "fp32"):
        spec = Model(name="x", dtype=dtype)
        model = load.build_on_meta(load.load_configs(folder, spec)[0], spec)
        load.materialize(model, torch.device("cpu"))
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        load_weights(model, folder)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        found.append((dtype, status("VmHWM") - before - size, size))
        del model
    return found[1:]


@pytest.mark.nightly
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc"
)
def test_peak_memory_is_the_model_and_one_slice(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=8)).save_pretrained(tmp_path)
    (found,) = run_ranks(1, measure, tmp_path)
    for dtype, extra, size in found:
        assert size > 90 << 20
        # The stage of 16 MiB where dtypes differ, the allocator, and lazily loaded code.
        assert extra < (24 << 20), f"{dtype}: {extra} bytes beside a model of {size}"
