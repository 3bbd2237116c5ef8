"""Rows in, rows with answers out: what is added, in which order, and what is refused before the
first answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from errors import refuses
from runs import ROWS, make_run, peft_model
from tunesmith.errors import DataError, UsageError
from tunesmith.inference.decoding import Decoding
from tunesmith.inference.generate import generate
from tunesmith.inference.load_run import LoadedModel, load_run


@pytest.fixture(scope="module")
def loaded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("generate") / "run"
    make_run(folder, tiny, peft_model(tiny))
    return load_run(folder, device="cpu")


@pytest.mark.slow
def test_rows_come_back_in_order_with_answer_and_reference(loaded: LoadedModel) -> None:
    answered = list(generate(loaded, ROWS, Decoding(4), batch_size=5))
    assert [{**row, "output": row["reference"]} for row in answered] == [
        {**row, "reference": row["output"]} for row in ROWS
    ]
    assert answered[3:] == list(generate(loaded, ROWS, Decoding(4), batch_size=5, start=3))


def test_the_answer_of_a_row_is_not_shown_to_the_model(loaded: LoadedModel) -> None:
    without = [{k: v for k, v in row.items() if k != "output"} for row in ROWS]
    assert [row["output"] for row in generate(loaded, without, Decoding(4))] == [
        row["output"] for row in generate(loaded, ROWS, Decoding(4))
    ]
    assert not any("reference" in row for row in generate(loaded, without, Decoding(4)))


TURN = {"role": "user", "content": "a"}
ENDED = [TURN, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"messages": [TURN]}, False),
        ({"messages": ENDED}, True),
        # Another name of the same role
        (
            {"messages": [TURN, {"role": "gpt", "content": "b"}]},
            True,
        ),
        ({"conversations": [{"from": "human", "value": "a"}]}, False),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, True),
        ({"prompt": "a"}, False),
        ({"prompt": [TURN]}, False),
        ({"prompt": [TURN], "completion": ENDED[1:]}, True),
        ({"instruction": "a", "input": ""}, False),
    ],
)
def test_every_form_of_a_row_gives_one_prompt(
    loaded: LoadedModel, row: dict[str, Any], answer: bool
) -> None:
    (plain,) = generate(loaded, [{"messages": [TURN]}], Decoding(3))
    (found,) = generate(loaded, [row], Decoding(3))
    assert found["output"] == plain["output"]
    assert found.get("reference") == ("b" if answer else None)


def test_a_prompt_without_room_for_its_answer_is_refused_at_the_call(loaded: LoadedModel) -> None:
    with refuses(DataError, where="rows row 2", names=["1 of 2"]):
        generate(loaded, [{"text": "a"}, {"text": "a" * 2024}], Decoding(25))
    generate(loaded, [{"text": "a" * 2024}], Decoding(24))  # the context is 2,048 tokens


def test_questions_alone_are_read_by_the_columns_that_were_trained(
    tiny: Path, tmp_path: Path
) -> None:
    """Of two sources with the question's column the one whose other columns are there; the answer's
    may be missing.
    """
    columns = [
        {"prompt": "question", "completion": "answer"},
        {"prompt": "question", "completion": "reply"},
    ]
    sources = [
        {"source": str(tmp_path / "run-rows.jsonl"), "format": "prompt-completion", "columns": c}
        for c in columns
    ]
    make_run(tmp_path / "run", tiny, peft_model(tiny), data={"train": sources})
    asked = load_run(tmp_path / "run", device="cpu")
    (plain,) = generate(asked, [{"prompt": "a"}], Decoding(3))
    (found,) = generate(asked, [{"question": "a"}], Decoding(3))
    (answered,) = generate(asked, [{"question": "a", "reply": "b"}], Decoding(3))
    (told,) = generate(asked, [{"q": "a", "question": "z"}], Decoding(3), columns={"prompt": "q"})
    assert plain["output"] == found["output"] == answered["output"] == told["output"]
    assert (found.get("reference"), answered["reference"]) == (None, "b")
    with refuses(UsageError, where="--columns", names=["promt", "prompt-completion"]):
        generate(asked, [{"q": "a"}], format_name="prompt-completion", columns={"promt": "q"})
