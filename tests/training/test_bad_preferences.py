"""Files of pairs and of labeled answers that a run or an eval cannot use are named; nothing is written.

Bad rows: tests/data/test_preference_rows.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from errors import holds, refuses
from recipes import make_run, write_pairs
from tunesmith.errors import DataError, TunesmithError, UsageError

PAIR = {"prompt": "Add 1 and 2.", "chosen": "3", "rejected": "It is three."}
CHAT = {
    "prompt": [{"role": "user", "content": "1 + 2?"}],
    "chosen": [{"role": "assistant", "content": "3"}],
    "rejected": [{"role": "assistant", "content": "It is three."}],
}
ANSWER = {"prompt": "Add 1 and 2.", "completion": "3", "label": True}
BAD_ANSWER = ANSWER | {"label": False}
LONG = "1 + 2? " * 40
WITHOUT_REJECTED = {"prompt": "Add 1 and 2.", "chosen": "3"}
EQUAL_ONCE_CUT = {"prompt": "Add.", "chosen": LONG + "3", "rejected": LONG + "4"}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# name: method, rows, more keys of the data, where, values that the error has
FILES: dict[str, tuple[str, list[Any], dict[str, Any], str, list[str]]] = {
    "an empty file": ("dpo", [], {}, "train.jsonl", []),
    "no rejected": ("dpo", [PAIR, CHAT, WITHOUT_REJECTED, PAIR], {}, "train.jsonl:3", ["rejected"]),
    "no label": ("kto", [ANSWER, BAD_ANSWER, PAIR, ANSWER], {}, "train.jsonl:3", ["label"]),
    "equal once cut": ("dpo", [PAIR, EQUAL_ONCE_CUT], {"allow_cut_answers": True}, "train.jsonl:2", []),
    "good answers alone": ("kto", [ANSWER] * 3, {}, "train.jsonl", ["3"]),
    "bad answers alone": ("kto", [BAD_ANSWER] * 3, {}, "train.jsonl", ["3"]),
    "all too long": ("dpo", [PAIR | {"prompt": LONG}] * 3, {"too_long": "drop"}, "train.jsonl", ["3"]),
    "one too long": ("dpo", [PAIR, PAIR | {"chosen": LONG}], {"too_long": "error"}, "train.jsonl", []),
    "cut": ("dpo", [PAIR | {"chosen": LONG, "rejected": LONG + "x"}] * 3, {}, "train.jsonl", []),
    "no such column": ("dpo", [PAIR] * 3, {"columns": {"chosen": "better"}}, "train.jsonl", ["better"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named(name: str, tiny: Path, tmp_path: Path) -> None:
    method, rows, keys, where, names = FILES[name]
    source: dict[str, Any] = {"source": str(write_lines(tmp_path / "train.jsonl", rows))}
    source["format"] = "feedback" if method == "kto" else "preference"
    if "columns" in keys:
        source["columns"] = keys["columns"]
    limits = {key: value for key, value in keys.items() if key != "columns"}
    data = {"train": source, "seq_len": 96, **limits}
    run = make_run(tiny, tmp_path, held=False, method=method, data=data)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TunesmithError) as caught:
        tunesmith.train(run)
    assert sorted(tmp_path.rglob("*")) == before
    assert where in caught.value.where
    assert holds(f"{caught.value.what}\n{caught.value.why}", *names), str(caught.value)
    assert caught.value.fix


@pytest.mark.slow
def test_bad_rows_of_an_eval_are_named_too(tiny: Path, tmp_path: Path) -> None:
    held = write_pairs(tmp_path / "held.jsonl", 4, first=8)
    rows = write_pairs(tmp_path / "train.jsonl", 8)
    sources = {
        "train": {"source": str(rows), "format": "preference"},
        "validation": {"source": str(held), "format": "preference"},
    }
    steps = {"duration": "1 steps", "warmup": "0 steps"}
    tunesmith.train(make_run(tiny, tmp_path, method="dpo", data=sources, train=steps))
    before = sorted(tmp_path.rglob("*"))
    file = write_lines(tmp_path.parent / f"{tmp_path.name}-bad.jsonl", [PAIR, WITHOUT_REJECTED])
    with refuses(DataError, where=f"{file.name}:2"):
        tunesmith.evaluate(tmp_path / "run", file)
    # Rows that were held out, and are others now.
    write_lines(held, [PAIR] * 4)
    with refuses(UsageError, where="--data"):
        tunesmith.evaluate(tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before
