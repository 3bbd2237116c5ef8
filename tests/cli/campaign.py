"""Random bad inputs: a good recipe, its rows, its model, its run or its command line, spoilt by
what a seed draws.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli.bad_world import World
from recipes import recipe
from tunesmith.config.dump import to_yaml
from tunesmith.config.names import keys
from tunesmith.config.schema import is_section

HUGE = "9" * 5000
# Values that are wrong nearly everywhere, as a recipe or a command line would write them.
VALUES = [
    "", "~", "null", "true", "yes", "0", "-1", "1.5", "1e300", "1e999", "-.inf", ".nan", HUGE, f"-{HUGE}", "0x" + "f" * 300,
    "2**63", "9223372036854775808", "1e-320", "[]", "{}", "[[]]", "[1, 2, 3]", "{a: 1}", "'  '", '"\\0"', '"\\ud800"', "é" * 9,
    "\u0661\u0662", "\u202e", "\U0001f600", "x" * 70_000, "3 weeks", "1e300 examples", "0 epochs", "-5 steps", "1e300 tokens",
    "9999999999 steps", "200 %", "0.0001 epochs", "1 h", "../..", "/", ".", "~nobody.here/x", "$HOME/x", "/dev/null",
    "/dev/zero", "/proc/self/mem", "https://example.org/x", "org/name", "a/b/c/d", "&a [*a]", "!!python/name:os.system", "<<: 3",
    "2026-11-20", "on", "none", "auto", "lora", "nf4", "fp8", "fp16", "messages", "text", "train[:0]", "train[-5:5]", "test",
    "{source: 3}", "[{source: train.jsonl}, {source: train.jsonl, weight: 1e12}]", "{source: train.jsonl, weight: 1e-300}",
]  # fmt: skip
# The same for JSON: rows and the files of a model.
JSON = [
    None, True, 0, -1, 1.5, 1e300, float("nan"), 10**5000 % (10**4000) or 1, 2**63, "", " ", "\0", "\ud800", "x" * 70_000,
    [], {}, [[]], [None], {"a": {"b": []}}, ["x"] * 99, "é\u202e", [{"role": "user"}], "[1, 2", -(2**40),
]  # fmt: skip


def leaf_keys() -> list[str]:
    return [key for key, (_, hint) in keys().items() if not is_section(hint)]


def spoilt_bytes(draw: random.Random, content: bytes) -> bytes:
    """Text or a binary file with one thing done to it."""
    at = draw.randrange(len(content) + 1)
    lines = content.splitlines(keepends=True) or [b""]
    row = draw.randrange(len(lines))
    ways: list[Callable[[], bytes]] = [
        lambda: content[:at],
        lambda: content[at:],
        lambda: content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :],
        lambda: content[:at] + draw.choice([b"\0", b"\xff", b"\xef\xbb\xbf", b"\t", b'"', b"{", b"[", b":", b"\r", b"- ", b"&a "]) + content[at:],
        lambda: content[:at] + b"[" * 3000 + content[at:],
        lambda: b"".join([*lines[:row], *lines[row + 1 :]]),
        lambda: b"".join([*lines[:row], lines[row], *lines[row:]]),
        lambda: b"".join(draw.sample(lines, len(lines))),
        lambda: content.replace(b"\n", b"\r\n"),
        lambda: content.decode("utf-8", "replace").encode(draw.choice(["utf-16", "utf-16-le", "utf-32", "utf-7"]), "replace"),
        lambda: b"\xef\xbb\xbf" + content,
        lambda: b"",
        lambda: bytes(draw.randrange(256) for _ in range(300)),
    ]  # fmt: skip
    return draw.choice(ways)()


def spoil_file(draw: random.Random, path: Path) -> None:
    """One thing done to a file: its content, or what it is."""
    kind = draw.random()
    if kind < 0.85:
        path.write_bytes(spoilt_bytes(draw, path.read_bytes()))
        return
    path.unlink()
    draw.choice([
        lambda: None, path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path), lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/nowhere"),
    ])()  # fmt: skip


def spoil_json(draw: random.Random, value: Any) -> Any:
    """Plain values with one of them, at any depth, replaced, taken away or given another name."""
    if isinstance(value, dict | list) and value and draw.random() < 0.8:
        at = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        inside, way = value[at], draw.random()
        copy = value.copy()
        if way < 0.15:
            del copy[at]
        elif way < 0.25 and isinstance(copy, dict):
            copy[at + "x"] = copy.pop(at)
        else:
            copy[at] = spoil_json(draw, inside)
        return copy
    return draw.choice(JSON)


def spoil_json_file(draw: random.Random, path: Path) -> None:
    text = json.dumps(spoil_json(draw, json.loads(path.read_text())))
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def bad_recipe(draw: random.Random, world: World) -> list[str]:
    """A recipe file of which a part is wrong; what is still good trains two steps."""
    path, way = world.folder / "recipe.yaml", draw.random()
    if way < 0.5:
        path.write_bytes(spoilt_bytes(draw, path.read_bytes()))
    elif way < 0.8:
        lines = path.read_text().splitlines()
        row = draw.choice(
            [i for i, line in enumerate(lines) if not line.startswith(("output_dir", "  duration"))]
        )
        lines[row] = f"{lines[row].partition(':')[0]}: {draw.choice(VALUES)}"
        path.write_text("\n".join(lines), encoding="utf-8")
    elif way < 0.9:
        path.write_text(
            f"{path.read_text()}{draw.choice([*leaf_keys(), 'lr', 'extends', '1', 'é'])}: {draw.choice(VALUES)}\n"
        )
    else:
        spoil_file(draw, path)
    return ["train", str(path), "train.duration=2 steps", f"output_dir={world.out}"]


def bad_words(draw: random.Random, world: World) -> list[str]:
    """Overrides and options that are wrong."""
    free = [
        key
        for key in leaf_keys()
        if key not in ("output_dir", "train.duration", "log.tensorboard_dir")
    ]
    words = [f"{draw.choice(free)}={draw.choice(VALUES)}" for _ in range(draw.randint(1, 3))]
    odd = ["--lr", "--seed=3", "--", "-", "=", "x=", "train.0.seed=1", "data.train.7.split=x", "data.train.²=1", "a" + ".b" * 2000 + "=1",
           "\udcff\udcfe=3", "train.seed", "data={train: null}", "adapter={kind: none, rank: 3}", "extends=x", "--json=3"]  # fmt: skip
    if draw.random() < 0.3:
        words.insert(draw.randrange(len(words) + 1), draw.choice(odd))
    path = draw.choice(
        [str(world.folder / "recipe.yaml")] * 9
        + ["", "/dev/zero", ".", "x" * 5000, "\0", "/dev/stdin"]
    )
    verb = draw.choice(["train", "train", "train", "data", "fetch"])
    return [
        verb,
        path,
        *words,
        *([] if draw.random() < 0.1 else ["train.duration=2 steps", f"output_dir={world.out}"]),
    ]


def bad_duration(draw: random.Random, world: World) -> list[str]:
    """Any value at any key, shown and not trained: a duration may be as long as it likes."""
    words = [f"{draw.choice(leaf_keys())}={draw.choice(VALUES)}" for _ in range(draw.randint(1, 4))]
    return [
        "recipes",
        "show",
        draw.choice([str(world.folder / "recipe.yaml"), "smollm2-135m-lora"]),
        *words,
    ]


def bad_rows(draw: random.Random, world: World) -> list[str]:
    """Rows of which one is wrong, in one of four kinds of file."""
    path = world.folder / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kind = draw.choice(["jsonl", "jsonl", "json", "csv", "parquet"])
    fresh = path.with_suffix(f".{kind}")
    path.unlink()
    if kind in ("jsonl", "json") and draw.random() < 0.6:
        rows[draw.randrange(len(rows))] = spoil_json(draw, rows[0])
    texts = [json.dumps(row, ensure_ascii=draw.random() < 0.5) for row in rows]
    if kind == "csv":
        text = "prompt,completion\n" + "".join(
            f'"{row["prompt"]}","{row["completion"]}"\n' for row in rows
        )
        fresh.write_text(draw.choice([text, text.replace(",", ";"), text.replace('"', "")]))
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), fresh)
    else:
        text = "\n".join(texts) if kind == "jsonl" else f"[{','.join(texts)}]"
        fresh.write_bytes(text.encode("utf-8", "surrogatepass"))
    if kind not in ("jsonl", "json") or draw.random() < 0.5:
        spoil_file(draw, fresh)
    shape = draw.choice(["prompt-completion"] * 4 + ["messages", "alpaca", "sharegpt", "text"])
    verb = draw.choice(["train", "train", "data"])
    return [
        verb,
        str(world.folder / "recipe.yaml"),
        f"data.train={{source: {fresh}, format: {shape}}}",
        "train.duration=2 steps",
    ]


def bad_model(draw: random.Random, world: World) -> list[str]:
    """A copy of the model with one of its files spoilt."""
    folder = Path(shutil.copytree(world.tiny, world.folder / "model"))
    path = draw.choice(sorted(folder.iterdir()))
    if path.suffix == ".json" and draw.random() < 0.7:
        spoil_json_file(draw, path)
    else:
        spoil_file(draw, path)
    return ["train", str(world.recipe(tiny=folder)), "train.duration=2 steps"]


def bad_run(draw: random.Random, world: World) -> list[str]:
    """A run of four steps with one of its files spoilt, that is to go on or to be used."""
    out = world.begun()
    path = draw.choice(
        [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock"]
    )
    if path.suffix == ".json" and draw.random() < 0.5:
        spoil_json_file(draw, path)
    else:
        spoil_file(draw, path)
    held = str(world.folder / "held.jsonl")
    target = draw.choice([out, out, out / "final", out / "checkpoint-4"])
    return draw.choice([
        world.again(), world.again(), world.again("--fresh"),
        ["generate", str(target), "--input", held, "--output", "-", "--max-new-tokens", "2", "--device", "cpu"],
        ["eval", str(target), "--data", held, "--device", "cpu"],
        ["merge", str(target), "--output", draw.choice([str(out / "merged"), str(path)]), "--device", "cpu"],
    ])  # fmt: skip


KINDS = [
    bad_recipe,
    bad_recipe,
    bad_words,
    bad_words,
    bad_duration,
    bad_rows,
    bad_rows,
    bad_model,
    bad_model,
    bad_run,
]


def bad_input(seed: int, world: World) -> list[str]:
    """Spoil the world as `seed` draws it -> what is typed."""
    draw = random.Random(f"campaign {seed}")
    values = recipe(world.tiny, world.folder, held=False, train={"duration": "2 steps"})
    world.write("recipe.yaml", to_yaml(values))
    return draw.choice(KINDS)(draw, world)
