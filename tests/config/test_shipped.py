"""Shipped recipes, the reference page and the JSON schema agree with the keys of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from tunesmith.config.describe import GENERATED_MARK, json_schema, reference, write_or_check
from tunesmith.config.dump import to_mapping
from tunesmith.config.load import load_recipe
from tunesmith.config.names import keys
from tunesmith.config.shipped import MODELINE, purpose, shipped
from tunesmith.config.yaml_file import read_file
from tunesmith.units import Length, Size

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_all_load() -> None:
    assert len(shipped()) >= 18
    for name, path in shipped().items():
        run = load_recipe(name)
        assert run == load_recipe(path)
        assert run.output_dir == str(Path.cwd() / "runs" / name)
        assert len(purpose(path)) > 20
        assert run.data.validation, f"{name} has no held-out rows"


def test_reference_page_is_up_to_date(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = ROOT / "docs" / "recipe.md"
    assert write_or_check(["--check", str(path)]) == 0, capsys.readouterr().err
    by_hand, mark, _ = path.read_text().partition(GENERATED_MARK)
    assert shipped()["llama3.1-8b-lora"].read_text().partition("\n")[2] in by_hand
    assert all(f"`{unit}`" in by_hand for unit in (*Length.units, *Size.units))
    old = tmp_path / "old.md"
    old.write_text(by_hand + mark + reference().replace("learning_rate", "learning_rat"))
    assert write_or_check(["--check", str(old)]) == 1
    assert write_or_check(["--write", str(old)]) == 0
    assert write_or_check(["--check", str(old)]) == 0
    assert old.read_text().startswith(by_hand)


# --- the JSON schema


FILE = shipped()["smollm2-135m-lora"].with_name("schema.json")


@pytest.fixture(scope="module")
def schema() -> Draft7Validator:
    values = json_schema()
    Draft7Validator.check_schema(values)
    return Draft7Validator(values)


def test_the_file_is_up_to_date() -> None:
    assert write_or_check(["--check", str(FILE)]) == 0


@pytest.mark.slow
def test_every_shipped_recipe_is_valid_and_names_it(schema: Draft7Validator) -> None:
    for name, path in shipped().items():
        first = path.read_text().partition("\n")[0]
        assert (path.parent / first.removeprefix(MODELINE)).samefile(FILE)
        schema.validate(read_file(path).values)
        schema.validate(to_mapping(load_recipe(name)))


def test_every_key_is_there_with_its_documentation() -> None:
    sections = json_schema()["$defs"]
    listed = [pair for section in sections.values() for pair in section["properties"].items()]
    assert {name for name, _ in listed} == {key.rpartition(".")[2] for key in keys()} | {"extends"}
    assert all("$ref" in str(value) or value["description"] for _, value in listed)
    assert sections["Adapter"]["properties"]["rank"]["minimum"] == 1


def test_what_extends_may_be_partial_and_clear(schema: Draft7Validator) -> None:
    child: dict[str, Any] = {"extends": "smollm2-135m-lora"}
    partial = {"data": {"train": {"split": "train[:9]"}, "validation": None}}
    for more in ({}, partial, {"train": {"seed": 1, "clip_norm": None}}):
        schema.validate({**child, **more})
    nulls = ({"model": {"name": None}}, {"train": {"learning_rate": None}}, {"log": None})
    for wrong in ({"trian": {}}, {"train": {"sed": 1}}, *nulls):
        assert not schema.is_valid({**child, **wrong})
