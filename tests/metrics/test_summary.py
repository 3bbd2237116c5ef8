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
from tunesmith.metrics.conversations import Turn, conversations_of, turns_of, whole_characters
from tunesmith.metrics.run_figures import RunFigures, named_figures
from tunesmith.presentation.summary import closing_summary
from tunesmith.training.result import write_failure
from tunesmith.units import Share


def test_columns_keep_the_order_of_the_records() -> None:
    figures = RunFigures()
    names = [f"column{i}" for i in range(20)]
    figures.add({"step": 1, "loss": 2.0})
    figures.add({"step": 2, "loss": 1.0, **dict.fromkeys(names, 3.0)})
    assert list(figures.columns) == ["step", "loss", *names]
    assert figures.columns["column7"] == [None, 3.0]


def closing(folder: Path, *, data: dict[str, Any] | None = None, **told: Any) -> str:
    run = replace(RUN, output_dir=str(folder), data=replace(RUN.data, **(data or {})))
    return closing_summary(run, **{"steps": 20} | told)


def write_weights(folder: Path, step: int) -> None:
    """The manifest of a final/ after 20 steps, whose weights are of `step`."""
    values = {"step": step, "last_step": 20, "files": {}}
    (folder / "final" / "manifest.json").write_text(json.dumps(values))


def write_samples(folder: Path, *samples: tuple[int, str, str]) -> None:
    names = ("step", "prompt", "answer")
    rows = [json.dumps(dict(zip(names, sample, strict=True))) for sample in samples]
    (folder / "samples.jsonl").write_text("\n".join(rows) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my run"
    (folder / "final").mkdir(parents=True)
    write_weights(folder, 20)
    speed = {"mfu": 0.5, "mfu_peak_tflops": 100.0}
    validated = {10: {"val_loss": 0.5}, 20: {"val_loss": 0.75}}
    seconds = [10.0] + [0.25] * 19  # the first step compiles
    records = [
        record(s, step_seconds=took, memory_gib=s / 10, **speed, **validated.get(s, {}))
        for s, took in enumerate(seconds, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(r.to_json() + "\n" for r in records))
    return folder


def test_the_summary_holds_every_figure(folder: Path) -> None:
    (folder / "checkpoint-10").mkdir()
    text = closing(folder, seconds=100.0, took=150.0)
    for part in (
        "20 (2.00 epochs, 80 examples)",
        "1:40 min in steps; this start took 2:30 min",
        "2,000 without padding, 800 of them supervised",
        "400 tokens/s, 50.0% MFU of 100 TFLOP/s",
        "2.0000 -> 0.1000 (mean of the last 10: 0.1338)",
        "0.5000 -> 0.7500, best 0.5000 at step 10",
        "2.0 GiB",
        "checkpoint-10",
    ):
        assert part in text, part
    assert named_figures([record(1, val_loss=1.5)], 1.0)["val_loss"] == "1.5000"


def commands_of(text: str) -> list[str]:
    rows = text[text.index("\nnext\n") + 6 :].splitlines()
    return [row.partition("   # ")[0].strip() for row in rows]


@pytest.mark.parametrize(("step", "values"), [(10, (10, 20)), (20, (20,))])
def test_the_summary_says_which_weights_final_holds(folder, step, values):
    """Its val_loss was 0.5 at step 10, and is 0.75."""
    write_weights(folder, step)
    assert [line for line in closing(folder).splitlines() if holds(line, "final", *values)]


@pytest.mark.parametrize("is_inside", [False, True])
def test_the_next_commands_are_whole_and_quoted(is_inside, folder, monkeypatch):
    if is_inside:
        monkeypatch.chdir(folder)
    place = "." if is_inside else f"'{folder}'"
    export = f"tunesmith export {place} --to ollama --output '{folder}-exported'"
    chat, report = f"tunesmith chat {place}", f"tunesmith report {place}"
    assert commands_of(closing(folder)) == [chat, report, export]
    evaluate = f"tunesmith eval {place}"
    held = {"validation": (Source(source="rows.jsonl", split="train[95%:]"),)}
    for data in (held, {"hold_out": Share(5.0, "%")}):
        assert commands_of(closing(folder, data=data)) == [chat, evaluate, report, export]


def test_two_answers_before_and_after_in_lines_of_a_terminal(folder: Path) -> None:
    """Of prompts that were answered at both ends, the first two, without their template."""
    question, answer = "a long story " * 20 + "Why?", "I am\n\nnot sure. " * 20
    templated = "system\nYou are helpful\nuser\nWho?\nassistant\n"
    write_samples(
        folder,
        (0, f"system\nBe kind.\nuser\n{question}", answer),
        (0, templated, "Nobody."),
        (0, "When?", "Never."),
        (10, templated, "Somebody."),
        (20, f"system\nBe kind.\nuser\n{question}", "Because."),
        (20, "Where?", "Here."),
        (20, templated, "Ada."),
        (20, "When?", "Now."),
    )
    text = closing(folder)
    shown = text[text.index("prompt  ") :].split("\n\n")[0].splitlines()
    assert shown == [
        "prompt  …" + question[-68:],
        "  before  " + answer.replace("\n\n", " ")[:68] + "…",
        "  after   Because.",
        "prompt  Who?",
        "  before  Nobody.",
        "  after   Ada.",
    ]
    assert max(map(len, shown)) <= 80
    write_samples(folder, (0, "Who?", "Nobody."))
    assert "prompt  " not in closing(folder)


def test_a_run_without_a_step_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "tok/s" not in closing(tmp_path, steps=0)


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
    assert "15 s" in text, "the time of the steps, as this start took none"


def test_failure_is_one_block_that_comes_and_goes(tmp_path: Path) -> None:
    error = NonFiniteError("NaN", where="step 7", why="rows.jsonl:3", fix="lower the rate")
    write_failure(tmp_path, error, last_step=6, next_command="tunesmith train r.yaml")
    failure = json.loads((tmp_path / "failure.json").read_text())
    names = "what where why last_step next cause rank host phase collective"
    assert list(failure) == names.split()
    values = ["NaN", "step 7", "rows.jsonl:3", 6, "lower the rate", "not-finite"]
    assert [*failure.values()][:6] == values
    write_failure(tmp_path, NonFiniteError("x"), last_step=6, next_command="again")
    assert json.loads((tmp_path / "failure.json").read_text())["next"] == "again"
    assert [path.name for path in tmp_path.iterdir()] == ["failure.json"]


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        # ChatML and Gemma
        (
            "system\nBe kind.\nuser\nHi 🚲\n\nthere\nassistant\nHello\n",
            [("system", "Be kind."), ("user", "Hi 🚲\n\nthere"), ("assistant", "Hello")],
        ),
        ("user\nSay 0\nmodel\n", [("user", "Say 0")]),
        # Qwen 3 without thinking
        ("user\nSay 0\nassistant\n<think>\n\n</think>\n\n", [("user", "Say 0")]),
        # Llama 3: the role stands right behind the turn before
        (
            "system\n\nBe kind.user\n\nWho is a user\n\nhere?assistant\n\n",
            [("system", "Be kind."), ("user", "Who is a user\n\nhere?")],
        ),
        # A role of rows that no template writes is what somebody says
        ("user\nCall the\nfunction\nnow\nassistant\n", [("user", "Call the\nfunction\nnow")]),
        # No roles, as of Mistral
        ("Say user 0", [("user", "Say user 0")]),
    ],
)
def test_the_turns_of_a_prompt(prompt: str, turns: list[tuple[str, str]]) -> None:
    assert turns_of(prompt) == [Turn(*turn) for turn in turns]


def test_a_system_prompt_of_all_is_taken_out_and_one_of_some_is_not() -> None:
    same = [f"system\nBe kind.\nuser\n{number}\nassistant\n" for number in range(2)]
    conversations, system = conversations_of(same)
    assert system == "Be kind."
    assert [*conversations.values()] == [[Turn("user", "0")], [Turn("user", "1")]]
    conversations, system = conversations_of([*same, "user\n2\nassistant\n"])
    assert system == ""
    assert conversations[same[0]][0] == Turn("system", "Be kind.")
    assert conversations_of([]) == ({}, "")


def test_half_an_emoji_at_the_end_is_not_shown() -> None:
    assert whole_characters("bike 🚲\ufffd") == "bike 🚲"
