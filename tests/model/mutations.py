"""Seeded damage to a model's folder: bytes, JSON values and safetensors headers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    items = list(
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
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
