"""What a launch has to bring along is what the recipe reads: each key that may hold a path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipes import merge, write_rows
from tunesmith.config import paths
from tunesmith.config.load import from_mapping
from tunesmith.errors import UsageError
from tunesmith.tools.launch.inputs import recipe_inputs

ON_THE_HUB = {
    "model": {"name": "some-org/some-model", "tokenizer": "some-org/other"},
    "adapter": {"from": "some-org/adapter"},
    "data": {"train": {"source": "some-org/rows"}, "validation": {"source": "some-org/held-out"}},
    "output_dir": "runs/x",
}


def inputs(folder: Path, **changes: Any) -> list[Path]:
    return recipe_inputs(from_mapping(merge(ON_THE_HUB, changes), where="test", base=folder))


def test_a_recipe_on_the_hub_needs_no_file(tmp_path: Path) -> None:
    assert inputs(tmp_path) == []


@pytest.mark.parametrize("key", paths._INPUTS)
def test_each_key_that_may_hold_a_path_is_brought_along(tmp_path: Path, key: str) -> None:
    """The table of `config/paths.py` is the reference: a key that it gains must be gained here."""
    ending = paths._INPUTS[key][0] if paths._INPUTS[key] else ".jinja"
    file = tmp_path / f"given{ending}"
    file.write_text("x")
    value: Any = f"./{file.name}"
    for name in reversed(key.split(".")):
        value = {name: value}
    assert inputs(tmp_path, **value) == [file]


def test_a_file_that_several_keys_name_comes_once(tmp_path: Path) -> None:
    rows, other = write_rows(tmp_path / "rows.jsonl", 2), write_rows(tmp_path / "other.jsonl", 2)
    sources = [{"source": str(rows)}, {"source": str(other)}]
    assert inputs(tmp_path, data={"train": sources, "validation": {"source": str(rows)}}) == [
        rows,
        other,
    ]


def test_one_that_is_not_there_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        inputs(tmp_path, data={"validation": {"source": "./gone.jsonl"}})
    assert str(tmp_path / "gone.jsonl") in caught.value.what
    assert caught.value.where == "data.validation.source"
