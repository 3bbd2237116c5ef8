"""Which format rows have and in which columns; what is unclear is asked for, and never guessed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from errors import check_error, holds, refuses
from tunesmith.cli.options import column_names
from tunesmith.config.check import FORMAT_COLUMNS
from tunesmith.config.row_settings import rows_set_by
from tunesmith.config.schema import Source
from tunesmith.errors import DataError
from tunesmith.rows.detect import Detected, detect
from tunesmith.rows.formats import convert_row
from tunesmith.rows.labels import read_label
from tunesmith.rows.samples import texts_by_role
from tunesmith.rows.source.open_source import from_list, read_rows

Row = dict[str, Any]
U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
TURNS, OTHER_TURNS = [U, A], [U, {"role": "assistant", "content": "no"}]
FROMS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
CALL = [
    FROMS[0],
    {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
    {"from": "observation", "value": "1"},
    FROMS[1],
]
TOOLS = json.dumps([{"name": "f", "description": "", "parameters": {}}])
ALPACA = {"instruction": "Translate", "input": "word", "output": "mot"}
PAIR = {"prompt": "hi", "completion": "ho"}
CHAT = {"messages": TURNS}


@pytest.fixture(autouse=True)
def rows_by_option() -> Iterator[None]:
    with rows_set_by(option=True):
        yield


def texts(*names: str) -> Row:
    return dict.fromkeys(names, "some text")


def found(*rows: Row, source: Source | None = None, **keys: bool) -> Detected:
    return detect(from_list(list(rows), "rows"), source or Source(source="rows"), **keys)


def place(number: int) -> str:
    return f"rows[{number - 1}]"


def sample_of(row: Row, form: Any, **columns: str) -> Any:
    source = Source(source="rows", format=form, columns=columns)
    return convert_row(row, source, where="r").samples[0]


# A row or the names of its columns of text, its format, and the columns that are read: with `=`
# where the format has another name. The others are ignored.
CLEAR: list[tuple[Row | str, str, str]] = [
    ({**CHAT, "text": "x"}, "messages", "messages"),
    ({"dialog": TURNS, "id": 1}, "messages", "messages=dialog"),
    ({"messages": json.dumps(TURNS, indent=1)}, "messages", "messages"),
    ({**CHAT, "tools": TOOLS}, "messages", "messages tools"),
    ({**CHAT, "prompt": "hi", "prompt_id": "1"}, "messages", "messages"),
    ({**CHAT, "images": []}, "messages", "messages images"),
    ("image question answer", "prompt-completion", "prompt=question completion=answer images=image"),
    ("instruction input output image_path", "alpaca", "instruction output input images=image_path"),
    ({"messages": FROMS}, "sharegpt", "conversations=messages"),
    ({"chat": json.dumps(FROMS)}, "sharegpt", "conversations=chat"),
    ({"conversations": CALL, "tools": TOOLS, "system": "S"}, "sharegpt", "conversations system tools"),
    ({"tags": ["a"], **PAIR}, "prompt-completion", "prompt completion"),
    ("instruction input output text", "alpaca", "instruction output input"),
    ("instruction context response category", "alpaca", "instruction output=response input=context"),
    ({**ALPACA, "system": "S", "history": []}, "alpaca", "instruction output input system history"),
    ("Question ANSWER", "prompt-completion", "prompt=Question completion=ANSWER"),
    ("problem solution level", "prompt-completion", "prompt=problem completion=solution"),
    ("Frage Antwort", "prompt-completion", "prompt=Frage completion=Antwort"),
    ("问题 答案", "prompt-completion", "prompt=问题 completion=答案"),
    ("userInput modelResponse", "prompt-completion", "prompt=userInput completion=modelResponse"),
    ("question answer system_prompt", "alpaca", "instruction=question output=answer system=system_prompt"),
    ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt-completion", "prompt completion"),
    ("content url", "text", "text=content"),
    ("prompt chosen rejected score", "preference", "chosen rejected prompt"),
    ({"Chosen": TURNS, "Rejected": OTHER_TURNS, "messages": TURNS}, "preference", "chosen=Chosen rejected=Rejected"),
    ({**PAIR, "label": True}, "feedback", "prompt completion label"),
    ({**CHAT, "kto_tag": False}, "feedback", "messages label=kto_tag"),
    ({"text": "x", "metadata": [{"a": 1}]}, "text", "text"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "form", "read"), CLEAR)
def test_what_is_clear_is_found(row: Row | str, form: str, read: str) -> None:
    row = texts(*row.split()) if isinstance(row, str) else row
    layout = found(row, row, row)
    columns = {part.partition("=")[0]: part.rpartition("=")[2] for part in read.split()}
    assert (layout.format, layout.columns) == (form, columns)
    assert {*layout.ignored} == row.keys() - {*columns.values()}


@pytest.mark.parametrize(
    ("row", "form", "read"),
    [
        ("question target", "prompt", "prompt=question"),
        ({"prompt": TURNS[:1], "target": 3}, "prompt", "prompt"),
        ({"messages": TURNS[:1], "tools": TOOLS}, "prompt", "prompt=messages tools"),
        # An own answer is read if there is one.
        (PAIR, "prompt-completion", "prompt completion"),
        (CHAT, "messages", "messages"),
    ],
)
def test_rows_without_an_answer_are_found_if_answers_are_sampled(
    row: Row | str, form: str, read: str
) -> None:
    row = texts(*row.split()) if isinstance(row, str) else row
    columns = {part.partition("=")[0]: part.rpartition("=")[2] for part in read.split()}
    layout = found(row, row, source=Source(source="rows", format="prompt"))
    assert (layout.format, layout.columns) == (form, columns)
    with pytest.raises(DataError) if form == "prompt" else nullcontext():
        assert found(row, row).format != "prompt"


# A row, and what the fix proposes.
UNCLEAR: list[tuple[Row, str]] = [
    (texts("prompt", "question", "answer"), "--columns prompt=prompt,completion=answer or --columns prompt=question,completion=answer"),
    ({"short": TURNS, "long": TURNS}, "--columns messages=short or --columns messages=long"),
    ({**CHAT, **texts("question", "answer")}, "--columns messages=messages or --columns prompt=question,completion=answer"),
    ({"text": "x y", "label": "pos"}, "--columns prompt=text,completion=label to"),
    ({"text": "x y", "label": "pos"}, "or --columns text=text to"),
    ({"text": "x y", "emotions": [3, 5], "url": "u"}, "completion=emotions to"),
    (texts("x", "y"), "--columns prompt=x,completion=y"),
    ({"title": "x", "body": "a longer text", "reply": "y"}, "prompt=body,completion=reply"),
    ({"question": "x", "answer": 4}, "quotes"),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "rename"),
    ({"messages": []}, "delete the row"),
    ({"question": "x", "answer": None}, "fill the column"),
    ({**PAIR, "label": None}, "rename"),
    ({**CHAT, "rejected_response": "no"}, "--format messages"),
    ({"nr": 1, "body": "some words"}, "--columns text=body"),
    (texts("prompt", "answer_chosen", "answer_rejected"), "--columns chosen=answer_chosen,rejected=answer_rejected"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "fix"), UNCLEAR)
def test_what_is_unclear_is_asked_for_and_each_proposal_is_taken(row: Row, fix: str) -> None:
    with refuses(DataError) as refused:
        found(row, row, row)
    assert fix in refused.value.fix
    for proposed in fix.split(" or ") if "--columns" in fix else ():
        flags = proposed.removeprefix("or ").removeprefix("--columns ").removesuffix(" to")
        columns = dict(pair.split("=") for pair in flags.split(","))
        layout = found(row, source=Source(source="rows", columns=columns))
        assert layout.columns.items() >= columns.items()
        assert set(columns) <= set(FORMAT_COLUMNS[layout.format])


def test_columns_and_format_that_are_given_narrow_the_choice() -> None:
    row = texts("question", "answer", "response", "notes")

    def given(row: Row, form: Any = None, **columns: str) -> Detected:
        source = Source(source="rows", columns=columns)
        source = source if form is None else replace(source, format=form)
        return found(row, source=source, any_format=form is None)

    asked = given(row, completion="response")
    assert (asked.format, asked.columns["prompt"]) == ("prompt-completion", "question")
    named = given(texts("q", "a"), instruction="q", output="a")
    assert (named.format, named.columns) == ("alpaca", {"instruction": "q", "output": "a"})
    assert given(row, "alpaca", output="answer").columns["instruction"] == "question"
    assert given(row, "text", text="notes").columns == {"text": "notes"}
    for columns in ({"promt": "question"}, {"prompt": "question", "completion": "question"}):
        with refuses(DataError, fix=["--columns prompt=question,completion=answer"]):
            given(row, **columns)
    with refuses(DataError, fix=["--format prompt-completion --columns prompt=q,completion=a"]):
        given(texts("q", "a"), "messages")


def test_a_mistyped_answer_of_a_pair_is_recognized() -> None:
    row = texts("prompt", "chosen", "reject")
    with refuses(DataError, fix=["--columns chosen=chosen,rejected=reject"]) as refused:
        found(row)
    assert "completion=" not in refused.value.fix


def test_a_prompt_beside_its_answer_is_no_chat() -> None:
    with refuses(DataError, names=["prompt", "answer"]):
        found({"prompt": TURNS, "completion": TURNS[1:]})
    # The whole chat beside its beginning is one.
    assert found({"prompt": TURNS[:1], "completion": TURNS}).columns["messages"] == "completion"


def test_a_missing_column_is_told_with_a_mapping_that_can_be_pasted() -> None:
    """Names with a comma, a colon or a quote."""
    with refuses(DataError) as refused:
        sample_of({"it's, a: name": "some text", "b": "more text"}, "prompt-completion")
    words = shlex.split(refused.value.fix.removeprefix("use ").partition(", or ")[0])
    assert words[0] == "--columns"
    assert column_names(words[1]) == [("prompt", "it's, a: name"), ("completion", "b")]
    assert column_names("prompt=q, completion=a") == [("prompt", "q"), ("completion", "a")]


def test_a_csv_without_a_header_is_told_to_need_one(tmp_path: Path) -> None:
    source = Source(source=str(tmp_path / "a b.csv"))
    for lines, has_header in (
        ("How do I pay?,By card.\nWhy?,So.", False),
        ("This is the first sentence of a corpus.\nThis is another.", False),
        ("col_0,col_1\nHow do I pay?,By card.", True),
    ):
        (tmp_path / "a b.csv").write_text(lines)
        with refuses(DataError) as refused:
            detect(read_rows(source), source)
        assert holds(refused.value.fix, "header") != has_header


# --- one odd row among good ones: a good row, an odd one, and the column that the error names

ODD: list[tuple[Row, Row, str]] = [
    (ALPACA, {**ALPACA, "instruction": None}, "instruction"),
    (ALPACA, {**ALPACA, "input": 3}, "input"),
    ({**ALPACA, "system": "S"}, {**ALPACA, "system": 3}, "system"),
    ({"messages": json.dumps(TURNS)}, {"messages": "[{broken"}, "messages"),
    ({**CHAT, "text": "x"}, {"messages": [], "text": "x"}, "messages"),
    ({**PAIR, "label": True}, {**PAIR, "label": None}, "label"),
    ({**PAIR, "label": 1}, {**PAIR, "label": 2}, "2"),
]


@pytest.mark.parametrize(("good", "odd", "named"), ODD)
def test_odd_rows_are_named_and_can_be_left_out(good: Row, odd: Row, named: str) -> None:
    for count in (1, 3):
        rows = [good] * 3 + [odd] * count
        with refuses(DataError, fix=["data.bad_rows=skip"]) as refused:
            found(*rows)
        error = refused.value
        assert error.where.startswith(place(4))
        assert holds(f"{error.what} {error.why}", named)
        if count > 1:
            assert holds(error.what, 3, 6)
            assert all(f"{place(n)}: " in error.why for n in (4, 5, 6))
        layout = found(*rows, skips_bad_rows=True)
        assert set(layout.columns.values()) >= found(good).columns.keys()


def test_odd_rows_outside_of_the_sample_are_listed() -> None:
    rows = [dict(ALPACA) for _ in range(1001)]
    for i in (0, 3, 501, 1000):
        rows[i]["instruction"] = None
    with refuses(DataError, names=[4, "1,001"]) as refused:
        found(*rows)
    assert refused.value.where == place(1)
    listed = [cause.split(":")[0] for cause in refused.value.why.split("; ")]
    assert listed[:-1] == [place(n) for n in (1, 4, 502, 1001)]


def test_names_that_differ_from_row_to_row_are_no_columns() -> None:
    rows = [{**PAIR, **dict.fromkeys(map(str, range(100 * i, 100 * i + 100)))} for i in range(101)]
    with refuses(DataError, names=["10,102"]):
        found(*rows)


# --- labels as people write them


LABELS = [
    (True, False), (1, 0), (1.0, 0.0), (" TRUE ", "false"), ("1", "0"), ("1.0", "0.0"), ("yes", "No"), ("good", "bad"),
    ("desirable", "undesirable"), ("chosen", "rejected"), ("thumbs_up", "Thumbs Down"), ("👍🏽", "👎🏿"),
]  # fmt: skip


def test_labels_are_read_as_people_write_them(write: Callable[[str, str], str]) -> None:
    for good, bad in LABELS:
        layout = found({**PAIR, "label": good}, {**PAIR, "label": bad})
        assert layout.format == "feedback"
        assert (read_label(good), read_label(bad)) == (True, False)
    for label in (None, 2, -1, 0.5, "", "positive", "neutral", "5", [], {"a": 1}):
        assert read_label(label) is None
    source = Source(source=write("a.csv", "prompt,completion,label\nhi,hello,true\nyo,bad,False\n"))
    rows = read_rows(source)
    assert detect(rows, source).format == "feedback"
    source = replace(source, format="feedback")
    made = [convert_row(rows[i], source, where=rows.where(i)) for i in range(2)]
    assert [answer.is_good for answer in made] == [True, False]


def test_an_answer_that_is_labeled_bad_is_no_answer_to_learn() -> None:
    with refuses(DataError, where="r", fix=["method=kto"]):
        sample_of({**PAIR, "label": 0}, "prompt-completion")
    assert sample_of({**PAIR, "label": 1}, "prompt-completion")


def test_the_input_of_pairs_is_read() -> None:
    row = {"instruction": "x", "input": "more", "chosen": "a", "rejected": "b"}
    layout = found(row)
    assert {*layout.columns.values()} == row.keys()
    assert sample_of(row, layout.format, **layout.columns).prompt == "x\nmore"


# --- files


def test_files_of_several_formats_are_refused(write: Callable[[str, str], str]) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in (PAIR, CHAT, PAIR, CHAT, CHAT))
    source = Source(source=write("my rows.jsonl", rows))
    with refuses(DataError, where=source.source, fix=["file"]) as refused:
        detect(read_rows(source), source)
    assert holds(refused.value.why, "3 as messages", "2 as prompt-completion")


def test_a_chat_that_pandas_wrote_as_python_is_refused(write: Callable[[str, str], str]) -> None:
    source = Source(source=write("a.csv", f'messages\n"{TURNS}"\n'))
    with refuses(DataError, where="a.csv:2", names=["Python"]) as refused:
        detect(read_rows(source), source)
    assert "to_json" in refused.value.fix


def test_nulls_of_an_export_from_arrow_are_no_arguments(tmp_path: Path) -> None:
    """A null is left out where another call of the same file has that argument, and not others."""

    def called(name: str, **arguments: Any) -> Row:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        turns = [U, {"role": "assistant", "content": "", "tool_calls": [call]}]
        schema = {"name": name, "parameters": {"type": "object", "enum": None}}
        return {"messages": turns, "tools": [schema]}

    def read(*rows: Row) -> list[Any]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        table = read_rows(Source(source=str(path)))
        samples = [sample_of(table[i], "messages") for i in range(len(table))]
        assert all(s.tools[0]["function"]["parameters"] == {"type": "object"} for s in samples)
        return [s.messages[-1]["tool_calls"][0]["function"]["arguments"] for s in samples]

    weather = called("weather", city="Oslo", days=None)
    assert read(weather, called("wait", city=None, days=2)) == [{"city": "Oslo"}, {"days": 2}]
    kept = {"city": "Oslo", "days": None}
    assert read(weather, called("wait", days=2)) == [kept, {"days": 2}]
    assert read(weather) == [kept], "one call shows nothing"


# --- chats that are no lists of messages


def test_what_looks_like_a_chat_is_never_plain_text() -> None:
    for row in (
        {"conversations": ["hi", "ho"], "source": "web"},
        {"dialog": [], "text": "x"},
        {"instruction": json.dumps([U]), "output": "ho"},
        {"text": str([U, A])},
    ):
        with refuses(DataError) as refused:
            found(row, row, row)
        assert refused.value.where.startswith(place(1))


def test_json_text_of_json_text_of_a_chat_is_read() -> None:
    row = {"conversations": json.dumps(json.dumps(TURNS)), "text": "x"}
    layout = found(row)
    assert sample_of(row, layout.format, **layout.columns).messages == TURNS


# --- files with columns of other tools


def test_jq_is_proposed_for_json_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"question": "JSON of bread", "answer": {"a": 1}}]), path)
    columns = {"prompt": "question", "completion": "answer"}
    source = Source(source=str(path), format="prompt-completion", columns=columns)
    rows = read_rows(source)
    with refuses(DataError, fix=["frame.to_json", "rows.jsonl", "new-rows.jsonl"]):
        convert_row(rows[0], source, where=rows.where(0))


CASES = yaml.safe_load(Path(__file__).with_name("column_cases.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_columns_are_read_or_the_fix_says_how(case: Row, write: Any) -> None:
    path = Path(write(case["file"], case["text"].encode(case.get("encoding", "utf-8"))))
    form = case.get("format")
    source = Source(source=str(path), columns=case.get("columns", {}), format=form or "messages")
    read = {}
    with pytest.raises(DataError) if "error" in case else nullcontext() as refused:
        rows = read_rows(source)
        layout = detect(rows, source, any_format=form is None)
        source = replace(source, format=layout.format, columns=layout.columns)
        for i in range(len(rows)):
            [sample] = convert_row(rows[i], source, where=rows.where(i)).samples
            turns = [f"{role}: {text}" for role, text in texts_by_role(sample)]
            read[rows.where(i).removeprefix(f"{path.parent}/")] = turns
    if refused is None:
        assert read == case["rows"]
    else:
        error = refused.value
        check_error(error, where=case.get("where"), names=case["error"], fix=case["fix"])
        assert not any(word in error.fix for word in case.get("never", ()))
