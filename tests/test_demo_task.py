"""The demo's task is the same every time, and its held-out rows hold nothing that was trained on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from waiting import TIME

DEMO = Path(__file__).parents[1] / "demo"
sys.path.insert(0, str(DEMO))

import run as demo  # noqa: E402
import task  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return task.write(tmp_path_factory.mktemp("demo"))


def pairs(path: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert all([m["role"] for m in row] == ["user", "assistant"] for row in rows)
    return [(row[0]["content"], row[1]["content"]) for row in rows]


def parts(answer: str) -> dict[str, str]:
    return dict(part.split(": ", 1) for part in answer.split(" | "))


def test_writing_is_deterministic(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert [p.read_bytes() for p in task.write(tmp_path)] == [p.read_bytes() for p in files]


def test_counts_and_no_row_twice(files: tuple[Path, Path]) -> None:
    train, held_out = map(pairs, files)
    assert (len(train), len(held_out)) == (300, 40)
    assert len({asked for asked, _ in train + held_out}) == 340


def test_open_values_of_held_out_rows_were_never_seen(files: tuple[Path, Path]) -> None:
    train, held_out = map(pairs, files)
    seen = " ".join(text for pair in train for text in pair).lower()
    checked = 0
    for _, answer in held_out:
        for key, value in parts(answer).items():
            if key in ("name", "item", "colour", "city"):
                for word in value.lower().split():
                    assert (
                        f" {word} "
                        not in f" {seen.replace('.', ' ').replace(',', ' ').replace('?', ' ')} "
                    ), word
                    checked += 1
    assert checked == 40 * 6


def test_every_answer_can_be_found_in_its_order(files: tuple[Path, Path]) -> None:
    for asked, answer in [pair for path in files for pair in pairs(path)]:
        found = parts(answer)
        assert list(found) == ["name", "item", "colour", "quantity", "city", "day"]
        for key, value in found.items():
            word = task.NUMBER[int(value) - 2] if key == "quantity" else value
            assert word.lower() in asked.lower(), (asked, key)


def test_the_score_counts_whole_answers_and_fields() -> None:
    row = {
        "asked": "",
        "wanted": "name: A | item: b | day: Friday",
        "got": "name: A | item: c | day: Friday",
    }
    assert demo.fields_right(row) == 2
    assert demo.fields_right(row | {"got": "I'm sorry"}) == 0


def test_the_recipe_is_a_recipe() -> None:
    from tunesmith.config.load import load_recipe

    run = load_recipe(DEMO / "recipe.yaml")
    assert (run.adapter.rank, run.train.learning_rate, str(run.train.duration)) == (
        16,
        1e-3,
        "75 steps",
    )
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


@pytest.mark.slow
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
