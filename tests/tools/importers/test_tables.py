"""The tables of the tools: each part, target and column is known, and a key has one reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.config.check import METHOD_FORMATS
from tunesmith.config.names import keys
from tunesmith.config.row_formats import ROW_FORMATS
from tunesmith.config.schema import METHOD_KEYS
from tunesmith.tools.importers import translate
from tunesmith.tools.importers.source_config import IMPORTED_TOOLS, TABLES, table

PARTS = {
    *("extends", "marks", "keys", "defaults", "words", "only", "rules", "when", "rows", "owners"),
    *("nothing", "differs"),
}
SECTION_PARTS = {"if", "unless", "implied", "refused", "only", "rules"}
ROWS_PARTS = {
    *("listed_in", "train", "validation", "type", "sources", "formats", "keys", "own_prompt"),
    *("columns", "types"),
}
TABLE_NAMES = [*IMPORTED_TOOLS, "transformers"]


def rules_of(tool: str) -> list[list[Any]]:
    sections = [table(tool), *table(tool).get("when", [])]
    return [rule for section in sections for rule in section.get("rules", [])]


@pytest.mark.parametrize("tool", TABLE_NAMES)
def test_each_part_and_target_of_a_table_is_known(tool: str) -> None:
    """A target is a key of the recipe, or a quantity that the translation computes with."""
    assert set(table(tool)) <= PARTS
    assert all(set(section) <= SECTION_PARTS for section in table(tool).get("when", []))
    assert set(table(tool).get("rows", {})) <= ROWS_PARTS
    source = Path(translate.__file__).read_text()
    for theirs, ours in table(tool)["keys"].items():
        is_interval = re.fullmatch("(save|eval)(s_per_epoch|_strategy|_steps)", ours)
        assert ours in keys() or f'"{ours}"' in source or is_interval, (theirs, ours)
    targets = [rule[2] for rule in rules_of(tool) if len(rule) > 3]
    assert targets
    assert not set(targets) - {*keys(), "method"}


@pytest.mark.parametrize("tool", TABLE_NAMES)
def test_a_key_has_one_reason(tool: str) -> None:
    """A key that `nothing` and `differs` both list would never differ."""
    parts = [table(tool)[part] for part in ("nothing", "differs")]
    listed = [pattern for part in parts for patterns in part.values() for pattern in patterns]
    assert sorted(listed) == sorted(set(listed))
    own = yaml.safe_load((TABLES / f"{tool}.yaml").read_text())
    if "extends" in own:
        for part in ("nothing", "differs"):
            assert not set(own[part]) & set(table(own["extends"])[part])


@pytest.mark.parametrize("tool", [tool for tool in IMPORTED_TOOLS if tool != "trl"])
def test_data_sets_become_rows_of_our_formats(tool: str) -> None:
    rows = table(tool)["rows"]
    for row_format, columns in rows["columns"].items():
        assert set(columns.values()) - {""} <= set(ROW_FORMATS[row_format].columns) | {"history"}
    for kind, types in rows["types"].items():
        assert kind in {"sft", "text", *METHOD_FORMATS.values()}
        assert all(implied["format"] in ROW_FORMATS for implied in types.values())
    assert set(rows["keys"].values()) <= {"name", "revision", "split", "max_examples"}


def test_methods_of_the_tables_are_ours() -> None:
    rules = [rule for tool in IMPORTED_TOOLS for rule in rules_of(tool)]
    assert {rule[3] for rule in rules if rule[2] == "method.name"} == set(METHOD_KEYS) - {"sft"}
