"""Random bad inputs and damaged runs: no internal error, no hang, and no file of the user's touched.

`CAMPAIGN=500 pytest tests/cli/test_campaign.py` takes 500 of them, from seed 0 on;
`CAMPAIGN=317-317` one.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cli.bad_world import World, snapshot
from errors import is_internal
from invoke import invoke
from time_limit import time_limit
from tunesmith.config.names import keys
from tunesmith.config.schema import is_section
from tunesmith.tools.report.page import render_page
from tunesmith.tools.report.run_files import RunFiles

pytestmark = pytest.mark.nightly

SECONDS = 120  # a hang
FIRST, _, LAST = os.environ.get("CAMPAIGN", "100").rpartition("-")
SEEDS = range(int(FIRST or 0), int(LAST) + bool(FIRST))

HUGE = "9" * 5000
# Values that are wrong nearly everywhere, as a recipe or a command line would write them.
VALUES = [
    "", "~", "true", "0", "-1", "1.5", "1e300", "1e999", "-.inf", ".nan", HUGE, f"-{HUGE}", "0x" + "f" * 300, "2**63", "1e-320",
    "[]", "{}", "[[]]", "[1, 2, 3]", "{a: 1}", "'  '", '"\\0"', '"\\ud800"', "é" * 9, "\u0661\u0662", "\u202e", "\U0001f600",
    "x" * 70_000, "3 weeks", "1e300 examples", "0 epochs", "-5 steps", "9999999999 steps", "200 %", "0.0001 epochs", "1 h", "../..",
    "/", ".", "~nobody.here/x", "$HOME/x", "/dev/null", "/dev/zero", "/proc/self/mem", "https://example.org/x", "org/name",
    "a/b/c/d", "&a [*a]", "!!python/name:os.system", "<<: 3", "2026-11-20", "none", "auto", "nf4", "fp16", "messages", "text",
    "train[:0]", "train[-5:5]", "{source: 3}", "{source: train.jsonl, weight: 1e-300}",
]  # fmt: skip
# The same for JSON: rows and the files of a model or a run.
JSON = [
    None, True, 0, -1, 1.5, 1e300, float("nan"), 10**400, -(10**400), 2**63, "", " ", "\0", "\ud800", "x" * 70_000, "NaN", [], {},
    [[]], [None], {"a": {"b": []}}, ["x"] * 99, "é\u202e", [{"role": "user"}], "[1, 2",
]  # fmt: skip
# What a run leaves beside its records by the way it ended.
ENDINGS: dict[str, Any] = {
    "failure.json": {"what": "out of memory", "where": "step 3", "last_step": 3, "cause": "memory", "rank": 0, "phase": "step"},
    "stopped.json": {"signal": None, "reason": "memory", "step": 3, "figures": {"free_bytes": 5}},
    "running.json": {"process": 4711, "host": "here", "boot": "", "oom_kills": 0, "began": "2026-01-01 10:00:00"},
}  # fmt: skip
LEAVES = [key for key, (_, hint) in keys().items() if not is_section(hint)]


def spoilt_bytes(draw: random.Random, content: bytes) -> bytes:
    """Text or a binary file with one thing done to it."""
    at = draw.randrange(len(content) + 1)
    lines = content.splitlines(keepends=True) or [b""]
    row = draw.randrange(len(lines))
    deep = draw.choice([b"[", b'{"a":'])
    added = draw.choice([b"\0", b"\xff", b"\xef\xbb\xbf", b"\t", b'"', b"{", b"[", b":", b"\r", b"- ", b"&a ", b"NaN", b"\xed\xa0\x80"])  # fmt: skip
    ways: list[Callable[[], bytes]] = [
        lambda: content[:at],
        lambda: content[at:],
        lambda: content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :],
        lambda: content[:at] + added + content[at:],
        lambda: content[:at] + deep * 100_000 + content[at:],
        lambda: b"".join([*lines[:row], *lines[row + 1 :]]),
        lambda: b"".join([*lines[:row], lines[row], *lines[row:]]),
        lambda: b"".join(draw.sample(lines, len(lines))),
        lambda: content.replace(b"\n", b"\r\n"),
        lambda: content.decode("utf-8", "replace").encode("utf-16"),
        lambda: b"",
        lambda: bytes(draw.randrange(256) for _ in range(300)),
    ]
    return draw.choice(ways)()


def spoil_file(draw: random.Random, path: Path) -> None:
    """Do one thing to a file: to its content, or to what it is."""
    if path.suffix == ".json" and draw.random() < 0.6:
        text = json.dumps(spoilt_json(draw, json.loads(path.read_text())))
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif draw.random() < 0.85:
        path.write_bytes(spoilt_bytes(draw, path.read_bytes()))
    else:
        path.unlink()
        draw.choice([
            lambda: None, path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path),
            lambda: path.symlink_to("/dev/zero"), lambda: path.symlink_to("/nowhere"),
        ])()  # fmt: skip


def spoilt_json(draw: random.Random, value: Any) -> Any:
    """Plain values with one of them, at any depth, replaced, taken away or given another name."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.2:
        return draw.choice(JSON)
    at = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copy, way = value.copy(), draw.random()
    if way < 0.15:
        del copy[at]
    elif way < 0.25 and isinstance(copy, dict):
        copy[at + "x"] = copy.pop(at)
    else:
        copy[at] = spoilt_json(draw, value[at])
    return copy


def bad_recipe(draw: random.Random, world: World) -> list[list[str]]:
    """A recipe file of which a part is wrong; what is still good trains two steps."""
    path, way = world.folder / "recipe.yaml", draw.random()
    if way < 0.5:
        lines = path.read_text().splitlines()
        row = draw.choice([i for i, one in enumerate(lines) if not re.search("output|durat", one)])
        lines[row] = f"{lines[row].partition(':')[0]}: {draw.choice(VALUES)}"
        path.write_text("\n".join(lines), encoding="utf-8")
    elif way < 0.7:
        name = draw.choice([*LEAVES, "lr", "extends", "1", "é"])
        path.write_text(f"{path.read_text()}{name}: {draw.choice(VALUES)}\n")
    else:
        spoil_file(draw, path)
    return [["train", str(path), "train.duration=2 steps", f"output_dir={world.out}"]]


def bad_words(draw: random.Random, world: World) -> list[list[str]]:
    """Overrides and options that are wrong."""
    free = [key for key in LEAVES if key not in ("output_dir", "log.tensorboard_dir")]
    words = [f"{draw.choice(free)}={draw.choice(VALUES)}" for _ in range(draw.randint(1, 3))]
    odd = ["--lr", "--seed=3", "--", "-", "=", "x=", "train.0.seed=1", "data.train.²=1", "a" + ".b" * 2000 + "=1",
           "\udcff\udcfe=3", "train.seed", "data={train: null}", "extends=x", "--json=3"]  # fmt: skip
    if draw.random() < 0.3:
        words.insert(draw.randrange(len(words) + 1), draw.choice(odd))
    odd_paths = ["", "/dev/zero", ".", "x" * 5000, "\0", "/dev/stdin"]
    path = draw.choice([str(world.folder / "recipe.yaml")] * 14 + odd_paths)
    if draw.random() < 0.3:
        # A duration is shown and not trained: it may be as long as it likes.
        return [["recipes", "show", path, *words]]
    verb = draw.choice(["train", "train", "data", "fetch"])
    return [[verb, path, *words, "train.duration=2 steps", f"output_dir={world.out}"]]


def bad_rows(draw: random.Random, world: World) -> list[list[str]]:
    """Rows of which one is wrong, in one of four kinds of file."""
    rows = [json.loads(one) for one in (world.folder / "train.jsonl").read_text().splitlines()]
    kind = draw.choice(["jsonl", "jsonl", "json", "csv", "parquet"])
    fresh = world.folder / f"rows.{kind}"
    if kind == "csv":
        text = "".join(f'"{row["prompt"]}","{row["completion"]}"\n' for row in rows)
        fresh.write_text(f"prompt,completion\n{text}".replace(",", draw.choice(",;")))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), fresh)
    else:
        rows[draw.randrange(len(rows))] = spoilt_json(draw, rows[0])
        texts = [json.dumps(row, ensure_ascii=draw.random() < 0.5) for row in rows]
        text = "\n".join(texts) if kind == "jsonl" else f"[{','.join(texts)}]"
        fresh.write_bytes(text.encode("utf-8", "surrogatepass"))
    if kind in ("csv", "parquet") or draw.random() < 0.5:
        fresh.write_bytes(spoilt_bytes(draw, fresh.read_bytes()))
    shape = draw.choice(["prompt-completion"] * 4 + ["messages", "alpaca", "sharegpt", "text"])
    recipe, data = world.folder / "recipe.yaml", f"data.train={{source: {fresh}, format: {shape}}}"
    return [[draw.choice(["train", "train", "data"]), str(recipe), data, "train.duration=2 steps"]]


def bad_model(draw: random.Random, world: World) -> list[list[str]]:
    """A copy of the model with one of its files spoilt."""
    folder = Path(shutil.copytree(world.tiny, world.folder / "model"))
    spoil_file(draw, draw.choice(sorted(folder.iterdir())))
    return [["train", str(world.recipe(tiny=folder)), "train.duration=2 steps"]]


def bad_run(draw: random.Random, world: World) -> list[list[str]]:
    """A run of four steps with one of its files spoilt, that is to go on or to be used."""
    out = world.begun()
    shutil.copy(out / "metrics.jsonl", out / "metrics-rank1.jsonl")
    sample = {"step": 4, "prompt": "Say amber", "answer": "amber", "expected": "amber"}
    (out / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    ending = draw.choice([*ENDINGS, *[""] * 3])
    if ending:
        (out / ending).write_text(json.dumps(ENDINGS[ending]))
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock"]
    records = [path for path in files if path.parent == out]
    path = draw.choice([*files, *records * 4])
    watched = RunFiles(out)
    spoil_file(draw, path)
    with time_limit(SECONDS):  # the page of a watcher that was open before
        watched.refresh()
        render_page([watched], live=True).encode()
    whole, held = str(world.template / "run"), str(world.folder / "held.jsonl")
    target = str(draw.choice([out, out, out / "final", out / "checkpoint-4"]))
    page = str(world.folder / "page.html")
    loads = [
        world.again(), world.again("--fresh"), ["merge", target, "--output", str(world.folder / "merged")],
        ["generate", target, "--input", held, "--output", "-", "--max-new-tokens", "2"],
        ["eval", target, "--data", held, "--no-base", "--max-examples", "2"],
    ]  # fmt: skip
    reads = [["report", str(out), whole, "--output", page], ["report", str(out), whole, "--json"], ["status", str(out)]]  # fmt: skip
    return [*reads, draw.choice(loads)]


KINDS = (bad_recipe, bad_words, bad_words, bad_rows, bad_rows, bad_model, bad_model, bad_run, bad_run, bad_run)  # fmt: skip


def assert_told(
    words: list[str], code: int, err: str, world: World, before: dict[str, str]
) -> None:
    shown = f"{words}\n{err}"[-4000:]
    assert not is_internal(err), shown
    assert code in (0, 1, 2), shown
    if code:
        assert "error:" in err, shown
        assert "  fix:" in err, shown
        assert max(map(len, err.splitlines())) < 2100, "an error is read by people"
    after = snapshot(world.folder)
    written = ["run/evals", "run.previous-", "page.html", "merged"]
    if words[0] == "train" and code != 2:
        written += ["run"]
    for name, content in before.items():
        if not name.startswith(tuple(written)):
            assert after.get(name) == content, shown


@pytest.mark.parametrize("seed", SEEDS)
def test_a_bad_input(seed: int, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    draw = random.Random(f"campaign {seed}")
    world.recipe(train={"duration": "2 steps"})
    for words in draw.choice(KINDS)(draw, world):
        before = snapshot(world.folder)
        with time_limit(SECONDS):
            shown = invoke(*words)
        assert_told(words, shown.code, shown.err, world, before)
