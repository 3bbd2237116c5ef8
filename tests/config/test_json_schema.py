"""The JSON schema of recipes: each shipped recipe is valid, and what types refuse is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from jsonschema import Draft7Validator

from tunesmith.config.describe import json_schema, write_or_check
from tunesmith.config.dump import to_mapping
from tunesmith.config.layers import merge_layers, override_layer
from tunesmith.config.load import load_recipe
from tunesmith.config.names import keys
from tunesmith.config.shipped import MODELINE, copy_of, shipped
from tunesmith.config.tree import read_file
from tunesmith.errors import RecipeError

from .bad_recipes import _KEYS, _TYPES, BASE, Bad

FILE = shipped()["smollm2-135m-lora"].with_name("schema.json")

# Bad values that JSON Schema has no words for: 8.0 is an integer there, a number is finite as it is
# written, a recipe that extends another leaves keys out, and amounts and their roundness are read from text.
UNSAID = {
    "fraction", "infinite", "overflow", "not a number", "half an example", "half a step", "1e300 examples",
    "5,000 digits of steps", "no model", "no model name", "no data", "no output_dir",
}  # fmt: skip


@pytest.fixture(scope="module")
def schema() -> Draft7Validator:
    values = json_schema()
    Draft7Validator.check_schema(values)
    return Draft7Validator(values)


def values_of(bad: Bad) -> Any:
    """The recipe of a row with its overrides, as an editor would see it written; None if it cannot
    be read so far.
    """
    Path("r.yaml").write_text(bad.recipe, encoding="utf-8")
    try:
        return merge_layers(read_file(Path("r.yaml")), override_layer(bad.overrides)).plain()
    except RecipeError:
        return None


def test_the_file_is_up_to_date(tmp_path: Path) -> None:
    assert write_or_check(["--check", str(FILE)]) == 0
    old = tmp_path / "old.json"
    old.write_text(FILE.read_text().replace("learning_rate", "learning_rat"))
    assert write_or_check(["--check", str(old)]) == 1
    assert write_or_check(["--write", str(old)]) == 0
    assert old.read_text() == FILE.read_text()


def test_every_shipped_recipe_is_valid_and_names_it(schema: Draft7Validator) -> None:
    for name, path in shipped().items():
        first = path.read_text().partition("\n")[0]
        assert (path.parent / first.removeprefix(MODELINE)).samefile(FILE)
        copied = urlsplit(copy_of(path).partition("\n")[0].removeprefix(MODELINE))
        assert (copied.scheme, Path(unquote(copied.path)).samefile(FILE)) == ("file", True)
        schema.validate(read_file(path).plain())
        schema.validate(to_mapping(load_recipe(name)))


def test_every_key_is_there_with_its_documentation() -> None:
    sections = json_schema()["$defs"]
    listed = [pair for section in sections.values() for pair in section["properties"].items()]
    told = dict(listed)
    assert set(told) == {key.rpartition(".")[2] for key in keys()} | {"extends"}
    assert all("$ref" in str(value) or value["description"] for _, value in listed)
    assert sections["Adapter"]["properties"]["rank"]["minimum"] == 1
    assert told["rank"]["description"] == keys()["adapter.rank"][0].metadata["description"]
    assert sections["Train"]["properties"]["duration"]["default"] == "1 epochs"


def test_what_extends_may_be_partial_and_clear(schema: Draft7Validator) -> None:
    child: dict[str, Any] = {"extends": "smollm2-135m-lora"}
    partial = {"data": {"train": {"split": "train[:9]"}, "validation": None}}
    for more in ({}, partial, {"train": {"seed": 1, "clip_norm": None}}):
        schema.validate({**child, **more})
    nulls = ({"model": {"name": None}}, {"train": {"learning_rate": None}}, {"log": None})
    for wrong in ({"trian": {}}, {"train": {"sed": 1}}, *nulls):
        assert not schema.is_valid({**child, **wrong})


@pytest.mark.slow
def test_it_refuses_the_table_of_bad_recipes(
    schema: Draft7Validator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All wrong keys and types but the few of UNSAID."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(BASE)
    schema.validate(read_file(Path("r.yaml")).plain())
    readable = {bad.name: values_of(bad) for bad in (*_KEYS, *_TYPES)}
    held = {name: values for name, values in readable.items() if values is not None}
    assert {name for name, values in held.items() if schema.is_valid(values)} == UNSAID & {*held}
    assert len(held) > 40
