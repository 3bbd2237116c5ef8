"""The closing summary tells what the records and samples say; failure.json comes and goes."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errors import holds
from records import RUN, record
from tunesmith.config.dump import dump
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Source
from tunesmith.errors import NonFiniteError
from tunesmith.metrics.conversations import Turn, turns_of
from tunesmith.presentation.summary import closing_summary
from tunesmith.training.result import write_failure


def closing(folder: Path, *, data: dict[str, Any] | None = None, **told: Any) -> str:
    run = replace(RUN, output_dir=str(folder), data=replace(RUN.data, **(data or {})))
    return closing_summary(run, **{"steps": 20} | told)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my run"
    (folder / "final").mkdir(parents=True)
    # The best weights are of step 10.
    values = {"step": 10, "last_step": 20, "files": {}}
    (folder / "final" / "manifest.json").write_text(json.dumps(values))
    validated = {10: {"val_loss": 0.5}, 20: {"val_loss": 0.75}}
    seconds = [10.0] + [0.25] * 19  # the first step compiles
    peak = {"mfu": 0.5, "mfu_peak_tflops": 100.0}
    records = [
        record(s, step_seconds=took, memory_gib=s / 10, **peak, **validated.get(s, {}))
        for s, took in enumerate(seconds, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(r.to_json() + "\n" for r in records))
    return folder


def test_the_summary_holds_every_figure(folder: Path) -> None:
    text = closing(folder, seconds=100.0, took=150.0)
    for part in (
        "20 (2.00 epochs, 80 examples)",
        "1:40 min in steps; this start took 2:30 min",
        "2,000 without padding, 800 of them supervised",
        "400 tokens/s, 50.0% MFU of 100 TFLOP/s",
        "2.0000 -> 0.1000 (mean of the last 10: 0.1338)",
        "0.5000 -> 0.7500, best 0.5000 at step 10",
        "2.0 GiB",
    ):
        assert part in text, part
    assert [line for line in text.splitlines() if holds(line, "final", 10, 20)]


def test_the_next_commands_are_whole_and_quoted(folder: Path) -> None:
    held = {"validation": (Source(source="rows.jsonl", split="train[95%:]"),)}
    text = closing(folder, data=held)
    rows = text[text.index("\nnext\n") + 6 :].splitlines()
    assert [row.partition("   # ")[0].strip() for row in rows] == [
        *(f"tunesmith {verb} '{folder}'" for verb in ("chat", "eval", "report")),
        f"tunesmith export '{folder}' --to ollama --output '{folder}-exported'",
    ]


def test_a_finished_run_names_the_two_ways_on(folder: Path) -> None:
    (folder / "config.yaml").write_text(dump(RUN))
    text = closing(folder, finished_before=True)
    assert holds(text.splitlines()[0], 20)
    command = shlex.split(text.splitlines()[1].partition(": ")[2])
    assert command[:2] == ["tunesmith", "train"]
    # A command that made its recipe makes another one of another duration, and is refused.
    values = load_recipe(command[2], command[3:])
    assert values.train.duration.amount == 2 * RUN.train.duration.amount
    assert "--fresh" in text


def test_failure_is_one_block_that_is_written_anew(tmp_path: Path) -> None:
    error = NonFiniteError("NaN", where="step 7", why="rows.jsonl:3", fix="lower the rate")
    write_failure(tmp_path, error, last_step=6, next_command="tunesmith train r.yaml")
    failure = json.loads((tmp_path / "failure.json").read_text())
    names = "what where why last_step next cause rank host phase collective"
    assert list(failure) == names.split()
    values = ["NaN", "step 7", "rows.jsonl:3", 6, "lower the rate", "not-finite"]
    assert [*failure.values()][:6] == values
    write_failure(tmp_path, NonFiniteError("x"), last_step=6, next_command="again")
    assert json.loads((tmp_path / "failure.json").read_text())["next"] == "again"


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        # ChatML
        (
            "system\nBe kind.\nuser\nHi 🚲\n\nthere\nassistant\nHello\n",
            [("system", "Be kind."), ("user", "Hi 🚲\n\nthere"), ("assistant", "Hello")],
        ),
        ("user\nSay 0\nmodel\n", [("user", "Say 0")]),  # Gemma
        # Llama 3: the role stands right behind the turn before
        (
            "system\n\nBe kind.user\n\nWho is a user\n\nhere?assistant\n\n",
            [("system", "Be kind."), ("user", "Who is a user\n\nhere?")],
        ),
        ("Say user 0", [("user", "Say user 0")]),  # no roles, as of Mistral
    ],
)
def test_the_turns_of_a_prompt(prompt: str, turns: list[tuple[str, str]]) -> None:
    assert turns_of(prompt) == [Turn(*turn) for turn in turns]
