"""The fix of an error in rows has the notation in which the rows are given, and can be copied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errors import refuses
from tunesmith.config.dump import to_yaml
from tunesmith.config.layers import Overrides
from tunesmith.config.load import load_recipe
from tunesmith.config.row_settings import row_fix, rows_set_by
from tunesmith.errors import DataError
from tunesmith.rows.bad_rows import error_of_sources, find_bad_rows
from tunesmith.rows.source.open_source import read_rows
from tunesmith.start.draft import draft_recipe

Settings = dict[str, Any]
FORMAT = {"format": "prompt-completion"}
COLUMNS = {"columns": {"prompt": "q", "completion": "b"}}


def preview(rows: Path, settings: Settings, *, python: bool) -> None:
    with rows_set_by(option=True, python=python):
        draft_recipe("demo", str(rows), {f"data.train.{key}": settings[key] for key in settings})


def check_recipe(rows: Path, settings: Settings, overrides: Overrides) -> None:
    source = {"source": str(rows), **settings}
    recipe = {"model": {"name": "./model"}, "data": {"train": source}, "output_dir": "run"}
    (rows.parent / "recipe.yaml").write_text(to_yaml(recipe))
    with rows_set_by():
        [found] = load_recipe(rows.parent / "recipe.yaml", overrides).data.train
        bad = find_bad_rows(read_rows(found), found)
        if bad:
            raise error_of_sources([bad])


def by_override(rows: Path, settings: Settings) -> None:
    values = {"source": str(rows), **settings}
    words = [f"data.train.{key}={json.dumps(value)}" for key, value in values.items()]
    check_recipe(rows.with_name("other.jsonl"), {}, words)


# origin of the rows -> (how they are read, the fix)
ORIGINS: dict[str, tuple[Callable[[Path, Settings], None], str]] = {
    "option": (
        lambda rows, settings: preview(rows, settings, python=False),
        "--columns prompt=q,completion=b",
    ),
    "python": (
        lambda rows, settings: preview(rows, settings, python=True),
        "overrides={'data.train.columns': {'prompt': 'q', 'completion': 'b'}}",
    ),
    "override": (by_override, "'data.train.columns={prompt: q, completion: b}'"),
    "recipe": (
        lambda rows, settings: check_recipe(rows, settings, {}),
        "columns: {prompt: q, completion: b}",
    ),
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_fix_can_be_copied_where_the_rows_are_given(origin, tmp_path):
    read, fix = ORIGINS[origin]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "Why?", "b": "So it is."}\n' * 20)
    mistyped = {**FORMAT, "columns": {"prompt": "p", "completion": "c"}}
    with refuses(DataError, names=["p"]) as refused:
        read(rows, mistyped)
    assert fix in refused.value.fix
    read(rows, FORMAT | COLUMNS)


def test_a_source_without_overrides_has_the_notation_of_the_recipe(tmp_path: Path) -> None:
    rows, held = (str(tmp_path / f"{name}.jsonl") for name in ("rows", "held"))
    with rows_set_by():
        load_recipe("smollm2-135m-lora", [f"data.validation.source={held}"])
        assert row_fix(rows, format="text") == "format: text"
        assert row_fix(held, format="text") == "data.validation.format=text"
