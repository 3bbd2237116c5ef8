"""The closing summary tells what the records say; failure.json comes and goes."""

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
from tunesmith.config.schema import Run, Source
from tunesmith.errors import NonFiniteError
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


@pytest.fixture
def run() -> Run:
    return RUN


def closing(run: Run, folder: Path, **told: Any) -> str:
    return closing_summary(replace(run, output_dir=str(folder)), **{"steps": 20} | told)


def write_weights(folder: Path, step: int) -> None:
    """The manifest of a final/ after 20 steps, whose weights are of `step`."""
    values = {"step": step, "last_step": 20, "files": {}}
    (folder / "final" / "manifest.json").write_text(json.dumps(values))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my run"
    (folder / "final").mkdir(parents=True)
    write_weights(folder, 20)
    (folder / "checkpoint-10").mkdir()
    records = [
        # the first step compiles: 10 s
        record(
            s,
            step_seconds=10.0 if s == 1 else 0.25,
            mfu=0.5,
            mfu_peak_tflops=100.0,
            memory_gib=s / 10,
        )
        for s in range(1, 21)
    ]
    records[9] = replace(records[9], val_loss=0.5)
    records[19] = replace(records[19], val_loss=0.75)
    (folder / "metrics.jsonl").write_text("".join(r.to_json() + "\n" for r in records))
    return folder


def test_the_summary_holds_every_figure(run: Run, folder: Path) -> None:
    text = closing(run, folder, seconds=100.0, took=150.0)
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


def test_a_single_validation_is_told_once() -> None:
    assert named_figures([record(1, val_loss=1.5)], 1.0)["val_loss"] == "1.5000"


def last_lines(text: str) -> list[str]:
    return [row.strip() for row in text[text.index("\nnext\n") + 6 :].splitlines()]


def commands_of(run: Run, folder: Path) -> list[str]:
    return [line.partition("   # ")[0].strip() for line in last_lines(closing(run, folder))]


@pytest.mark.parametrize(("step", "values"), [(10, (10, 20)), (20, (20,))])
def test_the_summary_says_which_weights_final_holds(
    run: Run, folder: Path, step: int, values: tuple[int, ...]
) -> None:
    """Its val_loss was 0.5 at step 10, and is 0.75."""
    write_weights(folder, step)
    text = closing(run, folder)
    assert [line for line in text.splitlines() if holds(line, "final", *values)]
    assert commands_of(run, folder)[0] == f"tunesmith chat '{folder}'"


def test_the_next_commands_are_whole_and_quoted(run: Run, folder: Path) -> None:
    (folder / "checkpoint-10").rmdir()
    commands = [line.partition("   # ")[0].strip() for line in last_lines(closing(run, folder))]
    assert commands == [
        f"tunesmith chat '{folder}'",
        f"tunesmith report '{folder}'",
        f"tunesmith export '{folder}' --to ollama --output '{folder}-exported'",
    ]


def test_the_next_commands_work_inside_the_run_directory(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "checkpoint-10").rmdir()
    commands = [line.partition("   # ")[0].strip() for line in last_lines(closing(run, folder))]
    assert commands == [
        "tunesmith chat .",
        "tunesmith report .",
        f"tunesmith export . --to ollama --output '{folder}-exported'",
    ]


def test_two_answers_before_and_after_in_lines_of_a_terminal(run: Run, folder: Path) -> None:
    """Of prompts that were answered at both ends, the first two; a long text shows its near end."""
    question = "a long story " * 20 + "Why?"
    answer = "I am\n\nnot sure. " * 20
    samples = [
        (0, f"system\nBe kind.\nuser\n{question}", answer),
        (0, "Who?", "Nobody."),
        (0, "When?", "Never."),
        (10, "Who?", "Somebody."),
        (20, f"system\nBe kind.\nuser\n{question}", "Because."),
        (20, "Where?", "Here."),
        (20, "Who?", "Ada."),
        (20, "When?", "Now."),
    ]
    lines = [
        json.dumps({"step": step, "prompt": prompt, "answer": answer, "expected": ""})
        for step, prompt, answer in samples
    ]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    text = closing(run, folder)
    shown = text[text.index("prompt  ") :].split("\n\n")[0].splitlines()
    assert shown[0] == "prompt  …" + question[-68:]
    assert shown[1] == "  before  " + answer.replace("\n\n", " ")[:68] + "…"
    assert shown[2:] == [
        "  after   Because.",
        "prompt  Who?",
        "  before  Nobody.",
        "  after   Ada.",
    ]
    assert max(map(len, shown)) <= 80


def test_a_question_is_shown_without_its_template(run: Run, folder: Path) -> None:
    prompt = "system\nYou are helpful\nuser\nWhen?\nassistant\n"
    rows = [{"step": step, "prompt": prompt, "answer": "At nine."} for step in (0, 20)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (line,) = [line for line in closing(run, folder).splitlines() if line.startswith("prompt")]
    assert line.split("  ") == ["prompt", "When?"]


def test_a_run_that_answered_once_shows_no_answers(run: Run, folder: Path) -> None:
    row = {"step": 0, "prompt": "Who?", "answer": "Nobody.", "expected": ""}
    (folder / "samples.jsonl").write_text(json.dumps(row) + "\n")
    assert "prompt  " not in closing(run, folder)


@pytest.mark.parametrize(
    "held",
    [
        {"validation": (Source(source="rows.jsonl", split="train[95%:]"),)},
        {"hold_out": Share(5.0, "%")},
    ],
)
def test_eval_finds_the_held_out_rows_itself(run: Run, folder: Path, held: dict[str, Any]) -> None:
    """Their file may be that of the training rows."""
    (folder / "checkpoint-10").rmdir()
    said = closing(replace(run, data=replace(run.data, **held)), folder)
    assert f"tunesmith eval '{folder}'     # " in said


def test_a_run_without_a_step_says_so(run: Run, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "tok/s" not in closing(run, tmp_path, steps=0)


def test_a_finished_run_names_the_two_ways_on(run: Run, folder: Path) -> None:
    (folder / "config.yaml").write_text(dump(run))
    text = closing(run, folder, finished_before=True)
    assert holds(text.splitlines()[0], 20)
    command = text.splitlines()[1].partition(": ")[2]
    assert shlex.split(command)[:2] == ["tunesmith", "train"]
    # A command that made its recipe makes another one of another duration, and is refused.
    values = load_recipe(shlex.split(command)[2], shlex.split(command)[3:])
    assert values.train.duration.amount == 2 * run.train.duration.amount
    assert "--fresh" in text
    assert "15 s" in text, "the time of the steps, as this start took none"


def test_failure_is_one_block_that_comes_and_goes(tmp_path: Path) -> None:
    error = NonFiniteError(
        "the loss is NaN", where="step 7", why="rows.jsonl:3", fix="lower the rate"
    )
    write_failure(tmp_path, error, last_step=6, next_command="tunesmith train r.yaml")
    failure = json.loads((tmp_path / "failure.json").read_text())
    names = "what where why last_step next cause rank host phase collective"
    assert list(failure) == names.split()
    assert [*failure.values()][:6] == [
        error.what,
        "step 7",
        "rows.jsonl:3",
        6,
        error.fix,
        "not-finite",
    ]
    write_failure(tmp_path, NonFiniteError("x"), last_step=6, next_command="again")
    assert json.loads((tmp_path / "failure.json").read_text())["next"] == "again"
    assert [path.name for path in tmp_path.iterdir()] == ["failure.json"]
