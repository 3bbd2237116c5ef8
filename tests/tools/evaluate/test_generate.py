"""Rows in, rows with answers out: what is added, in which order, and what is refused before that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from errors import holds, lines_with, refuses
from runs import ROWS, make_run, peft_model
from tunesmith.answers.decoding import Decoding
from tunesmith.answers.load_run import LoadedModel, load_run
from tunesmith.errors import DataError
from tunesmith.tools.evaluate.generate import generate


@pytest.fixture(scope="module")
def loaded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("generate") / "run"
    make_run(folder, tiny, peft_model(tiny))
    return load_run(folder, device="cpu")


@pytest.fixture(scope="module")
def answer_to_a(loaded: LoadedModel) -> str:
    """The answer to the question "a"."""
    (row,) = generate(loaded, [{"prompt": "a"}], Decoding(3))
    return row["output"]


@pytest.mark.slow
def test_rows_come_back_in_order_with_answer_and_reference(loaded: LoadedModel) -> None:
    """And the model does not see the answer of a row."""
    answered = list(generate(loaded, ROWS, Decoding(4), batch_size=5))
    assert [{**row, "output": row["reference"]} for row in answered] == [
        {**row, "reference": row["output"]} for row in ROWS
    ]
    assert answered[3:] == list(generate(loaded, ROWS, Decoding(4), batch_size=5, start=3))
    without = [{k: v for k, v in row.items() if k != "output"} for row in ROWS]
    blind = list(generate(loaded, without, Decoding(4), batch_size=5))
    assert blind == [{k: v for k, v in row.items() if k != "reference"} for row in answered]


TURN = {"role": "user", "content": "a"}
ENDED = [TURN, {"role": "assistant", "content": "b"}]
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("rows", "references"),
    [
        ([{"messages": [TURN]}], [None]),
        ([{"messages": ENDED}], ["b"]),
        ([{"conversations": SHARED}], ["b"]),
        ([{"prompt": [TURN], "completion": ENDED[1:]}], ["b"]),
        ([{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}], ["b", "d"]),
        # The first has no answer; `instruction` alone does not say where the others have theirs.
        (
            [{"instruction": "a", "response": ""}, {"instruction": "c", "response": "d"}],
            [None, "d"],
        ),
        ([{"q": "a", "reply": "b", "id": 1}, {"q": "c", "reply": "d", "id": 2}], ["b", "d"]),
        ([{"question": "a"}, {"question": "c"}], [None, None]),
    ],
)
def test_every_form_of_a_row_gives_one_prompt_from_the_columns_that_train_finds(
    loaded: LoadedModel, answer_to_a: str, rows: list[dict[str, Any]], references: list[str | None]
) -> None:
    found = list(generate(loaded, rows, Decoding(3)))
    assert [row.get("reference") for row in found] == references
    assert found[0]["output"] == answer_to_a


def test_a_prompt_without_room_for_its_answer_is_refused_at_the_call(loaded: LoadedModel) -> None:
    with refuses(DataError, where="rows[1]", names=["1 of 2"]):
        generate(loaded, [{"text": "a"}, {"text": "a" * 2024}], Decoding(25))
    generate(loaded, [{"text": "a" * 2024}], Decoding(24))  # the context is 2,048 tokens


@pytest.mark.slow
def test_questions_alone_are_read_by_the_columns_that_were_trained(
    tiny: Path, tmp_path: Path
) -> None:
    """Of two sources the one whose other columns are there; the answer's may be missing."""
    shape = {"source": str(tmp_path / "run-rows.jsonl"), "format": "prompt-completion"}
    columns = [{"prompt": "question", "completion": name} for name in ("answer", "reply")]
    sources = [{**shape, "columns": each} for each in columns]
    make_run(tmp_path / "run", tiny, peft_model(tiny), data={"train": sources})
    asked = load_run(tmp_path / "run", device="cpu")
    (plain,) = generate(asked, [{"prompt": "a"}], Decoding(3))
    for row, told, reference in (
        ({"question": "a"}, None, None),
        ({"question": "a", "reply": "b"}, None, "b"),
        ({"q": "a", "question": "z"}, {"prompt": "q"}, None),
        ({"foo": "a"}, {"prompt": "foo"}, None),
    ):
        (found,) = generate(asked, [row], Decoding(3), columns=told)
        assert (found["output"], found.get("reference")) == (plain["output"], reference)
    # A single column of any name trains as text; this run was trained on none.
    with refuses(DataError, where="rows", names=["foo", "question", "reply"], fix=["prompt=foo"]):
        generate(asked, [{"foo": "a"}])


def test_a_detected_column_is_named_and_columns_that_nothing_tells_are_refused(
    loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(loaded, [{"question": "a"}], Decoding(1))
    (line,) = lines_with(capsys.readouterr().err, "question", "prompt")
    assert not holds(line, "completion"), "the rows have no such column"
    with refuses(DataError, where="rows", names=["colour"], fix=["--columns"]):
        generate(loaded, [{"colour": "red", "shape": "round"}])
