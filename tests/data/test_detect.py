"""Rows of many shapes: which format is found, in which columns, and what is asked for instead of
guessed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errors import holds, refuses
from time_limit import time_limit
from tunesmith.cli.options import column_names
from tunesmith.config.check import FORMAT_COLUMNS
from tunesmith.config.row_settings import rows_set_by
from tunesmith.config.schema import Source
from tunesmith.data.rows.columns import plain
from tunesmith.data.rows.detect import SAMPLE, detect
from tunesmith.data.rows.formats import convert_row
from tunesmith.data.source.open_source import from_list, read_rows
from tunesmith.errors import DataError

Row = dict[str, Any]
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
OTHER_TURNS = [TURNS[0], {"role": "assistant", "content": "no"}]
FROMS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
CALL = [
    {"from": "human", "value": "hi"},
    {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
    {"from": "observation", "value": "1"},
    {"from": "gpt", "value": "ho"},
]
TOOLS = json.dumps([{"name": "f", "description": "", "parameters": {}}])


@pytest.fixture(autouse=True)
def rows_by_option() -> Iterator[None]:
    with rows_set_by(option=True):
        yield


def test_a_wide_table_is_read_in_one_pass_over_its_names() -> None:
    """A cache of 4,096 names was of no use for more columns: each use of a name was computed."""
    columns = {f"column {i}": "a" for i in range(20_000)}
    rows = [{"prompt": "hi", "completion": "ho", **columns} for _ in range(3)]
    before = plain.cache_info().misses
    with time_limit(60):
        assert "prompt-completion" in found(*rows)
        with refuses(DataError, fix=["--columns"]):
            found(*[columns] * 3)
    assert plain.cache_info().misses - before < 25_000


def test_the_names_of_a_wide_file_are_compared_in_one_pass(tmp_path: Path) -> None:
    names = ",".join(f"c{i}" for i in range(50_000))
    (tmp_path / "wide.csv").write_text(f"{names}\n{names}\n")
    with time_limit(15):
        assert len(read_rows(Source(source=str(tmp_path / "wide.csv")))[0]) == 50_000


def texts(*names: str) -> Row:
    return dict.fromkeys(names, "some text")


def found(*rows: Row, source: Source | None = None, any_format: bool = True) -> str:
    return detect(
        from_list(list(rows), "faq"), source or Source(source="faq"), any_format=any_format
    ).describe()


CLEAR: dict[str, tuple[Row, str]] = {
    "messages": ({"messages": TURNS}, "column messages -> messages"),
    "messages under another name": (
        {"conversations": TURNS},
        "column conversations -> messages (messages = conversations)",
    ),
    "messages under any name": (
        {"dialog": TURNS, "id": 1},
        "column dialog -> messages (messages = dialog); ignored: id",
    ),
    "messages as JSON text": ({"messages": json.dumps(TURNS)}, "column messages -> messages"),
    "messages as indented JSON text": (
        {"messages": json.dumps(TURNS, indent=1)},
        "column messages -> messages",
    ),
    "messages with tools": (
        {"messages": TURNS, "tools": TOOLS},
        "columns messages, tools -> messages",
    ),
    "messages with text of it all": (
        {"messages": TURNS, "text": "x"},
        "column messages -> messages; ignored: text",
    ),
    "messages with a name like rejected": (
        {"conversation": TURNS, "redacted": True, "selected": "yes"},
        "column conversation -> messages (messages = conversation); ignored: redacted, selected",
    ),
    "messages with its prompt": (
        {"prompt": "hi", "prompt_id": "1", "messages": TURNS},
        "column messages -> messages; ignored: prompt, prompt_id",
    ),
    "messages with pictures": (
        {"messages": TURNS, "images": ["a.png"]},
        "columns messages, images -> messages",
    ),
    "messages with no picture": (
        {"messages": TURNS, "images": []},
        "columns messages, images -> messages",
    ),
    "a question about a picture": (
        {"image": "a.png", **texts("question", "answer")},
        "columns question, answer, image -> prompt-completion"
        " (prompt = question, completion = answer, images = image)",
    ),
    "sharegpt with a picture": (
        {"id": 1, "image": "a.png", "conversations": FROMS},
        "columns conversations, image -> sharegpt (images = image); ignored: id",
    ),
    "alpaca with a picture": (
        {**texts("instruction", "input", "output"), "image_path": "a.png"},
        "columns instruction, output, input, image_path -> alpaca (images = image_path)",
    ),
    "sharegpt": ({"conversations": FROMS}, "column conversations -> sharegpt"),
    "sharegpt under another name": (
        {"messages": FROMS},
        "column messages -> sharegpt (conversations = messages)",
    ),
    "sharegpt as JSON text": (
        {"chat": json.dumps(FROMS)},
        "column chat -> sharegpt (conversations = chat)",
    ),
    "sharegpt with tools and system": (
        {"conversations": CALL, "tools": TOOLS, "system": "be kind"},
        "columns conversations, system, tools -> sharegpt",
    ),
    "a list that is no chat": (
        {"tags": ["a"], "prompt": "x", "completion": "y"},
        "columns prompt, completion -> prompt-completion; ignored: tags",
    ),
    "alpaca": (
        texts("instruction", "input", "output"),
        "columns instruction, output, input -> alpaca",
    ),
    "alpaca without input": (
        texts("instruction", "output"),
        "columns instruction, output -> alpaca",
    ),
    "alpaca with its text": (
        texts("instruction", "input", "output", "text"),
        "columns instruction, output, input -> alpaca; ignored: text",
    ),
    "dolly": (
        texts("instruction", "context", "response", "category"),
        "columns instruction, response, context -> alpaca (output = response, input = context); ignored: category",
    ),
    "alpaca with system and history": (
        {**texts("instruction", "input", "output", "system"), "history": []},
        "columns instruction, output, input, system, history -> alpaca",
    ),
    "alpaca with a history of messages": (
        {**texts("instruction", "output"), "history": TURNS},
        "columns instruction, output, history -> alpaca",
    ),
    "prompt and completion": (
        texts("prompt", "completion"),
        "columns prompt, completion -> prompt-completion",
    ),
    "prompt and response": (
        texts("prompt", "response"),
        "columns prompt, response -> prompt-completion (completion = response)",
    ),
    "question and answer": (
        texts("question", "answer"),
        "columns question, answer -> prompt-completion (prompt = question, completion = answer)",
    ),
    "capitals and spaces": (
        texts("Question", " ANSWER "),
        "columns Question,  ANSWER  -> prompt-completion (prompt = Question, completion =  ANSWER )",
    ),
    "query and response": (
        texts("query", "response"),
        "columns query, response -> prompt-completion (prompt = query, completion = response)",
    ),
    "input and output": (
        texts("input", "output"),
        "columns input, output -> prompt-completion (prompt = input, completion = output)",
    ),
    "problem and solution": (
        texts("problem", "solution", "level"),
        "columns problem, solution -> prompt-completion (prompt = problem, completion = solution); ignored: level",
    ),
    "question, answer and system": (
        texts("question", "answer", "system_prompt"),
        "columns question, answer, system_prompt -> alpaca"
        " (instruction = question, output = answer, system = system_prompt)",
    ),
    "question with its context": (
        texts("question", "context", "answer"),
        "columns question, answer, context -> alpaca (instruction = question, output = answer, input = context)",
    ),
    "conversational prompt and completion": (
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        "columns prompt, completion -> prompt-completion",
    ),
    "text": (texts("text"), "column text -> text"),
    "text with its category, of a document": (
        {"text": "x", "category": "web", "url": "y", "language": "en"},
        "column text -> text; ignored: category, url, language",
    ),
    "content": (texts("content", "url"), "column content -> text (text = content); ignored: url"),
    "one column with the name of a class": (
        texts("label"),
        "column label -> text (text = label)",
    ),
    "one column": (texts("body"), "column body -> text (text = body)"),
    "preference": (
        {"prompt": "q", "chosen": "good", "rejected": "bad", "score": 2},
        "columns chosen, rejected, prompt -> preference; ignored: score",
    ),
    "preference in chats, beside a chat": (
        {"Chosen": TURNS, "Rejected": OTHER_TURNS, "messages": TURNS},
        "columns Chosen, Rejected -> preference (chosen = Chosen, rejected = Rejected); ignored: messages",
    ),
    "preference of LLaMA-Factory": (
        {
            "conversations": FROMS[:1],
            "chosen": FROMS[1],
            "rejected": {"from": "gpt", "value": "no"},
        },
        "columns chosen, rejected, conversations -> preference",
    ),
    "feedback": (
        {"prompt": "q", "completion": "a", "label": True},
        "columns prompt, completion, label -> feedback",
    ),
    "feedback in chats": (
        {"messages": TURNS, "kto_tag": False},
        "columns messages, kto_tag -> feedback (label = kto_tag)",
    ),
}


@pytest.mark.parametrize("name", CLEAR)
def test_what_is_clear_is_found(name: str) -> None:
    row, described = CLEAR[name]
    assert found(row, row, row) == described


UNCLEAR: dict[str, tuple[Row, str, str]] = {  # name: row, part of the error, part of the fix
    "two answers": (
        texts("question", "answer", "response"), "can be read in 2 ways",
        "choose one: --columns prompt=question,completion=answer or --columns prompt=question,completion=response",
    ),
    "two questions": (
        texts("prompt", "question", "answer"), "can be read in 2 ways",
        "--columns prompt=prompt,completion=answer or --columns prompt=question,completion=answer",
    ),
    "two of one name": (
        texts("Answer", "answer", "question"), "can be read in 2 ways",
        "--columns prompt=question,completion=Answer or --columns prompt=question,completion=answer",
    ),
    "two chats": (
        {"short": TURNS, "long": TURNS}, "can be read in 2 ways", "--columns messages=short or --columns messages=long",
    ),
    "chat and pair": (
        {"messages": TURNS, **texts("question", "answer")}, "can be read in 2 ways",
        "--columns messages=messages or --columns prompt=question,completion=answer",
    ),
    "text and its class": (
        {"text": "x y", "label": "pos"}, "label looks like the class",
        "use --columns prompt=text,completion=label to train on the class, written as a text, as the answer, or --columns text=text to",
    ),
    "text and the number of its class": (
        {"content": "x y", "label": 1, "split": "train"}, "label looks like the class",
        "use --columns prompt=content,completion=label to",
    ),
    "a question and its kind": ({"text": "x y", "coarse_label": 1, "fine_label": 3}, "coarse_label looks like the class", "prompt=text,completion=coarse_label to"),
    "a text and its feelings": ({"text": "x y", "emotions": [3, 5], "url": "u"}, "emotions looks like the class", "completion=emotions to"),
    "several classes": ({"text": "x y", "labels": [1, 3], "id": "a"}, "labels looks like the class", "completion=labels to"),
    "unknown names": (texts("x", "y"), "no column name indicates", "--columns prompt=x,completion=y"),
    "an answer with two more": (
        {"title": "x", "body": "a longer text", "reply": "y"}, "no column name indicates", "--columns prompt=body,completion=reply",
    ),
    "images of pairs": (
        {**texts("chosen", "rejected", "prompt"), "images": ["a.png"]}, "the row has images: an array", "delete the pictures",
    ),
    "numbers as answers": ({"question": "x", "answer": 4}, "completion is a number", "write the value in quotes"),
    "messages of an unknown role": (
        {"messages": [{"role": "narrator", "content": "x"}]}, "unknown role 'narrator'", "rename the role",
    ),
    "a chat of another form": (
        {"dialog": [{"speaker": "a", "output": "x"}]}, "a message has no `role` and `content`: {'speaker': 'a', 'output'", '{"role": "user"',
    ),
    "empty chats": ({"messages": []}, "messages is empty", "delete the row"),
    "an empty answer": ({"question": "x", "answer": None}, "column answer is null", "fill the column"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_is_unclear_is_asked_for(name: str) -> None:
    row, what, fix = UNCLEAR[name]
    with pytest.raises(DataError) as refused:
        found(row, row, row)
    assert what in refused.value.what
    assert fix in refused.value.fix


@pytest.mark.parametrize(
    "name", [name for name, case in UNCLEAR.items() if "can be read" in case[1]]
)
def test_each_way_that_is_offered_is_taken(name: str) -> None:
    row, _, fix = UNCLEAR[name]
    for flags in fix.removeprefix("choose one: ").split(" or "):
        columns = dict(pair.split("=") for pair in flags.removeprefix("--columns ").split(","))
        layout = detect(from_list([row]), Source(source="faq", columns=columns))
        assert layout.columns == columns
        assert set(columns) <= set(FORMAT_COLUMNS[layout.format])


@pytest.mark.parametrize(
    "columns", [{"prompt": "text", "completion": "label"}, {"text": "text"}], ids=str
)
def test_both_ways_to_read_a_text_and_its_class_are_taken(columns: dict[str, str]) -> None:
    rows = from_list([{"text": "x y", "label": "pos"}])
    assert detect(rows, Source(source="faq", columns=columns)).columns == columns


def test_columns_and_format_that_are_given_narrow_the_choice() -> None:
    row = texts("question", "answer", "response", "notes")
    asked = Source(source="faq", columns={"completion": "response"})
    assert "question, response -> prompt-completion" in found(row, source=asked)
    assert found(
        texts("q", "a"), source=Source(source="faq", columns={"instruction": "q", "output": "a"})
    ) == ("columns q, a -> alpaca (instruction = q, output = a)")
    as_alpaca = Source(source="faq", format="alpaca", columns={"output": "answer"})
    assert "-> alpaca (instruction = question" in found(row, source=as_alpaca, any_format=False)
    as_text = Source(source="faq", format="text", columns={"text": "notes"})
    assert "notes -> text" in found(row, source=as_text, any_format=False)
    with refuses(DataError, names=["promt=question"]) as refused:
        found(row, source=Source(source="faq", columns={"promt": "question"}))
    assert "--columns prompt=question,completion=answer" in refused.value.fix
    twice = Source(source="faq", columns={"prompt": "question", "completion": "question"})
    with refuses(DataError, fix=["--columns prompt=question,completion=answer"]):
        found(row, source=twice)
    with refuses(DataError, fix=["--format prompt-completion --columns prompt=q,completion=a"]):
        found(texts("q", "a"), source=Source(source="faq", format="messages"), any_format=False)
    with refuses(DataError, names=["reply"]):
        found(row, source=Source(source="faq", columns={"completion": "reply"}))
    assert "prompt-completion" in found(
        texts("prompt", "chosen", "rejected"),
        source=Source(source="faq", columns={"completion": "chosen"}),
    )


@pytest.mark.parametrize(
    ("names", "pair"),
    [
        (("prompt", "chosen", "reject"), ("chosen", "reject")),
        (("prompt", "choosen", "rejected"), ("choosen", "rejected")),
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
        found(row, source=Source(source="faq", format="preference"), any_format=False)
    columns = {"chosen": pair[0], "rejected": pair[1]}
    assert "-> preference" in found(row, source=Source(source="faq", columns=columns))


@pytest.mark.parametrize("name", ["reject", "rejected", "Rejcted"])
def test_a_rejected_answer_is_not_proposed_for_a_completion(name: str) -> None:
    row = {"prompt": "what is it", "good": "this", name: "a text of many more letters"}
    with refuses(DataError, fix=[f"--columns chosen=...,rejected={name}"]) as refused:
        found(row)
    assert "completion" not in refused.value.fix


@pytest.mark.parametrize("more", [{}, {"label": True}])
def test_a_prompt_beside_its_answer_is_no_chat(more: Row) -> None:
    row = {"prompt": TURNS, "completion": TURNS[1:], **more}
    with refuses(DataError, names=["prompt", "answer"]):
        found(row)
    assert "messages = prompt" in found({"prompt": TURNS, **more})
    # The whole chat beside its beginning is one.
    row = {"prompt": TURNS[:1], "completion": TURNS, **more}
    assert "messages = completion" in found(row)


def test_rows_that_disagree_are_named() -> None:
    rows = from_list([{"messages": TURNS}] * 9 + [{"conversations": FROMS}], "faq")
    with refuses(DataError) as refused:
        detect(rows, Source(source="faq"))
    assert holds(refused.value.why, 9, 10, "messages")


def test_the_sample_reaches_both_ends_of_a_long_file() -> None:
    seen: list[int] = []

    class Watched(list[Row]):
        def __getitem__(self, i: Any) -> Any:
            seen.append(i)
            return super().__getitem__(i)

    rows = from_list(Watched([{"text": str(i)} for i in range(10_000)]), "faq")
    assert detect(rows, Source(source="faq")).format == "text"
    assert (min(seen), max(seen), len(set(seen))) == (0, 9_999, SAMPLE)
    assert max(b - a for a, b in zip(sorted(seen), sorted(seen)[1:], strict=False)) < 60


def test_a_missing_column_is_told_with_a_mapping_that_can_be_pasted() -> None:
    """Names with a comma, a colon or a quote."""
    with pytest.raises(DataError) as refused, rows_set_by(option=True):
        convert_row(
            {"it's, a: name": "x", "b": "y"},
            Source(source="rows.jsonl", format="prompt-completion"),
            where="rows.jsonl:1",
        )
    words = shlex.split(refused.value.fix.removeprefix("use ").partition(", or ")[0])
    assert words[0] == "--columns"
    assert column_names(words[1]) == [("prompt", "it's, a: name"), ("completion", "b")]


def test_columns_may_be_given_with_spaces() -> None:
    assert column_names("prompt=q, completion=a") == [("prompt", "q"), ("completion", "a")]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (
            {"id": "T-1001", "created": "2026-01-02", "category": "billing", "customer_message": "How do I pay?", "agent_reply": "By card."},
            ["customer_message", "agent_reply"],
        ),
        ({"uuid": "abcdefabcdef-abcdef-abcdef", "x": "A text", "stars": 5, "y": "Another text"}, ["x", "y"]),
        ({"question": "Why?", "explanation": "Because it is so."}, ["question", "explanation"]),
        ({"answer": "Because.", "rejected": "A text that is longer", "subject_line": "Why is it so?"}, ["subject_line", "answer"]),
    ],
)  # fmt: skip
def test_columns_are_proposed_alike_with_a_recipe_and_without(row: Row, columns: list[str]) -> None:
    if "rejected" not in row:
        with refuses(DataError, fix=[f"--columns prompt={columns[0]},completion={columns[1]}"]):
            found(row)
    for format_name in ("prompt-completion", "alpaca"):
        with pytest.raises(DataError) as refused, rows_set_by(option=True):
            convert_row(row, Source(source="r.jsonl", format=format_name), where="r.jsonl:1")
        words = shlex.split(refused.value.fix.removeprefix("use "))
        named = dict(column_names(words[1]))
        assert [*named.values()] == [name for name in columns if name not in named]
        assert words[2:] == []


@pytest.mark.parametrize(
    "lines",
    [
        ["How do I pay?,By card.", "Why?,So."],
        ["1;Hello there;Hi", "2;Bye now;See you"],
        ["\ufeffHello you\tHi\t0.5", "Bye you\tHm\t1"],
        ["This is the first sentence of a corpus.", "This is another."],
        ["Ist das so?,Ja", "Und jetzt?,Nein"],
    ],
)
def test_a_csv_without_a_header_is_told_to_need_one(tmp_path: Path, lines: list[str]) -> None:
    source = Source(source=str(tmp_path / "a b.csv"))
    (tmp_path / "a b.csv").write_text("\n".join(lines), encoding="utf-8")
    row = read_rows(source)
    with refuses(DataError, fix=["header"]):
        detect(row, source)
    if len(row[0]) > 1:
        # A recipe asks the same.
        with refuses(DataError, fix=["header"]):
            convert_row(row[0], replace(source, format="prompt-completion"), where=row.where(0))


@pytest.mark.parametrize(
    "header",
    ["title,body", "Frage 1,Antwort 1", "col_0,col_1", "customer message text,agent reply"],
)
def test_unknown_names_are_not_taken_for_a_row(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\nHow do I pay?,By card.\n")
    source = Source(source=str(tmp_path / "a.csv"))
    with pytest.raises(DataError) as refused:
        detect(read_rows(source), source)
    assert "header" not in refused.value.fix
