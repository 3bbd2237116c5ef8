"""Weights into memory: names, ties, growth, quantised companions, bounds on memory; and damaged
files.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from errors import refuses
from page_cache import resident
from ranks import run_ranks
from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.hub import fetch
from tunesmith.model import load, safetensors_files
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.model.weights import load_weights

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


@pytest.mark.parametrize(
    ("stored", "dtype"), [("float64", "fp32"), ("float16", "bf16"), ("bfloat16", "fp32")]
)
def test_dtypes_are_converted_as_torch_does(folder: Path, stored: str, dtype: str) -> None:
    rewrite(folder, lambda t: {n: v.to(getattr(torch, stored)) for n, v in t.items()})
    model = filled(folder, dtype=dtype)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name), tensor.to(DTYPES[dtype]))


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


def test_a_hook_gets_the_tensor_and_its_companions(folder: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    extras = {
        f"{name}.absmax": torch.arange(3, dtype=torch.uint8),
        f"{name}.quant_map": torch.arange(16.0),
        f"{name}.quant_state.bitsandbytes__nf4": torch.arange(9, dtype=torch.uint8),
    }
    rewrite(
        folder, lambda t: {**t, name: torch.arange(64, dtype=torch.uint8).view(-1, 1), **extras}
    )
    got: dict[str, torch.Tensor] = {}
    filled(
        folder, convert={name: lambda stored: got.update({k: v.read() for k, v in stored.items()})}
    )
    assert torch.equal(got.pop("").flatten(), torch.arange(64, dtype=torch.uint8))
    assert got.keys() == {"absmax", "quant_map", "quant_state.bitsandbytes__nf4"}
    assert all(torch.equal(got[k.removeprefix(f"{name}.")], v) for k, v in extras.items())
    with refuses(ModelError) as caught:
        filled(folder)
    assert "nf4" in caught.value.text()


def test_memory_of_its_own_is_not_touched_by_skipped_names(folder: Path) -> None:
    model = load.build_on_meta(load.load_configs(folder, FP32)[0], FP32)
    model.model.layers[0].mlp.extra = torch.nn.Parameter(torch.full((2,), 5.0))
    load.materialize(model, torch.device("cpu"))
    load_weights(model, folder, skip=lambda n: n.endswith("extra"))
    assert model.model.layers[0].mlp.extra.tolist() == [5.0, 5.0]
    with refuses(ModelError, names=["1 tensor", "model.layers.0.mlp.extra"]):
        load_weights(model, folder)


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


def fifo(name: str) -> Damage:
    def put(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return put


def device(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/dev/zero")


def named_format(folder: Path) -> None:
    as_type(torch.int8)(folder)
    config(folder, quantization_config={"quant_method": "compressed-tensors"})


LYING = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
UP = "model.layers.1.mlp.up_proj.weight"
# What is done to a good folder, and a value of the error.
BAD: list[tuple[Damage, str]] = [
    (tensors(lambda t: {n: v for n, v in t.items() if n != UP}), UP),
    (tensors(lambda t: {**t, "model.vision": torch.ones(1)}), "model.vision"),
    (stated(intermediate_size=96), "[128, 64] in model.safetensors, [96, 64]"),
    (stated(num_hidden_layers=3), "model.layers.2"),
    (
        tensors(lambda t: {**t, "lm_head.weight": torch.randn(272, 64)}),
        "tie_word_embeddings: false",
    ),
    (stated(tie_word_embeddings=False), "lm_head.weight"),
    (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1000]), "damaged"),
    (written(WEIGHTS, "<!doctype html>" * 9), "damaged"),
    (written(WEIGHTS, len(LYING).to_bytes(8, "little") + LYING + b"x" * 8), "damaged"),
    (as_type(torch.int8), "integers"),
    (
        tensors(lambda t: {n.replace("weight", "qweight"): v.int() for n, v in t.items()}),
        "GPTQ, AWQ",
    ),
    (named_format, "compressed-tensors"),
    (fifo(WEIGHTS), f"{WEIGHTS} is a named pipe"),
    (fifo("config.json"), "config.json is a named pipe"),
    (fifo("tokenizer.json"), "tokenizer.json is a named pipe"),
    (device, f"{WEIGHTS} is a device"),
    (written("config.json", f'{{"a": {"1" * 5000}}}'), "config.json"),
    (as_type(torch.float8_e4m3fn), "unsupported dtype"),
    (written("pytorch_model.bin", "x", WEIGHTS), "from transformers import AutoModelForCausalLM"),
    (written("tiny.gguf", "GGUF", WEIGHTS, "config.json"), "tiny.gguf"),
    (written("adapter_config.json", "{}", WEIGHTS, "config.json"), "adapter.from"),
    (lambda f: (f / WEIGHTS).unlink(), "weights"),
    (lambda f: (f / "config.json").unlink(), "config.json"),
    (written("config.json", '{\n "a": 1,\n}'), "config.json:3"),
    (written("config.json", "[]"), "JSON"),
    (written("config.json", b"\xff\xfe{}"), "UTF-8"),
    (written(INDEX, '{"weight_map": {"a": "model-1.safetensors"}}'), "model-1.safetensors"),
    (written(INDEX, '{"weight_map": {"a": "../a.safetensors"}}'), "'../a.safetensors'"),
    (written(INDEX, '{"weight_map": {"a": "a\\u0000"}}'), "folder"),
    (written(INDEX, "{}"), "weight_map"),
    (written(INDEX, "{"), f"{INDEX}:1"),
    (lambda f: (f / "tokenizer.json").unlink(), "model.tokenizer"),
    (written("tokenizer.json", "{"), "tokenizer"),
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


def test_the_values_of_hooks_are_looked_at_too(folder: Path) -> None:
    """Weights that are quantized as they are read, band by band."""
    rewrite(folder, lambda t: {**t, UP: t[UP].index_fill(0, torch.tensor([7]), torch.nan)})
    with refuses(ModelError, where="model.safetensors", names=[UP]):
        filled(folder, convert={UP: lambda stored: list(stored[""].bands())})


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
    # Code counts as memory from its first use on: the first load is not measured
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

    shape = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "vocab_size": 32000,
    }
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=8))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path)
    (found,) = run_ranks(1, measure, tmp_path)
    for dtype, extra, size in found:
        assert size > 90 << 20
        # the stage of 16 MiB where dtypes differ, and what the allocator and lazily loaded code
        # take
        assert extra < (24 << 20), (
            f"{dtype}: {extra / 2**20:.1f} MiB beside a model of {size / 2**20:.0f} MiB"
        )


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux can be told to drop pages"
)
def test_nothing_is_left_in_the_page_cache(folder: Path) -> None:
    file = folder / "model.safetensors"
    with file.open("rb+") as f:
        os.fsync(f.fileno())  # pages that are not written yet are never dropped
    file.read_bytes()
    if resident(file) < 50:
        pytest.skip("this file system does not cache")
    filled(folder)
    assert resident(file) == 0
