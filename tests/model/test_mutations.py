"""Folders damaged at random, by fixed seeds: no other error than a refusal, and no hang."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
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
from tunesmith.model.arch import load
from tunesmith.model.arch.tokenizer import eos_ids
from tunesmith.model.weights.weights import load_weights

VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 7, 2**63, 10**30, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", "x",
    "../x", "/dev/zero", "\0", "9" * 5000, [], [1], ["x"], [None], {}, {"x": 1}, {"a": {"b": []}},
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside `value`; of a long list or object, of the first ones."""
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


def _bytes(data: bytes, draw: random.Random) -> bytes:
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
    length = int.from_bytes(data[:8], "little")
    if draw.random() < 0.2:
        wrong = draw.choice([0, 1, length - 1, length + 1, len(data), 10**8, 2**63, 2**64 - 1])
        return wrong.to_bytes(8, "little") + data[8:]
    text = _json(data[8 : 8 + length], draw)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def mutate(folder: Path, seed: int) -> str:
    """Damage one file of `folder`, chosen by the seed; return what was done."""
    draw = random.Random(seed)
    file = draw.choice(sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")))
    data = file.read_bytes()
    tensors = file.suffix == ".safetensors"
    way = draw.choice([_header if tensors else _json, _bytes])
    file.write_bytes(way(data, draw))
    return f"seed {seed}: {way.__name__} of {file.name}"


def use(folder: Path, base: Path) -> None:
    """All that `train` reads of a model's folder, or of an adapter's."""
    if (folder / "adapter_config.json").exists():
        tuned = AutoModelForCausalLM.from_pretrained(base)
        lora.attach_lora(tuned, peft_files.read_adapter(folder), seed=0)
        peft_files.load_adapter(tuned, folder)
        return
    model = Model(name=str(folder), dtype="fp32")
    files = read_model_files(fetch(model), model)
    eos_ids(folder, files.tokenizer)
    built = load.build_on_meta(files.config, model, rows=files.vocab_rows)
    load.materialize(built, torch.device("cpu"))
    load_weights(built, folder)


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(range(6), marks=pytest.mark.slow),
        pytest.param(range(6, 80), marks=pytest.mark.nightly),
    ],
)
def test_a_damaged_model_or_adapter_loads_or_is_refused_by_name(
    seeds: range, tiny: Path, tmp_path: Path
) -> None:
    good = Path(shutil.copytree(tiny, tmp_path / "good"))
    tokens = '{"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}'
    (good / "special_tokens_map.json").write_text(tokens)
    shards = Path(shutil.copytree(good, tmp_path / "shards"))
    (shards / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(shards, max_shard_size="100KB")
    adapter = tmp_path / "adapter"
    peft_model(tiny).save_pretrained(adapter)
    found: Counter[str] = Counter()
    for seed in seeds:
        for whole in (good, shards, adapter):
            folder = Path(shutil.copytree(whole, tmp_path / f"{seed}"))
            what = mutate(folder, seed)
            print(what)  # what pytest shows of a seed that fails
            with time_limit(30, what):  # a load takes a tenth of a second
                try:
                    use(folder, tiny)
                    found["loaded"] += 1
                except UsageError as error:
                    found["refused" if error.where and error.fix else what] += 1
            shutil.rmtree(folder)
    assert found.keys() <= {"loaded", "refused"}
    assert min(found["loaded"], found["refused"]) > (10 if 6 in seeds else 0), found
