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


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def filled(folder: Path, rows: int | None = None, **more):
    model = load.build_on_meta(load.load_configs(folder, FP32)[0], FP32, rows=rows)
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


def test_a_checkpoint_of_the_backbone_alone(folder: Path) -> None:
    expected = filled(folder)
    rewrite(folder, lambda t: {n.removeprefix("model."): v for n, v in t.items()})
    assert same(filled(folder), expected)


def test_old_rotary_buffers_are_passed_over(folder: Path) -> None:
    expected = filled(folder)
    rewrite(folder, lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    assert same(filled(folder), expected)


def test_a_tied_head_may_be_stored_twice_or_under_either_name(folder: Path) -> None:
    expected = filled(folder)
    name = "model.embed_tokens.weight"
    rewrite(folder, lambda t: {**t, "lm_head.weight": t[name].clone()})
    assert same(filled(folder), expected)
    rewrite(folder, lambda t: {n: v for n, v in t.items() if n != name})
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
    spec = Model(name="here", dtype=dtype)
    model = load.build_on_meta(load.load_configs(folder, spec)[0], spec)
    load.materialize(model, torch.device("cpu"))
    load_weights(model, folder)
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
    with pytest.raises(ModelError, match=r"nf4"):
        filled(folder)


def test_memory_of_its_own_is_not_touched_by_skipped_names(folder: Path) -> None:
    model = load.build_on_meta(load.load_configs(folder, FP32)[0], FP32)
    model.model.layers[0].mlp.extra = torch.nn.Parameter(torch.full((2,), 5.0))
    load.materialize(model, torch.device("cpu"))
    load_weights(model, folder, skip=lambda n: n.endswith("extra"))
    assert model.model.layers[0].mlp.extra.tolist() == [5.0, 5.0]
    with refuses(ModelError, names=["1 tensor", "model.layers.0.mlp.extra"]):
        load_weights(model, folder)


def drop(folder: Path) -> None:
    rewrite(folder, lambda t: {n: v for n, v in t.items() if "layers.1.mlp.up" not in n})


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def lengthened(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"xx")


def lying_header(folder: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + b"x" * 8
    )


def odd_header(folder: Path) -> None:
    header = json.dumps({"w": [1, 2]}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def unread_type(folder: Path) -> None:
    rewrite(
        folder,
        lambda t: {n: v.to(torch.float8_e4m3fn) if "up_proj" in n else v for n, v in t.items()},
    )


def unread_tied_head(folder: Path) -> None:
    name = "model.embed_tokens.weight"
    rewrite(
        folder,
        lambda t: {**t, **{n: t[name].to(torch.float8_e4m3fn) for n in (name, "lm_head.weight")}},
    )


def index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def only_gguf(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    (folder / "tiny.gguf").write_bytes(b"GGUF")


def adapter(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


def short_embedding(folder: Path) -> None:
    rewrite(folder, lambda t: {n: v[:260] if "embed" in n else v for n, v in t.items()})


def int8(folder: Path) -> None:
    rewrite(folder, lambda t: {n: v.to(torch.int8) if "up_proj" in n else v for n, v in t.items()})


def gptq(folder: Path) -> None:
    def packed(tensors):
        found = {
            n.replace("weight", "qweight"): v.to(torch.int32)
            for n, v in tensors.items()
            if "proj" in n
        }
        return {**{n: v for n, v in tensors.items() if "proj" not in n}, **found}

    rewrite(folder, packed)


def named_format(folder: Path) -> None:
    int8(folder)
    config(folder, quantization_config={"quant_method": "compressed-tensors"})


def rewrite_header(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(json.loads(data[8 : 8 + length]))
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def twice(folder: Path) -> None:
    def again(header):
        text = json.dumps(header)
        return text.replace('"model.layers.0.input_layernorm.weight"', '"model.norm.weight"')

    rewrite_header(folder, again)


def overlapping(folder: Path) -> None:
    def moved(header):
        header["model.norm.weight"]["data_offsets"] = header[
            "model.layers.0.input_layernorm.weight"
        ]["data_offsets"]
        return header

    rewrite_header(folder, moved)


def fractions(folder: Path) -> None:
    def halved(header):
        header["model.norm.weight"]["data_offsets"] = [0.5, 256.5]
        return header

    rewrite_header(folder, halved)


def special(name: str):
    def put(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return put


def device(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")


def untied(folder: Path) -> None:
    rewrite(folder, lambda t: {**t, "lm_head.weight": torch.randn(272, 64)})


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


# what is done to a good folder -> words that the error must have
BAD = {
    "tensor missing": (drop, "1 tensor missing: model.layers.1.mlp.up_proj.weight"),
    "tensor too many": (lambda f: rewrite(f, lambda t: {**t, "model.vision": torch.ones(1)}), "model.vision"),
    "other shape": (lambda f: config(f, intermediate_size=96), "[128, 64] in model.safetensors, [96, 64] in the model"),
    "fewer layers": (lambda f: config(f, num_hidden_layers=1), "not part of this model: model.layers.1"),
    "more layers": (lambda f: config(f, num_hidden_layers=3), "tensors missing: model.layers.2"),
    "tied against the file": (untied, "tie_word_embeddings: false"),
    "untied without a head": (lambda f: config(f, tie_word_embeddings=False), "missing: lm_head.weight"),
    "cut off": (cut_off, "incomplete metadata"),
    "lengthened": (lengthened, "incomplete metadata"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
    "a web page": (lambda f: (f / "model.safetensors").write_bytes(b"<!doctype html>" * 9), "damaged"),
    "an LFS pointer": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "damaged"),
    "header is not JSON": (
        lambda f: (f / "model.safetensors").write_bytes(b"\4" + bytes(7) + b"abcd"), "invalid JSON in header"
    ),
    "header that lies": (lying_header, "invalid shape, data type, or offset"),
    "header of another form": (odd_header, "invalid JSON in header"),
    "embedding of fewer rows": (short_embedding, "[260, 64] in model.safetensors, [272, 64] in the model"),
    "int8": (int8, "2 tensors with integers"),
    "gptq": (gptq, "GPTQ, AWQ"),
    "a format that the config names": (named_format, "config.json calls them compressed-tensors"),
    "a name twice in the header": (twice, "invalid offset for tensor"),
    "overlapping tensors": (overlapping, "invalid offset for tensor"),
    "offsets in fractions": (fractions, "expected usize"),
    "a header in brackets": (lambda f: rewrite_header(f, lambda h: "[" * 20000), "invalid JSON in header"),
    "a fifo as weights": (special("model.safetensors"), "model.safetensors is a named pipe"),
    "a fifo as config": (special("config.json"), "config.json is a named pipe"),
    "a fifo as tokenizer": (special("tokenizer.json"), "tokenizer.json is a named pipe"),
    "a fifo as generation config": (special("generation_config.json"), "generation_config.json is a named pipe"),
    "a device as weights": (device, "model.safetensors is a device"),
    "more layers than anybody can build": (lambda f: config(f, num_hidden_layers=10**6), "num_hidden_layers"),
    "a number of 5,000 digits": (lambda f: (f / "config.json").write_text(f'{{"a": {"1" * 5000}}}'), "cannot be read"),
    "config in brackets": (lambda f: (f / "config.json").write_text("[" * 20000), "config.json cannot be read"),
    "text for a number": (lambda f: config(f, attention_dropout="much"), "attention_dropout"),
    "quantization as a list": (lambda f: config(f, quantization_config=[1]), "it must be a mapping"),
    "unread type": (unread_type, "unsupported dtype"),
    "unread type, tied twice": (unread_tied_head, "unsupported dtype"),
    "only pickles": (pickled, "from transformers import AutoModelForCausalLM"),
    "only a gguf": (only_gguf, "tiny.gguf"),
    "an adapter": (adapter, "adapter.from"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "there are no weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "broken config": (lambda f: (f / "config.json").write_text('{\n "a": 1,\n}'), "config.json:3"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "config is not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "not UTF-8"),
    "config of a wrong type": (lambda f: config(f, rms_norm_eps="small"), "Transformers cannot read the config"),
    "config that cannot be built": (lambda f: config(f, hidden_act="nothing"), "cannot build this llama"),
    "index names a missing file": (
        lambda f: index(f, '{"weight_map": {"a": "model-1.safetensors"}}'), "1 of 1 weight file: model-1.safetensors",
    ),
    "index that leaves the folder": (
        lambda f: index(f, '{"weight_map": {"a": "../a.safetensors"}}'), "names '../a.safetensors', which is not in its",
    ),
    "index of an absolute path": (
        lambda f: index(f, json.dumps({"weight_map": {"a": str(f / "model.safetensors")}})), "which is not in its folder",
    ),
    "index with a NUL": (lambda f: index(f, '{"weight_map": {"a": "a\\u0000"}}'), "which is not in its folder"),
    "index without a map": (lambda f: index(f, "{}"), "no weight_map"),
    "index is not JSON": (lambda f: index(f, "{"), "model.safetensors.index.json:1"),
    "no tokenizer": (no_tokenizer, "model.tokenizer"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer cannot be read"),
}  # fmt: skip


def use(folder: Path) -> None:
    found = fetch.fetch(Model(name=str(folder), dtype="fp32"))
    filled(found)
    load_tokenizer(found, FP32)


@pytest.mark.parametrize("case", sorted(BAD))
def test_a_bad_folder_is_named_with_what_mends_it(folder: Path, case: str) -> None:
    break_it, words = BAD[case]
    break_it(folder)
    with pytest.raises(ModelError) as caught:
        use(folder)
    text = caught.value.text()
    assert words in text
    assert caught.value.where
    assert caught.value.fix, text


DAMAGED = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("stored", "dtype"), [("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp16")]
)
def test_a_weight_that_is_not_finite_is_named_with_its_file(
    folder: Path, stored: str, dtype: str, value: float
) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.to(DTYPES[stored]) for name, tensor in tensors.items()}
        tensors[DAMAGED][3, 5] = value
        return tensors

    rewrite(folder, damage)
    spec = Model(name="x", dtype=dtype)
    model = load.build_on_meta(load.load_configs(folder, spec)[0], spec)
    load.materialize(model, torch.device("cpu"))
    with refuses(ModelError, where="model.safetensors", names=[DAMAGED], fix=["tunesmith fetch"]):
        load_weights(model, folder)


def test_large_finite_weights_are_loaded(folder: Path) -> None:
    """Their sum, and the distance between two of them, are beyond what the dtype holds."""

    def enlarge(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
        tensors[DAMAGED][0, :2] = torch.tensor([65504.0, -65504.0])
        return tensors

    rewrite(folder, enlarge)
    model = load.build_on_meta(load.load_configs(folder, FP32)[0], Model(name="x", dtype="fp16"))
    load.materialize(model, torch.device("cpu"))
    load_weights(model, folder)
    assert dict(model.named_parameters())[DAMAGED][0, 1] == -65504


def test_the_values_of_hooks_are_looked_at_too(folder: Path) -> None:
    """Weights that are quantized as they are read, band by band."""
    rewrite(
        folder, lambda t: {**t, DAMAGED: t[DAMAGED].index_fill(0, torch.tensor([7]), torch.nan)}
    )
    with refuses(ModelError, where="model.safetensors", names=[DAMAGED]):
        filled(folder, convert={DAMAGED: lambda stored: list(stored[""].bands())})


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
