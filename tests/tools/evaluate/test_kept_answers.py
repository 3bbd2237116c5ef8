"""Rejection sampling: which answers become rows for SFT, and that a stopped command loses none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from errors import refuses
from invoke import invoke
from runs import ROWS as ALL_ROWS
from runs import make_run, peft_model, write_rows
from tunesmith.config.schema import Source
from tunesmith.errors import UsageError
from tunesmith.tools.evaluate.generate import row_with_answer
from tunesmith.tools.evaluate.kept_answers import read_condition

ROWS = ALL_ROWS[:5]
# Accepts some of the answers of a random model.
SCORER = """
def short(answer, row):
    return float(len(answer) % 3 == 0 and "instruction" in row)
"""
WORDS = [
    "--samples",
    "6",
    "--temperature",
    "50",
    "--score",
    "mine.py:short",
    "--keep",
    "score >= 1",
]
SHORT = ["--max-new-tokens", "80", "--batch-size", "2"]


@pytest.fixture
def home(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", tiny, peft_model(tiny))
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "mine.py").write_text(SCORER)
    return tmp_path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_kept_answers_are_rows_for_training_and_a_stopped_command_continues(home: Path) -> None:
    command = ["generate", "run", "--input", "rows.jsonl", *SHORT]
    sampled = [*WORDS[:6], "--output", "all.jsonl"]
    assert invoke(*command, *sampled).code == 0
    everything = lines(home / "all.jsonl")
    assert len(everything) == 6 * len(ROWS)
    done = invoke(*command, *WORDS, "--output", "kept.jsonl")
    assert done.code == 0
    kept = lines(home / "kept.jsonl")
    assert 0 < len(kept) < len(everything)
    wanted = []
    for number, row in enumerate(ROWS):
        texts = [each["output"] for each in everything[6 * number : 6 * number + 6]]
        wanted += [
            (row["instruction"], text) for text in dict.fromkeys(texts) if len(text) % 3 == 0
        ]
    assert {(row["instruction"], row["output"]) for row in kept} <= set(wanted)
    assert all(row["score"] == 1 and row["where"].startswith("rows.jsonl:") for row in kept)
    # A kill can leave a part of a line, or of the answers to a row.
    for name, words in (("kept.jsonl", [*WORDS, "--output", "kept.jsonl"]), ("all.jsonl", sampled)):
        whole = (home / name).read_bytes()
        after_a_line = whole.index(b"\n", len(whole) // 2) + 1
        for size in (len(whole) // 2, after_a_line, len(whole) - 3):
            (home / name).write_bytes(whole[:size])
            assert invoke(*command, *words, "--resume").code == 0
            assert (home / name).read_bytes() == whole
    rows = write_rows(home / "other.jsonl", ROWS[:3])
    command[3] = str(rows)
    assert invoke(*command, *WORDS, "--output", "kept.jsonl", "--resume").code == 2


@pytest.mark.parametrize(
    ("row", "source", "expected"),
    [
        ({"prompt": "a", "completion": "b", "id": 1}, "prompt-completion", {"completion": "new"}),
        ({"prompt": "a"}, "prompt-completion", {"completion": "new"}),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            "prompt-completion",
            {"completion": [{"role": "assistant", "content": "new"}]},
        ),
        ({"instruction": "a", "output": "b"}, "alpaca", {"output": "new"}),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "messages",
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "new"}]},
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}]},
            "sharegpt",
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "new"}]},
        ),
    ],
)  # fmt: skip
def test_the_sampled_answer_replaces_that_of_the_row(row: Any, source: Any, expected: Any) -> None:
    found = row_with_answer(row, Source(source="rows.jsonl", format=source), "rows.jsonl:1", "new")
    assert found == {**row, **expected}


@pytest.mark.parametrize(
    "text", ["", "score", "score = 1", "score >= 1.2.3", "loss >= 1", "score<1"]
)
def test_a_condition_that_cannot_be_read_is_refused(text: str) -> None:
    with refuses(UsageError, where="--keep", fix=["score >= 1"]):
        read_condition(text)


def test_conditions() -> None:
    for text, accepted in (("score >= 0.5", [0.5, 1]), ("score>0.5", [1]), ("score == 0", [0])):
        condition = read_condition(text)
        assert [score for score in (0, 0.5, 1) if condition(score)] == accepted


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["--samples", "0"], "--samples"),
        (["--samples", "2"], "--samples"),
        (["--keep", "score >= 1"], "--keep"),
        (["--score", "exactly"], "--score"),
        (["--score", "tool-call"], "--score"),
        (["--score", "exact", "--keep", "good"], "--keep"),
        (["--score", "exact", "--keep", "score >= 1", "--format", "text"], "--keep"),
        (["--score", "exact", "--input", "asked.jsonl"], "asked.jsonl:1"),
    ],
)
def test_options_that_cannot_be_used_are_refused(home: Path, words: list[str], where: str) -> None:
    write_rows(home / "asked.jsonl", [{"prompt": "a"}])
    write_rows(home / "texts.jsonl", [{"text": "a"}])
    given = "texts.jsonl" if "text" in words else "rows.jsonl"
    base = ["generate", "run", "--input", given, "--output", "out.jsonl"]
    done = invoke(*base, *words)
    assert done.code == 2
    assert where in done.err
    assert not (home / "out.jsonl").exists() or not (home / "out.jsonl").read_text()
