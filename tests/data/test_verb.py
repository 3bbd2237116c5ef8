"""`tunesmith data` shows what is trained on, and ends with exit code 2 for a broken contract."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from errors import check_shown, lines_with, refuses, warnings_with
from invoke import invoke
from rows import alpaca
from tunesmith.cli import run_data as verb
from tunesmith.config.dump import dump
from tunesmith.config.load import load_recipe
from tunesmith.data.prepare import TrainingData, prepare_data
from tunesmith.errors import DataError
from tunesmith.model.tokenizer import eos_ids, load_tokenizer
from tunesmith.presentation.data import data_warnings, histogram, start_data_lines


@pytest.fixture
def recipe(
    tiny: Path, write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Write a recipe for the tiny model over `content`; give its path."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))

    def make(content: str, more: str = "") -> str:
        rows = write("rows.jsonl", content)
        text = (
            f"model: {{name: {tiny}, dtype: fp32}}\n"
            f"data:\n  train: {{source: {rows}, format: alpaca}}\n  seq_len: 128\n{more}output_dir: {tmp_path / 'run'}\n"
        )
        return write("recipe.yaml", text)

    return make


def prepared(path: str, tiny: Path, *overrides: str, vocab: int = 272, **keys: Any) -> TrainingData:
    run = load_recipe(path, overrides)
    tokenizer = load_tokenizer(tiny, run.model)
    return prepare_data(run, tokenizer, eos_ids(tiny, tokenizer), vocab, **keys)


def test_it_shows_what_is_supervised(recipe) -> None:
    shown = invoke("data", recipe(alpaca(60)), "--rows", 2)
    assert shown.code == 0
    out = shown.out
    assert "<|im_start|>user\nsay 1<|im_end|>\n<|im_start|>assistant\n⟦xxxxxx<|im_end|>⟧" in out
    assert out.count("⟦") == out.count("⟧") == 2
    assert "rows.jsonl:2: " in out
    assert re.search(r"rows\.jsonl\n +60 of 60 rows", out)
    assert "60 examples" in out
    assert "steps: 1, 1 epoch; " in out
    assert warnings_with(out, 1)
    assert "\x1b" not in out
    # One line for all checks; each of them is in --json.
    assert lines_with(out, 9, 60, "contract", "<|im_end|>")
    assert "BROKEN" not in out


@pytest.mark.slow
def test_the_fix_of_few_steps_fixes(recipe) -> None:
    path = recipe(alpaca(600), "train: {global_batch: 512 tokens}\n")
    told = invoke("data", path, "train.duration=0.5 epochs").out
    warning = re.search(r"warning: .*fix: set (.*)", told)
    assert warning is not None
    fixed = invoke("data", path, "train.duration=0.5 epochs", warning[1].replace('"', ""))
    assert (fixed.code, "warning" in fixed.out) == (0, False)


@pytest.mark.slow
def test_no_control_of_a_row_or_of_a_file_name_reaches_the_terminal(recipe, tmp_path: Path) -> None:
    """Nor is a name read as markup."""
    controls = "\x1b]0;title\x07\x9b2J\u202e"
    rows = [{"instruction": f"say {i} {controls}", "output": controls} for i in range(60)]
    file = tmp_path / f"[b]{controls}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = json.dumps([{"source": str(file), "format": "alpaca"}])
    out = invoke("data", recipe(alpaca(1)), f"data.train={source}", "--rows", 1).out
    assert out.count("\\x1b]0;title") >= 3  # the place, the question, the answer, the table
    assert not {*out} & {*controls} - {*"]0;title2J"}
    assert re.search(r"train:\s+\[b\]", out)


def test_json(recipe) -> None:
    values = json.loads(invoke("data", recipe(alpaca(10)), "--json", "--rows", 1).out)
    assert values["train"][0]["kept"] == 10
    assert sum(bar["examples"] for bar in values["lengths"]) == 10
    assert values["schedule"]["steps"] == 1
    assert [c["broken"] for c in values["contract"]] == [0] * 9
    [row] = values["rows"]
    assert "".join(s["text"] for s in row["segments"] if s["supervised"]) == "xxxxx<|im_end|>"


def test_a_long_row_shows_its_two_ends(recipe, tiny: Path) -> None:
    data = prepared(recipe(alpaca(1, letters=lambda i: 90)), tiny)
    tokenizer = load_tokenizer(tiny, data.run.model)
    whole = "".join(text for text, _, _ in verb.segments(data.train, tokenizer, 0))
    assert whole == tokenizer.decode(data.train[0].ids)
    for limit in (20, 60, 110):
        pieces = verb.segments(data.train, tokenizer, 0, limit)
        shown = "".join(text for text, _, _ in pieces)
        n = len(data.train[0].ids)
        first, last = (
            tokenizer.decode(data.train[0].ids[part])
            for part in (slice(limit // 2), slice(-(limit // 2), None))
        )
        assert shown == f"{first}\n… {n - limit:,} tokens …\n{last}"


def test_a_broken_contract_is_shown_and_ends_in_2(recipe) -> None:
    told = invoke("data", recipe(alpaca(3)), "data.seq_len=10")
    assert told.code == 2
    last = told.out[told.out.index("steps: ") :]
    broken = last.index("BROKEN, train")
    # Before the line of those that passed.
    assert broken < last.index("data.seq_len", broken) < last.rindex("contract")
    check_shown(told.err, fix=["data.seq_len"])


def test_prepare_for_training(recipe, tiny: Path, write) -> None:
    held = write("held.jsonl", alpaca(9))
    path = recipe(
        alpaca(60),
        "  validation: {source: held.jsonl, format: alpaca}\nvalidate: {max_examples: 4}\n",
    )
    data = prepared(path, tiny)
    assert Path(held).exists()
    assert (len(data.train), len(data.validation or ()), len(data.contracts)) == (60, 4, 2)
    assert data.schedule.steps(data.run.train.duration) == 1
    assert data.digest == data.train.counts.digest
    text = "\n".join(start_data_lines(data))
    assert "60 of 60 rows" in text
    assert lines_with(text, "validation", 4)
    assert "\n\n" not in text


def test_prepare_stops_on_a_broken_contract(recipe, tiny: Path) -> None:
    path = recipe(alpaca(3))
    with pytest.raises(DataError, match="vocabulary"):
        prepared(path, tiny, vocab=100)
    assert len(prepared(path, tiny, vocab=100, strict=False).contracts[0].broken) == 1
    with refuses(DataError, where="data.train", names=[0.001]):
        prepared(path, tiny, "data.train.weight=0.001")


@pytest.mark.slow
def test_validation_rows_that_are_trained_on_are_told(recipe, tiny: Path, write) -> None:
    held = "  validation: {source: held.jsonl, format: alpaca}\n"
    # 9 and 2 known rows, 2 new ones
    write("held.jsonl", alpaca(9) + alpaca(70)[len(alpaca(68)) :] + alpaca(2))
    data = prepared(recipe(alpaca(60), held), tiny)
    assert data.overlap.count == 11
    assert (data.overlap.where[-12:], data.overlap.earlier[-12:]) == (
        "held.jsonl:1",
        "rows.jsonl:1",
    )
    assert lines_with("\n".join(data_warnings(data)), "11 of 13", "val_loss")
    path = recipe(alpaca(60), held)
    assert prepared(path, tiny, "data.train.split=train[10:]").overlap.count == 0


def test_lengths_are_counted_in_equal_steps() -> None:
    lengths = np.array([30] * 3 + [57] * 2 + [1000])
    bars = histogram(SimpleNamespace(lengths=lengths))  # type: ignore[arg-type]
    assert [bar for bar in bars if bar[2]] == [(30, 90, 5), (945, 1000, 1)]
    same = SimpleNamespace(lengths=np.array([12, 12]))
    assert histogram(same) == [(12, 12, 2)]  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_directory_shows_its_recipe(recipe, tmp_path: Path) -> None:
    file = recipe(alpaca(12))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump(load_recipe(file)))
    assert invoke("data", file).out == invoke("data", tmp_path / "run").out != ""
