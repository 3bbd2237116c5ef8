"""Rows in, rows with answers out: what is added, in which order, and what is refused before the
first answer.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from errors import holds, lines_with, refuses
from runs import ROWS, make_run, peft_model, write_rows
from tunesmith.cli.main import main
from tunesmith.config.schema import Source
from tunesmith.data.rows.detect import detect
from tunesmith.data.source.open_source import from_list
from tunesmith.errors import DataError, UsageError
from tunesmith.inference.decoding import Decoding
from tunesmith.inference.load_run import LoadedModel, load_run
from tunesmith.tools.evaluate.generate import find_source, generate


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
    # A single column of any name trains as text; this run was trained on none.
    with refuses(DataError, where="rows", names=["foo", "question", "reply"], fix=["prompt=foo"]):
        generate(asked, [{"foo": "a"}])
    with refuses(DataError, where="rows", names=["foo", "bar", "question", "reply"]):
        generate(asked, [{"foo": "a", "bar": "b"}])
    (renamed,) = generate(asked, [{"foo": "a"}], Decoding(3), columns={"prompt": "foo"})
    assert renamed["output"] == plain["output"]


@pytest.mark.parametrize(
    "rows",
    [
        [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}],
        # The first has no answer; `instruction` alone does not say where the others have theirs.
        [{"instruction": "a", "response": ""}, {"instruction": "c", "response": "d"}],
        [{"q": "a", "reply": "b", "id": 1}, {"q": "c", "reply": "d", "id": 2}],
        [{"dialog": ENDED}, {"dialog": [TURN, {"role": "assistant", "content": "d"}]}],
        # Prompts without an answer, under a name that `train` knows.
        [{"question": "a"}, {"question": "c"}],
    ],
)
def test_columns_are_found_as_train_finds_them(
    loaded: LoadedModel, rows: list[dict[str, Any]]
) -> None:
    answers = [row.get("answer") or row.get("response") or row.get("reply") for row in rows]
    if "dialog" in rows[0]:
        answers = [row["dialog"][-1]["content"] for row in rows]
    plain = next(generate(loaded, [{"prompt": "a"}], Decoding(3)))
    found = list(generate(loaded, rows, Decoding(3)))
    assert [row.get("reference") for row in found] == [answer or None for answer in answers]
    assert found[0]["output"] == plain["output"]
    if all(answers):
        layout = detect(from_list(rows), Source(source="rows"))
        source = find_source(from_list(rows), (), "auto", None)
        assert (source.format, source.columns) == (layout.format, layout.renamed)


def test_a_column_that_was_detected_is_named(
    loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(loaded, [{"question": "a"}], Decoding(1))
    (line,) = lines_with(capsys.readouterr().err, "question", "prompt")
    assert not holds(line, "completion"), "the rows have no such column"


def test_columns_that_nothing_tells_are_refused_with_a_proposal(loaded: LoadedModel) -> None:
    with refuses(DataError, where="rows", names=["colour"], fix=["--columns"]):
        generate(loaded, [{"colour": "red", "shape": "round"}])


# Types whose config names no number of positions.
UNLIMITED: dict[str, dict[str, int]] = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 2,
    },
    "falcon_mamba": {"hidden_size": 32, "num_hidden_layers": 2},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    # The third layer of three is one of attention.
    "recurrent_gemma": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 16,
        "lru_width": 64,
    },
    # It reads what the padding mask hides.
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", UNLIMITED)
def test_models_without_a_limit_of_positions_answer_chat_and_are_scored(
    tiny: Path,
    tmp_path: Path,
    model_type: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    torch.manual_seed(0)
    ids = {"vocab_size": 272, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    config = AutoConfig.for_model(model_type, **UNLIMITED[model_type], **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    unlimited = load_run(folder, device="cpu")
    if model_type != "rwkv":
        assert unlimited.context is None
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "a longer one", "completion": "d"}]
    together = [row["output"] for row in generate(unlimited, rows, Decoding(4))]
    alone = [next(generate(unlimited, [row], Decoding(4)))["output"] for row in rows]
    assert together == alone
    write_rows(tmp_path / "rows.jsonl", rows)
    words = ["eval", str(folder), "--data", str(tmp_path / "rows.jsonl"), "--score", "exact"]
    output = ["--output", str(tmp_path / "answers.jsonl")]
    assert main([*words, *output, "--max-new-tokens", "4", "--device", "cpu", "--json"]) == 0
    capfd.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n"))
    assert main(["chat", str(folder), "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert capfd.readouterr().out.strip() == together[0].strip()
