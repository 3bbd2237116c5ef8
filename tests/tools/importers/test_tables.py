"""The tables of the tools: their keys, values and reasons."""

from __future__ import annotations

import re
from collections.abc import Iterator
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


def sections_of(tool: str) -> list[dict[str, Any]]:
    return [table(tool), *table(tool).get("when", [])]


def rules_of(tool: str) -> list[list[Any]]:
    return [rule for section in sections_of(tool) for rule in section.get("rules", [])]


def reasons_of(tool: str) -> Iterator[str]:
    yield from table(tool)["nothing"]
    yield from table(tool)["differs"]
    for rule in rules_of(tool):
        if len(rule) in (3, 5):
            yield rule[-1]
    for section in sections_of(tool):
        yield from section.get("refused", {}).values()


@pytest.mark.parametrize("tool", TABLE_NAMES)
def test_each_part_of_a_table_is_known(tool: str) -> None:
    assert set(table(tool)) <= PARTS
    for section in table(tool).get("when", []):
        assert set(section) <= SECTION_PARTS
    assert set(table(tool).get("rows", {})) <= ROWS_PARTS


@pytest.mark.parametrize("tool", TABLE_NAMES)
def test_each_target_is_a_key_of_ours_or_a_quantity_that_is_computed_with(tool: str) -> None:
    source = Path(translate.__file__).read_text()
    for theirs, ours in table(tool)["keys"].items():
        is_interval = re.fullmatch("(save|eval)(s_per_epoch|_strategy|_steps)", ours)
        assert ours in keys() or f'"{ours}"' in source or is_interval, (theirs, ours)
    targets = [rule[2] for rule in rules_of(tool) if len(rule) > 3]
    assert targets
    assert not set(targets) - {*keys(), "method"}


@pytest.mark.parametrize("tool", TABLE_NAMES)
def test_each_reason_is_a_sentence(tool: str) -> None:
    reasons = [*reasons_of(tool)]
    assert len(reasons) > 20
    starts = r"[A-Z]|(data|tunesmith|train|model|validate|log|final|metrics|parallel|torchrun|checkpoint)[./ ]"
    for reason in reasons:
        assert re.match(starts, reason), reason
        assert reason.endswith("."), reason
        assert len(reason.split()) >= 3, reason


@pytest.mark.parametrize("tool", TABLE_NAMES)
def test_a_key_has_one_reason(tool: str) -> None:
    """A key that `nothing` and `differs` both list would never differ."""
    listed = [pattern for patterns in table(tool)["nothing"].values() for pattern in patterns]
    assert len(listed) == len(set(listed)), {x for x in listed if listed.count(x) > 1}
    differing = [pattern for patterns in table(tool)["differs"].values() for pattern in patterns]
    assert len(differing) == len(set(differing))
    assert not set(listed) & set(differing)


@pytest.mark.parametrize("tool", ["trl", "llamafactory"])
def test_no_reason_hides_that_of_the_table_below(tool: str) -> None:
    own = yaml.safe_load((TABLES / f"{tool}.yaml").read_text())
    below = table(own["extends"])
    for part in ("nothing", "differs"):
        assert not set(own[part]) & set(below[part])


@pytest.mark.parametrize("tool", [tool for tool in IMPORTED_TOOLS if tool != "trl"])
def test_data_sets_become_rows_of_our_formats(tool: str) -> None:
    rows = table(tool)["rows"]
    for row_format, columns in rows["columns"].items():
        assert set(columns.values()) - {""} <= set(ROW_FORMATS[row_format].columns) | {"history"}
    for kind, types in rows["types"].items():
        assert kind in {"sft", "text", *METHOD_FORMATS.values()}
        for implied in types.values():
            assert implied["format"] in ROW_FORMATS
    assert set(rows["keys"].values()) <= {"name", "revision", "split", "max_examples"}


def test_methods_of_the_tables_are_ours() -> None:
    methods = [
        rule[3] for tool in IMPORTED_TOOLS for rule in rules_of(tool) if rule[2] == "method.name"
    ]
    assert {*methods} == set(METHOD_KEYS) - {"sft"}


def test_tools_that_are_not_supported_say_what_to_do() -> None:
    content = yaml.safe_load((TABLES / "unsupported.yaml").read_text())
    assert {"accelerate", "NeMo AutoModel", "ms-swift"} <= set(content)
    for entry in content.values():
        assert set(entry) - {"package"} == {"marks", "fix"}
        assert "tunesmith " in entry["fix"]
