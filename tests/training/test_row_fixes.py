"""The fix of an error in rows has the notation in which the rows are given, and can be copied."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.cli.options import column_names
from tunesmith.config.dump import to_yaml
from tunesmith.config.layers import Overrides
from tunesmith.config.load import load_recipe
from tunesmith.config.row_settings import row_fix, rows_set_by
from tunesmith.config.schema import Source
from tunesmith.config.tree import read_value
from tunesmith.data.rows.bad_rows import error_of_sources, find_bad_rows
from tunesmith.data.rows.detect import detect
from tunesmith.data.source.open_source import read_rows
from tunesmith.errors import DataError
from tunesmith.stages.draft import draft_recipe

Settings = dict[str, Any]
CALLS = '[{"role": "user", "content": "a"}]'
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
PAIR = {"prompt": "Why?", "completion": "Because."}
# name -> (row, settings that the user has made, pattern of what is wrong)
BAD: dict[str, tuple[Settings, Settings, str]] = {
    "mistyped columns": (
        {"Question": "Why?", "Answer": "Because."},
        {"format": "prompt-completion", "columns": {"prompt": "Qestion", "completion": "Anwser"}},
        "Qestion",
    ),
    "another format": ({"text": "Because."}, {"format": "alpaca"}, "column"),
    "messages in a text": (
        {"instruction": CALLS, "output": "b"}, {"format": "alpaca"}, "JSON list",
    ),
    "a bad label": ({**PAIR, "is_correct": False}, {"format": "prompt-completion"}, "labeled bad"),
    "no such split": (PAIR, {"format": "prompt-completion", "split": "test[:5]"}, "split test"),
    "files of two kinds": (PAIR, {"format": "prompt-completion"}, "different kinds"),
}  # fmt: skip


AS_PAIR = {"prompt": "q", "completion": "b"}
PROMPT_COMPLETION = {"format": "prompt-completion"}
PREFERENCE = {"method": "dpo", "format": "preference"}
# name -> (row, settings that the user has made, columns that each command reads or proposes)
PROPOSED: dict[str, tuple[Settings, Settings, dict[str, str]]] = {
    "usual names": ({"question": "Why?", "answer": "So."}, {}, {"prompt": "question", "completion": "answer"}),
    "odd names": ({"q": "Why?", "b": "So."}, {}, AS_PAIR),
    "an input": ({"question": "Why?", "context": "Here.", "response": "So."}, {"format": "alpaca"}, {"instruction": "question", "output": "response", "input": "context"}),
    "one text": ({"id": "a1", "essay": "A text."}, {}, {"text": "essay"}),
    "a chat": ({"dialogue": TURNS}, PROMPT_COMPLETION, {"messages": "dialogue"}),
    "mistyped pairs": ({"question": "Why?", "choosen": "So.", "rejected": "No."}, {}, {"prompt": "question", "chosen": "choosen", "rejected": "rejected"}),
    "a text and its class": ({"text": "x y", "label": "pos"}, {}, {"prompt": "text", "completion": "label"}),
}  # fmt: skip


def keyed(settings: Settings) -> Settings:
    """Return the settings under their keys of a recipe."""
    return {key if key == "method" else f"data.train.{key}": settings[key] for key in settings}


def preview(rows: Path, settings: Settings, *, python: bool) -> None:
    with rows_set_by(option=True, python=python):
        values = {"source": str(rows), **settings}
        draft_recipe("./model", values.pop("source"), keyed(values))


def check_recipe(folder: Path, overrides: Overrides) -> None:
    with rows_set_by():
        [source] = load_recipe(folder / "recipe.yaml", overrides).data.train
        bad = find_bad_rows(read_rows(source), source)
        if bad:
            raise error_of_sources([bad])


def write_recipe(rows: Path, settings: Settings) -> None:
    method = settings.get("method", "sft")
    source = {"source": str(rows), **settings}
    source.pop("method", None)
    recipe = {"model": {"name": "./model"}, "method": method, "data": {"train": source}}
    (rows.parent / "recipe.yaml").write_text(to_yaml({**recipe, "output_dir": "run"}))


def by_recipe(rows: Path, settings: Settings) -> None:
    write_recipe(rows, settings)
    check_recipe(rows.parent, {})


def by_override(rows: Path, settings: Settings) -> None:
    write_recipe(rows.with_name("other.jsonl"), {})
    values = keyed({"source": str(rows), **settings})
    check_recipe(rows.parent, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def words_of(fix: str) -> list[str]:
    return [word.rstrip(",;") for word in shlex.split(fix)]


def read_options(fix: str) -> Settings:
    words = words_of(fix)
    settings: Settings = {}
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            name = word.removeprefix("--").replace("data", "source")
            settings.setdefault(name, dict(column_names(value)) if name == "columns" else value)
        elif word.startswith("method="):
            settings["method"] = word.removeprefix("method=")
    return settings


def read_overrides(fix: str) -> Settings:
    settings: Settings = {}
    for word in words_of(fix):
        key, equals, value = word.partition("=")
        if equals and re.fullmatch(r"data\.train\.[a-z]+|method", key):
            node = read_value(value, where="fix", base=Path())
            settings.setdefault(key.removeprefix("data.train."), node.plain())
    return settings


def read_keys(fix: str) -> Settings:
    settings: Settings = {}
    for key, value in re.findall(r"\b([a-z]+): (\{[^}]*\}|\"[^\"]*\"|[^\s,;]+)", fix):
        node = read_value(value, where="fix", base=Path())
        settings.setdefault(key, node.plain())
    return settings


def read_python(fix: str) -> Settings:
    _, _, text = fix.partition("overrides=")
    if not text:
        return {}
    ends = [n for n in range(1, len(text) + 1) if text[n - 1] == "}"]
    literal = next(text[:n] for n in ends if text[:n].count("{") == text[:n].count("}"))
    return {key.removeprefix("data.train."): v for key, v in ast.literal_eval(literal).items()}


# origin of the rows -> (how they are read, how the fix is read)
ORIGINS: dict[str, tuple[Callable[[Path, Settings], None], Callable[[str], Settings]]] = {
    "option": (lambda rows, settings: preview(rows, settings, python=False), read_options),
    "python": (lambda rows, settings: preview(rows, settings, python=True), read_python),
    "override": (by_override, read_overrides),
    "recipe": (by_recipe, read_keys),
}


def first_fix(error: DataError, read_fix: Callable[[str], Settings]) -> Settings:
    # A way with `...` names no column.
    ways = re.split(r",? or (?=use|choose)", error.fix)
    fixes = [read_fix(way) for way in ways if "..." not in way]
    fix = next(filter(None, fixes), {})
    assert fix, error.fix
    return fix


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("name", BAD)
def test_a_fix_can_be_copied_where_the_rows_are_given(name, origin, tmp_path):
    row, settings, what = BAD[name]
    read, read_fix = ORIGINS[origin]
    rows = tmp_path / "rows.jsonl"
    if name == "files of two kinds":
        rows = tmp_path / "rows"
        rows.mkdir()
        (rows / "a.csv").write_text("prompt,completion\na,b\n")
    line = json.dumps(row) + "\n"
    (rows / "a.jsonl" if rows.is_dir() else rows).write_text(line * 20)
    with pytest.raises(DataError) as refused:
        read(rows, settings)
    assert re.search(what, refused.value.what)
    fix = first_fix(refused.value, read_fix)
    next_error = ""
    try:
        read(rows, {**settings, **fix})
    except DataError as error:
        next_error = error.what
    assert next_error != refused.value.what, refused.value.fix


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("name", PROPOSED)
def test_each_command_proposes_columns_that_it_reads(name, origin, tmp_path):
    row, settings, columns = PROPOSED[name]
    read, read_fix = ORIGINS[origin]
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps(row) + "\n") * 20)
    refused = None
    try:
        read(rows, settings)
    except DataError as error:
        refused = error
    if refused is None:
        assert origin in ("option", "python"), "a recipe detects no columns"
        source = Source(source=str(rows), format=settings.get("format", "messages"))
        found = detect(read_rows(source), source, any_format="format" not in settings)
        assert found.columns == columns
        return
    fix = first_fix(refused, read_fix)
    # A column with the format's own name is read without a setting.
    assert fix.get("columns", {"text": "text"}) == columns, refused.fix
    read(rows, {**settings, **fix})


def test_rows_without_texts_get_no_column_proposed(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"left": 1, "right": {"answer": "So."}}\n' * 20)
    for read, read_fix in ORIGINS.values():
        with pytest.raises(DataError) as refused:
            read(rows, {})
        assert read_fix(refused.value.fix) == {}
        assert "left, right" in refused.value.why
        assert refused.value.fix.startswith("add ")


def test_a_source_without_overrides_has_the_notation_of_the_recipe(tmp_path: Path) -> None:
    write_recipe(tmp_path / "rows.jsonl", {})
    held = str(tmp_path / "held.jsonl")
    with rows_set_by():
        run = load_recipe(tmp_path / "recipe.yaml", [f"data.validation.source={held}"])
        [train] = run.data.train
        assert row_fix(train.source, format="text") == "format: text"
        assert row_fix(held, format="text") == "data.validation.format=text"
