"""Folders damaged at random, by fixed seeds: each loads or is refused by name. No other error, no
hang.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from runs import peft_model
from time_limit import time_limit
from tunesmith.adapter import lora, peft_files
from tunesmith.config.schema import Model
from tunesmith.errors import UsageError
from tunesmith.hub.fetch import fetch
from tunesmith.hub.model_files import read_model_files
from tunesmith.model import load
from tunesmith.model.tokenizer import eos_ids
from tunesmith.model.weights import load_weights

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", "x", "../x",
    "/dev/zero", "\0", "9" * 5000, [], [1], ["x"], [None], {}, {"x": 1}, [[[]]], {"a": {"b": []}},
)  # fmt: skip

# Keys that a good file may leave out.
OPTIONS = (
    "quantization_config", "sliding_window", "num_experts", "layer_types", "vision_config", "attention_dropout", "auto_map",
    "rope_scaling", "eos_token_id", "model_max_length", "extra_special_tokens", "added_tokens_decoder", "weight_map",
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside `value`, the outermost left out; of a long list or object, the
    first few.
    """
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    found = []
    for key, inner in items[:40]:
        found += [(*path, key), *_places(inner, (*path, key))]
    return found


def _json(text: bytes, draw: random.Random) -> bytes:
    """One value of a JSON document replaced, removed, or copied under another name."""
    document = json.loads(text)
    *path, last = draw.choice(_places(document))
    inner = document
    for key in path:
        inner = inner[key]
    way = draw.randrange(5)
    if way == 0:
        del inner[last]
    elif way == 1 and isinstance(inner, dict):
        inner[str(last) + "_x"] = inner.pop(last)
    else:
        inner[last] = draw.choice(VALUES)
    return json.dumps(document).encode()


def _option(text: bytes, draw: random.Random) -> bytes:
    """A JSON object with one more key, or another value of it."""
    return json.dumps({**json.loads(text), draw.choice(OPTIONS): draw.choice(VALUES)}).encode()


def _bytes(data: bytes, draw: random.Random) -> bytes:
    """Cut off, emptied, changed in a few bytes, in another encoding, nested, or preceded by
    something.
    """
    start = draw.randrange(len(data))
    few = bytearray(data)
    for _ in range(draw.randrange(1, 6)):
        few[draw.randrange(min(len(few), 4000))] = draw.randrange(256)
    ways: list[Callable[[], bytes]] = [
        lambda: data[:start], lambda: b"", lambda: bytes(few), lambda: data[:9000].decode("latin1").encode("utf-16"),
        lambda: b"[" * 50_000, lambda: b"\xef\xbb\xbf" + data, lambda: data[start:] + data[:start], lambda: data + data,
        lambda: b"<!doctype html><title>404</title>", lambda: b"null", lambda: b"[]", lambda: b"{}", lambda: b"0" * 6000,
    ]  # fmt: skip
    return draw.choice(ways)()


def _header(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header lies, or whose length of it does."""
    length = int.from_bytes(data[:8], "little")
    if draw.random() < 0.2:
        wrong = draw.choice([0, 1, length - 1, length + 1, len(data), 10**8, 2**63, 2**64 - 1])
        return wrong.to_bytes(8, "little") + data[8:]
    text = _json(data[8 : 8 + length], draw)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def mutate(folder: Path, seed: int) -> str:
    """Damage one file of `folder`, chosen by the seed; return what was done, for the message of a
    failing test.
    """
    draw = random.Random(seed)
    file = draw.choice(sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")))
    data = file.read_bytes()
    tensors = file.suffix == ".safetensors"
    way = draw.choice(
        [_header, _header, _bytes] if tensors else [_json, _json, _option, _option, _bytes]
    )
    file.write_bytes(way(data, draw))
    return f"seed {seed}: {way.__name__} of {file.name}"


SECONDS = 30  # a load takes a tenth of one


def use_model(folder: Path) -> None:
    """All that `train` reads of a model's folder."""
    model = Model(name=str(folder), dtype="fp32")
    files = read_model_files(fetch(model), model)
    eos_ids(folder, files.tokenizer)
    built = load.build_on_meta(files.config, model, rows=files.vocab_rows)
    load.materialize(built, torch.device("cpu"))
    load_weights(built, folder)


def outcome(use: Callable[[], Any], what: str) -> str:
    with time_limit(SECONDS, what):
        try:
            use()
        except UsageError as error:
            found = error
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        else:
            return "loaded"
    assert found.where, what
    assert found.fix, what
    return "refused"


LANES = [
    pytest.param(range(6), marks=pytest.mark.slow),
    pytest.param(range(6, 80), marks=pytest.mark.nightly),
]


@pytest.mark.parametrize("seeds", LANES, ids=["share", "campaign"])
def test_a_damaged_model_loads_or_is_refused_by_name(
    seeds: range, tiny: Path, tmp_path: Path
) -> None:
    good = Path(shutil.copytree(tiny, tmp_path / "good"))
    tokens = '{"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}'
    (good / "special_tokens_map.json").write_text(tokens)
    shards = Path(shutil.copytree(good, tmp_path / "shards"))
    (shards / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(shards, max_shard_size="100KB")
    found: Counter[str] = Counter()
    for seed in seeds:
        for whole in (good, shards):
            folder = Path(shutil.copytree(whole, tmp_path / f"{seed}"))
            what = mutate(folder, seed)
            found[outcome(lambda folder=folder: use_model(folder), what)] += 1
            shutil.rmtree(folder)
    assert min(found["loaded"], found["refused"]) > (10 if 6 in seeds else 0), found


KEYS = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora")


@pytest.mark.parametrize("seeds", LANES, ids=["share", "campaign"])
def test_a_damaged_adapter_loads_or_is_refused_by_name(
    seeds: range, tiny: Path, tmp_path: Path
) -> None:
    peft_model(tiny).save_pretrained(tmp_path / "good")
    spec = Model(name=str(tiny), dtype="fp32")
    base = load.build_on_meta(load.load_configs(tiny, spec)[0], spec)
    load.materialize(base, torch.device("cpu"))
    load_weights(base, tiny)
    lora.attach_lora(base, peft_files.read_adapter(tmp_path / "good"), seed=0)
    values = list(product(KEYS, VALUES))
    found: Counter[str] = Counter()
    for case in [*(values if 6 in seeds else values[:: len(KEYS) * 2 + 1]), *seeds]:
        folder = Path(shutil.copytree(tmp_path / "good", tmp_path / "damaged"))
        if isinstance(case, tuple):
            file = folder / "adapter_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), case[0]: case[1]}))
            what = f"{case[0]}: {str(case[1])[:40]}"
        else:
            what = mutate(folder, case)
        found[outcome(lambda folder=folder: peft_files.load_adapter(base, folder), what)] += 1
        shutil.rmtree(folder)
    assert min(found["loaded"], found["refused"]) > (20 if 6 in seeds else 0), found
