"""What a launch has to bring along is what the recipe reads: each key that may hold a path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from errors import refuses
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


@pytest.mark.parametrize("key", paths._INPUTS)
def test_each_key_that_may_hold_a_path_is_brought_along(tmp_path: Path, key: str) -> None:
    assert inputs(tmp_path) == []
    ending = paths._INPUTS[key][0] if paths._INPUTS[key] else ".jinja"
    file = tmp_path / f"given{ending}"
    file.write_text("x")
    value: Any = f"./{file.name}"
    if key == "method.reward":
        value += ":score"
    for name in reversed(key.split(".")):
        value = {name: value}
    if key == "method.reward":
        value["method"]["name"] = "grpo"
    assert inputs(tmp_path, **value) == [file]


def test_a_file_that_several_keys_name_comes_once_and_a_missing_one_is_named(
    tmp_path: Path,
) -> None:
    rows, other = write_rows(tmp_path / "rows.jsonl", 2), write_rows(tmp_path / "other.jsonl", 2)
    data = {"train": [{"source": str(rows)}, {"source": str(other)}]}
    found = inputs(tmp_path, data=data | {"validation": {"source": str(rows)}})
    assert found == [rows, other]
    with refuses(UsageError, where="data.validation.source", names=[tmp_path / "gone.jsonl"]):
        inputs(tmp_path, data={"validation": {"source": "./gone.jsonl"}})
