"""The demo: its rows are the same every time, and what is held out was not trained on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from waiting import TIME

DEMO = Path(__file__).parents[1] / "demo"
sys.path.insert(0, str(DEMO))

import pairs as demo_pairs  # noqa: E402
import run as demo  # noqa: E402
import task  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return task.write(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def made_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    demo_pairs.write(folder)
    return folder


def read_pairs(path: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert all([m["role"] for m in row] == ["user", "assistant"] for row in rows)
    return [(row[0]["content"], row[1]["content"]) for row in rows]


def parts(answer: str) -> dict[str, str]:
    return dict(part.split(": ", 1) for part in answer.split(" | "))


def test_rows_are_the_same_every_time_and_none_is_there_twice(
    files: tuple[Path, Path], made_pairs: Path, tmp_path: Path
) -> None:
    assert [p.read_bytes() for p in task.write(tmp_path)] == [p.read_bytes() for p in files]
    train, held_out = map(read_pairs, files)
    assert (len(train), len(held_out)) == (300, 40)
    assert len({asked for asked, _ in train + held_out}) == 340
    demo_pairs.write(tmp_path)
    for file in made_pairs.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_open_values_of_held_out_rows_were_never_seen(files: tuple[Path, Path]) -> None:
    train, held_out = map(read_pairs, files)
    seen = " ".join(text for pair in train for text in pair).lower()
    words = {*re.findall(r"[^\s.,?]+", seen)}
    checked = 0
    for _, answer in held_out:
        for key, value in parts(answer).items():
            if key in ("name", "item", "colour", "city"):
                assert not words & {*value.lower().split()}
                checked += len(value.split())
    assert checked == 40 * 6


def test_every_answer_can_be_found_in_its_order(files: tuple[Path, Path]) -> None:
    for asked, answer in [pair for path in files for pair in read_pairs(path)]:
        found = parts(answer)
        assert list(found) == ["name", "item", "colour", "quantity", "city", "day"]
        for key, value in found.items():
            word = task.NUMBER[int(value) - 2] if key == "quantity" else value
            assert word.lower() in asked.lower(), (asked, key)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def text(message: list[dict[str, str]]) -> str:
    return message[0]["content"]


def test_the_long_answer_is_the_short_one_and_two_sentences_of_the_list(made_pairs: Path) -> None:
    rows = [*read(made_pairs / "pairs.jsonl"), *read(made_pairs / "held-out-pairs.jsonl")]
    assert len(rows) == 300 + 60
    for row in rows:
        short, long = text(row["chosen"]), text(row["rejected"])
        assert long.startswith(f"{short} ")
        more = long.removeprefix(f"{short} ")
        used = [sentence for sentence in demo_pairs.COMMONPLACE if sentence in more]
        assert len(more) == sum(map(len, used)) + 1
        assert len(used) == 2


def test_held_out_questions_are_about_other_things(made_pairs: Path) -> None:
    trained = {text(row["prompt"]) for row in read(made_pairs / "pairs.jsonl")}
    held_out = [text(row["prompt"]) for row in read(made_pairs / "held-out-pairs.jsonl")]
    assert not trained & {*held_out}
    asked = [text(row["messages"]) for row in read(made_pairs / "questions.jsonl")]
    assert asked == held_out


def test_labeled_answers_are_those_of_the_pairs(made_pairs: Path) -> None:
    labeled = read(made_pairs / "answers.jsonl")
    expected = set()
    for row in read(made_pairs / "pairs.jsonl"):
        for column in ("chosen", "rejected"):
            expected.add((text(row["prompt"]), text(row[column]), column == "chosen"))
    assert expected == {
        (text(row["prompt"]), text(row["completion"]), row["label"]) for row in labeled
    }
    assert len(labeled) == 600


def test_the_score_counts_whole_answers_and_fields() -> None:
    right = "name: A | item: b | day: Friday"
    row = {"asked": "", "wanted": right, "got": right.replace("b", "c")}
    assert demo.fields_right(row) == 2
    assert demo.fields_right(row | {"got": "I'm sorry"}) == 0


def test_the_recipe_is_a_recipe() -> None:
    from tunesmith.config.load import load_recipe

    run = load_recipe(DEMO / "recipe.yaml")
    assert run.data.train[0].source == str(DEMO / "data" / "train.jsonl")
    assert run.train.duration.amount * run.train.global_batch.amount == task.TRAIN_ROWS, (
        "one pass over the rows"
    )


def test_the_model_is_the_wheels_where_the_hub_is_out_of_reach(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert demo.find_model() == str(smollm2)


def has_torch(pid: str) -> bool:
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # a process that has ended since it was listed
        return False


@pytest.mark.nightly
def test_ctrl_c_waits_for_the_command_and_ends_without_a_traceback(tmp_path: Path) -> None:
    """As a terminal sends it, to the demo and to the command that it runs."""
    process = subprocess.Popen(
        [sys.executable, str(DEMO / "run.py")], cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + TIME
    try:
        while not any(map(has_torch, children.read_text().split())):
            assert time.monotonic() < deadline, "no command that loads torch"
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=TIME)
    finally:
        process.kill()
    assert "$ tunesmith generate" in out
    assert "interrupted" in out
    assert "Traceback" not in out
    assert process.returncode == 130
