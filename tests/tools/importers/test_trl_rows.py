"""The rows and trainers of TRL's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from errors import refuses
from tunesmith.errors import UsageError

from .translations import translated_text

HEAD = "model_name_or_path: m/m\n"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("dataset_mixer: {org/a: 1}", "dataset_mixer.org/a"),
        ("datasets: [{path: org/a}, {path: org/b}]", "datasets.0.path"),
        (
            "dataset_mixture: {datasets: [{id: org/a, weight: 0.5}]}",
            "dataset_mixture.datasets.0.id",
        ),
    ],
)
def test_a_mixture_is_refused(text: str, name: str, tmp_path: Path) -> None:
    with refuses(UsageError, names=[name], fix=["data.train"]):
        translated_text("trl", f"{HEAD}{text}\n", tmp_path)


@pytest.mark.parametrize(
    "text",
    ["dataset_mixer: {org/a: 0.5}", "datasets: [{path: org/a}]", "dataset_name: org/a"],
)
def test_rows_of_the_command_line_replace_a_mixture(text: str, tmp_path: Path) -> None:
    given = {"data.train.source": "rows.jsonl", "data.train.format": "messages"}
    recipe = translated_text("trl", f"{HEAD}{text}\n", tmp_path, **given)
    assert set(recipe.source.keys) <= recipe.mentioned


@pytest.mark.parametrize(("column", "row_format"), [("body", "text"), ("messages", "messages")])
def test_the_column_of_texts(column: str, row_format: str, tmp_path: Path) -> None:
    text = f"{HEAD}dataset_name: org/rows\ndataset_text_field: {column}\n"
    rows = translated_text("trl", text, tmp_path).values["data.train"]
    assert rows["format"] == row_format
    assert rows.get("columns") == ({"text": "body"} if row_format == "text" else None)


@pytest.mark.parametrize("key", ["num_generations", "center_rewards_coefficient", "lmbda"])
def test_files_of_other_trainers_are_refused(key: str, tmp_path: Path) -> None:
    text = f"{HEAD}dataset_name: org/rows\nbeta: 0.1\n{key}: 1\n"
    with refuses(UsageError, where="file.yaml:4", names=[key]):
        translated_text("trl", text, tmp_path)


@pytest.mark.parametrize(("loss", "method"), [("kto", "kto"), ("simpo", "simpo"), ("ipo", "dpo")])
def test_a_loss_tells_the_trainer(loss: str, method: str, tmp_path: Path) -> None:
    text = f"{HEAD}dataset_name: org/rows\nbeta: 0.1\nloss_type: {loss}\ncpo_alpha: 0\n"
    if loss != "simpo":
        text = text.replace("cpo_alpha: 0\n", "")
    assert translated_text("trl", text, tmp_path).values["method.name"] == method
