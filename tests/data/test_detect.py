"""Which format rows have and in which columns; what is unclear is asked for, and never guessed."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errors import holds, refuses
from tunesmith.cli.options import column_names
from tunesmith.config.check import FORMAT_COLUMNS
from tunesmith.config.row_settings import rows_set_by
from tunesmith.config.schema import Source
from tunesmith.data.rows.columns import plain
from tunesmith.data.rows.detect import SAMPLE, Detected, detect
from tunesmith.data.rows.formats import convert_row
from tunesmith.data.rows.labels import read_label
from tunesmith.data.source.open_source import from_list, read_rows
from tunesmith.errors import DataError

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
    return f"rows row {number}"


def sample_of(row: Row, form: Any, **columns: str) -> Any:
    source = Source(source="rows", format=form, columns=columns)
    return convert_row(row, source, where="r").samples[0]


# A row or the names of its columns of text, its format, and the columns that are read: with `=`
# where the format has another name. The others are ignored.
CLEAR: list[tuple[Row | str, str, str]] = [
    ({**CHAT, "text": "x"}, "messages", "messages"),
    ({"conversations": TURNS}, "messages", "messages=conversations"),
    ({"dialog": TURNS, "id": 1}, "messages", "messages=dialog"),
    ({"messages": json.dumps(TURNS, indent=1)}, "messages", "messages"),
    ({**CHAT, "tools": TOOLS}, "messages", "messages tools"),
    (
        {"conversation": TURNS, "redacted": True, "selected": "yes"},
        "messages",
        "messages=conversation",
    ),
    ({**CHAT, "prompt": "hi", "prompt_id": "1"}, "messages", "messages"),
    ({**CHAT, "images": ["a.png"]}, "messages", "messages images"),
    ({**CHAT, "images": []}, "messages", "messages images"),
    (
        "image question answer",
        "prompt-completion",
        "prompt=question completion=answer images=image",
    ),
    ({"id": 1, "image": "a", "conversations": FROMS}, "sharegpt", "conversations images=image"),
    ("instruction input output image_path", "alpaca", "instruction output input images=image_path"),
    ({"messages": FROMS}, "sharegpt", "conversations=messages"),
    ({"chat": json.dumps(FROMS)}, "sharegpt", "conversations=chat"),
    (
        {"conversations": CALL, "tools": TOOLS, "system": "S"},
        "sharegpt",
        "conversations system tools",
    ),
    ({"tags": ["a"], **PAIR}, "prompt-completion", "prompt completion"),
    ("instruction input output text", "alpaca", "instruction output input"),
    ("instruction output", "alpaca", "instruction output"),
    (
        "instruction context response category",
        "alpaca",
        "instruction output=response input=context",
    ),
    ({**ALPACA, "system": "S", "history": []}, "alpaca", "instruction output input system history"),
    ({"instruction": "x", "output": "y", "history": TURNS}, "alpaca", "instruction output history"),
    ("prompt response", "prompt-completion", "prompt completion=response"),
    ("Question ANSWER", "prompt-completion", "prompt=Question completion=ANSWER"),
    ("problem solution level", "prompt-completion", "prompt=problem completion=solution"),
    ("input output", "prompt-completion", "prompt=input completion=output"),
    (
        "question answer system_prompt",
        "alpaca",
        "instruction=question output=answer system=system_prompt",
    ),
    ("question context answer", "alpaca", "instruction=question output=answer input=context"),
    ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt-completion", "prompt completion"),
    ("text category language", "text", "text"),
    ("content url", "text", "text=content"),
    ("label", "text", "text=label"),
    ("body", "text", "text=body"),
    ("prompt chosen rejected score", "preference", "chosen rejected prompt"),
    (
        {"Chosen": TURNS, "Rejected": OTHER_TURNS, "messages": TURNS},
        "preference",
        "chosen=Chosen rejected=Rejected",
    ),
    (
        {"conversations": FROMS[:1], "chosen": FROMS[1], "rejected": {"from": "gpt", "value": "n"}},
        "preference",
        "chosen rejected conversations",
    ),
    ({**PAIR, "label": True}, "feedback", "prompt completion label"),
    ({**CHAT, "kto_tag": False}, "feedback", "messages label=kto_tag"),
    ({"text": "x", "tags": []}, "text", "text"),
    ({"text": "x", "metadata": [{"a": 1}]}, "text", "text"),
    ({"text": "x", "text2": None}, "text", "text"),
]


@pytest.mark.parametrize(("row", "form", "read"), CLEAR)
def test_what_is_clear_is_found(row: Row | str, form: str, read: str) -> None:
    row = texts(*row.split()) if isinstance(row, str) else row
    layout = found(row, row, row)
    columns = {part.partition("=")[0]: part.rpartition("=")[2] for part in read.split()}
    assert (layout.format, layout.columns) == (form, columns)
    assert {*layout.ignored} == row.keys() - {*columns.values()}


def test_a_layout_is_described_by_its_columns_and_what_it_leaves() -> None:
    described = found(texts(" Problem ", "solution", "level")).describe()
    assert holds(described, "Problem", "solution", "prompt-completion", "level")


# A row, and what the fix proposes.
UNCLEAR: list[tuple[Row, str]] = [
    (
        texts("question", "answer", "response"),
        "--columns prompt=question,completion=answer or --columns prompt=question,completion=response",
    ),
    (
        texts("prompt", "question", "answer"),
        "--columns prompt=prompt,completion=answer or --columns prompt=question,completion=answer",
    ),
    (
        texts("Answer", "answer", "question"),
        "--columns prompt=question,completion=Answer or --columns prompt=question,completion=answer",
    ),
    ({"short": TURNS, "long": TURNS}, "--columns messages=short or --columns messages=long"),
    (
        {"messages": TURNS, **texts("question", "answer")},
        "--columns messages=messages or --columns prompt=question,completion=answer",
    ),
    ({"text": "x y", "label": "pos"}, "--columns prompt=text,completion=label to"),
    ({"text": "x y", "label": "pos"}, "or --columns text=text to"),
    ({"content": "x y", "label": 1, "split": "train"}, "prompt=content,completion=label to"),
    ({"text": "x y", "coarse_label": 1, "fine_label": 3}, "prompt=text,completion=coarse_label to"),
    ({"text": "x y", "emotions": [3, 5], "url": "u"}, "completion=emotions to"),
    ({"text": "x y", "labels": [1, 3], "id": "a"}, "completion=labels to"),
    (texts("x", "y"), "--columns prompt=x,completion=y"),
    ({"title": "x", "body": "a longer text", "reply": "y"}, "prompt=body,completion=reply"),
    ({**texts("chosen", "rejected", "prompt"), "images": ["a.png"]}, "delete the pictures"),
    ({"question": "x", "answer": 4}, "quotes"),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "rename"),
    ({"dialog": [{"speaker": "a", "output": "x"}]}, '{"role": "user"'),
    ({"messages": []}, "delete the row"),
    ({"question": "x", "answer": None}, "fill the column"),
    ({**PAIR, "label": None}, "rename"),
    ({**CHAT, "label": None}, "rename"),
    ({**PAIR, "kto_tag": "sports"}, "rename"),
    ({**CHAT, "rejected_response": "no"}, "--format messages"),
    ({"nr": 1, "body": "some words"}, "--columns text=body"),
    (
        {"chosen_messages": TURNS, "rejected_messages": OTHER_TURNS},
        "--columns chosen=chosen_messages,rejected=rejected_messages",
    ),
    (
        {"prompt": "q", "answer_chosen": "a", "answer_rejected": "b"},
        "--columns chosen=answer_chosen,rejected=answer_rejected",
    ),
]


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
    pair = given(texts("prompt", "chosen", "rejected"), completion="chosen")
    assert pair.format == "prompt-completion"
    proposed = "--columns prompt=question,completion=answer"
    for columns, fix in (
        ({"promt": "question"}, proposed),
        ({"prompt": "question", "completion": "question"}, proposed),
        ({"completion": "reply"}, ""),
    ):
        with refuses(DataError, fix=[fix] if fix else []):
            given(row, **columns)
    with refuses(DataError, fix=["--format prompt-completion --columns prompt=q,completion=a"]):
        given(texts("q", "a"), "messages")


@pytest.mark.parametrize(
    ("names", "pair"),
    [
        (("prompt", "chosen", "reject"), ("chosen", "reject")),
        (("prompt", "completion", "chosen", "rejcted"), ("chosen", "rejcted")),
        (("Chose", "Reject"), ("Chose", "Reject")),
    ],
)
def test_a_mistyped_answer_of_a_pair_is_recognized(
    names: tuple[str, ...], pair: tuple[str, str]
) -> None:
    row = {name: f"some text of {name}" for name in names}
    fix = f"--columns chosen={pair[0]},rejected={pair[1]}"
    with refuses(DataError, fix=[fix]) as refused:
        found(row)
    assert "completion=" not in refused.value.fix
    with refuses(DataError, fix=[fix]):
        found(row, source=Source(source="rows", format="preference"), any_format=False)
    columns = {"chosen": pair[0], "rejected": pair[1]}
    assert found(row, source=Source(source="rows", columns=columns)).format == "preference"


@pytest.mark.parametrize("name", ["reject", "rejected", "Rejcted"])
def test_a_rejected_answer_is_not_proposed_for_a_completion(name: str) -> None:
    row = {"prompt": "what is it", "good": "this", name: "a text of many more letters"}
    with refuses(DataError, fix=[f"--columns chosen=...,rejected={name}"]) as refused:
        found(row)
    assert "completion" not in refused.value.fix


@pytest.mark.parametrize("more", [{}, {"label": True}])
def test_a_prompt_beside_its_answer_is_no_chat(more: Row) -> None:
    with refuses(DataError, names=["prompt", "answer"]):
        found({"prompt": TURNS, "completion": TURNS[1:], **more})
    assert found({"prompt": TURNS, **more}).columns["messages"] == "prompt"
    # The whole chat beside its beginning is one.
    row = {"prompt": TURNS[:1], "completion": TURNS, **more}
    assert found(row).columns["messages"] == "completion"


def test_the_sample_reaches_both_ends_of_a_long_file() -> None:
    seen: list[int] = []

    class Watched(list[Row]):
        def __getitem__(self, i: Any) -> Any:
            seen.append(i)
            return super().__getitem__(i)

    rows = from_list(Watched([{"text": str(i)} for i in range(10_000)]), "rows")
    assert detect(rows, Source(source="rows")).format == "text"
    assert (min(seen), max(seen), len(set(seen))) == (0, 9_999, SAMPLE)
    assert max(b - a for a, b in zip(sorted(seen), sorted(seen)[1:], strict=False)) < 60


@pytest.mark.slow
def test_a_wide_table_is_read_in_one_pass_over_its_names(tmp_path: Path) -> None:
    """A cache of 4,096 names was of no use for more columns: each use of a name was computed."""
    columns = {f"column {i}": "a" for i in range(5000)}
    before = plain.cache_info().misses
    assert found(*[{**PAIR, **columns}] * 3).format == "prompt-completion"
    with refuses(DataError, fix=["--columns"]):
        found(*[columns] * 3)
    assert plain.cache_info().misses - before < 6000
    names = ",".join(columns)
    (tmp_path / "wide.csv").write_text(f"{names}\n{names}\n")
    assert len(read_rows(Source(source=str(tmp_path / "wide.csv")))[0]) == 5000


def test_a_missing_column_is_told_with_a_mapping_that_can_be_pasted() -> None:
    """Names with a comma, a colon or a quote."""
    with refuses(DataError) as refused:
        sample_of({"it's, a: name": "x", "b": "y"}, "prompt-completion")
    words = shlex.split(refused.value.fix.removeprefix("use ").partition(", or ")[0])
    assert words[0] == "--columns"
    assert column_names(words[1]) == [("prompt", "it's, a: name"), ("completion", "b")]
    assert column_names("prompt=q, completion=a") == [("prompt", "q"), ("completion", "a")]


@pytest.mark.parametrize("form", ["prompt-completion", "alpaca"])
def test_a_recipe_with_a_format_is_proposed_the_columns_that_it_lacks(form: str) -> None:
    for row, columns in (
        (
            {"id": "T-1", "category": "x", "customer_message": "How?", "agent_reply": "So."},
            ["customer_message", "agent_reply"],
        ),
        (
            {"answer": "Because.", "rejected": "A longer text", "subject_line": "Why is it so?"},
            ["subject_line", "answer"],
        ),
    ):
        with refuses(DataError) as refused:
            sample_of(row, form)
        words = shlex.split(refused.value.fix.removeprefix("use "))
        named = dict(column_names(words[1]))
        assert [*named.values()] == [name for name in columns if name not in named]
        assert words[2:] == []


@pytest.mark.parametrize(
    ("lines", "has_header"),
    [
        (["How do I pay?,By card.", "Why?,So."], False),
        (["1;Hello there;Hi", "2;Bye now;See you"], False),
        (["\ufeffHello you\tHi\t0.5", "Bye you\tHm\t1"], False),
        (["This is the first sentence of a corpus.", "This is another."], False),
        (["col_0,col_1", "How do I pay?,By card."], True),
        (["customer message text,agent reply", "How do I pay?,By card."], True),
    ],
)
def test_a_csv_without_a_header_is_told_to_need_one(
    tmp_path: Path, lines: list[str], has_header: bool
) -> None:
    source = Source(source=str(tmp_path / "a b.csv"))
    (tmp_path / "a b.csv").write_text("\n".join(lines), encoding="utf-8")
    rows = read_rows(source)
    with refuses(DataError) as refused:
        detect(rows, source)
    assert holds(refused.value.fix, "header") != has_header
    if not has_header and len(rows[0]) > 1:
        # A recipe asks the same.
        with refuses(DataError, fix=["header"]):
            convert_row(rows[0], replace(source, format="prompt-completion"), where=rows.where(0))


# --- one odd row among good ones: a good row, an odd one, and the column that the error names

ODD: list[tuple[Row, Row, str]] = [
    (ALPACA, {**ALPACA, "instruction": None}, "instruction"),
    (ALPACA, {"input": "word", "output": "mot"}, "instruction"),
    (ALPACA, {**ALPACA, "input": 3}, "input"),
    ({**ALPACA, "system": "S"}, {**ALPACA, "system": 3}, "system"),
    ({**CHAT, "system": "S"}, {**CHAT, "system": 3}, "system"),
    ({"messages": json.dumps(TURNS)}, {"messages": "[{broken"}, "messages"),
    ({**CHAT, "text": "x"}, {"messages": "oops", "text": "x"}, "messages"),
    ({"messages": json.dumps(TURNS)}, {"messages": str(TURNS)}, "messages"),
    ({**CHAT, "text": "x"}, {"messages": [], "text": "x"}, "messages"),
    ({**PAIR, "label": True}, {**PAIR, "label": None}, "label"),
    ({**PAIR, "label": True}, PAIR, "label"),
    ({**CHAT, "label": False}, {**CHAT, "label": None}, "label"),
    ({**PAIR, "label": 1}, {**PAIR, "label": 2}, "2"),
    (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": None, "rejected": "b"},
        "chosen",
    ),
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


def test_odd_rows_outside_of_the_sample_are_listed_and_a_long_list_ends_with_how_many_more() -> (
    None
):
    rows = [dict(ALPACA) for _ in range(1001)]
    for i in (0, 3, 501, 1000):
        rows[i]["instruction"] = None
    with refuses(DataError, names=[4, "1,001"]) as refused:
        found(*rows)
    assert refused.value.where == place(1)
    listed = [cause.split(":")[0] for cause in refused.value.why.split("; ")]
    assert listed[:-1] == [place(n) for n in (1, 4, 502, 1001)]
    with refuses(DataError, names=[30, 60]) as refused:
        found(*[ALPACA, {**ALPACA, "output": None}] * 30)
    *listed, more, _ = refused.value.why.split("; ")
    assert len(listed) == 20
    assert holds(more, 10)


# --- labels as people write them


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (True, False), (1, 0), (1.0, 0.0), (" TRUE ", "false"), ("1", "0"), ("1.0", "0.0"), ("yes", "No"),
        ("good", "bad"), ("desirable", "undesirable"), ("chosen", "rejected"), ("thumbs_up", "Thumbs Down"), ("👍🏽", "👎🏿"),
    ],
)  # fmt: skip
def test_labels_are_read_as_people_write_them(good: Any, bad: Any) -> None:
    layout = found({**PAIR, "label": good}, {**PAIR, "label": bad})
    assert layout.format == "feedback"
    assert (read_label(good), read_label(bad)) == (True, False)


@pytest.mark.parametrize("label", [None, 2, -1, 0.5, "", "positive", "neutral", "5", [], {"a": 1}])
def test_other_labels_are_refused(label: Any) -> None:
    assert read_label(label) is None


def test_labels_of_a_csv_file(write: Callable[[str, str], str]) -> None:
    source = Source(source=write("a.csv", "prompt,completion,label\nhi,hello,true\nyo,bad,False\n"))
    rows = read_rows(source)
    assert detect(rows, source).format == "feedback"
    source = replace(source, format="feedback")
    made = [convert_row(rows[i], source, where=rows.where(i)) for i in range(2)]
    assert [answer.is_good for answer in made] == [True, False]


@pytest.mark.parametrize("row", [{**PAIR, "label": 0}, {**CHAT, "kto_tag": "bad"}])
def test_an_answer_that_is_labeled_bad_is_no_answer_to_learn(row: Row) -> None:
    name = "messages" if "messages" in row else "prompt-completion"
    with refuses(DataError, where="r", fix=["method=kto"]):
        sample_of(row, name)
    assert sample_of({**row, next(key for key in row if key in ("label", "kto_tag")): True}, name)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Q", "A"), ("Frage", "Antwort"), ("question", "réponse"), ("Pregunta", "Respuesta"), ("domanda", "risposta"),
        ("вопрос", "ответ"), ("问题", "答案"), ("userInput", "modelResponse"),
    ],
)  # fmt: skip
def test_questions_and_answers_of_several_languages(question: str, answer: str) -> None:
    layout = found({"id": 1, question: "x", answer: "y"})
    assert layout.columns == {"prompt": question, "completion": answer}


@pytest.mark.parametrize("more", [{"chosen": "a", "rejected": "b"}, {"output": "a", "kto_tag": 1}])
def test_the_input_of_pairs_and_labeled_answers_is_read(more: Row) -> None:
    row = {"instruction": "x", "input": "more", **more}
    layout = found(row)
    assert {*layout.columns.values()} == row.keys()
    assert sample_of(row, layout.format, **layout.columns).prompt == "x\nmore"


# --- files


def test_files_of_several_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "my rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (PAIR, CHAT, PAIR, CHAT, CHAT)))
    source = Source(source=str(path))
    with refuses(DataError, where=str(path), fix=["file"]) as refused:
        detect(read_rows(source), source)
    assert holds(refused.value.why, "3 as messages", "2 as prompt-completion")


def test_a_chat_that_pandas_wrote_as_python_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [str(TURNS)]])
    source = Source(source=str(path))
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


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": ["hi", "ho"], "source": "web"},
        {"messages": [{"speaker": "a", "text": "x"}], "text": "x"},
        {"dialog": [], "text": "x"},
        {"prompt": str([U]), "completion": str([A])},
        {"instruction": json.dumps([U]), "output": "ho"},
        {"text": str([U, A])},
        {"text": "[{broken", "messages": "[{broken"},
    ],
    ids=str,
)
def test_what_looks_like_a_chat_is_never_plain_text(row: Row) -> None:
    with refuses(DataError) as refused:
        found(row, row, row)
    assert refused.value.where.startswith(place(1))


def test_both_forms_of_a_chat_in_one_column() -> None:
    with refuses(DataError, where="rows row 2, message 1"):
        found(CHAT, {"messages": FROMS}, CHAT)
    with refuses(DataError, where="rows row 1, turn 1"):
        found(CHAT, {"messages": FROMS}, {"messages": FROMS})


def test_some_rows_with_pictures_among_others() -> None:
    empty, one = {**CHAT, "images": []}, {**CHAT, "images": ["a.png"]}
    assert not found(empty, empty).has_pictures
    assert found(empty, one).has_pictures


@pytest.mark.parametrize("chat", [TURNS, FROMS])
def test_json_text_of_json_text_of_a_chat_is_read(chat: list[Row]) -> None:
    row = {"conversations": json.dumps(json.dumps(chat)), "text": "x"}
    layout = found(row)
    assert layout.format == ("messages" if "role" in chat[0] else "sharegpt")
    assert sample_of(row, layout.format, **layout.columns).messages == TURNS
    twice = {"prompt": json.dumps(json.dumps([U])), "completion": json.dumps([A])}
    assert sample_of(twice, "prompt-completion").messages == TURNS
