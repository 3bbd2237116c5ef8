"""Mixtures of data sets in TRL's files and those of the alignment-handbook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from errors import refuses
from tunesmith.errors import UsageError

from .translations import notes_by_key, translated_text

HEAD = "model_name_or_path: m/m\n"


def source(dataset: str, split: str, row_format: str = "messages", **more: Any) -> dict[str, Any]:
    return {"source": dataset, "split": split, "format": row_format, **more}


def test_trls_list_of_data_sets(tmp_path: Path) -> None:
    text = f"""{HEAD}dataset_name: ignored/rows
datasets:
  - {{path: org/tldr, name: small, split: "train[:50%]", columns: [prompt, completion]}}
  - {{path: json, data_files: [a.jsonl, b.jsonl], columns: [prompt, completion]}}
  - {{path: json, data_files: {{train: c.jsonl, test: d.jsonl}}}}
test_split_size: 0.05
"""
    recipe = translated_text("trl", text, tmp_path)
    row_format = "prompt-completion"
    assert recipe.values["data.train"] == [
        source("org/tldr", "train[:50%]", row_format, name="small"),
        source("a.jsonl", "train", row_format),
        source("b.jsonl", "train", row_format),
        source("c.jsonl", "train", row_format),
    ]
    assert recipe.values["data.hold_out"] == "5 %"
    assert "data.validation" not in recipe.values
    assert not notes_by_key(recipe)["dataset_name"].differs


def test_shares_of_trls_mixture_are_named(tmp_path: Path) -> None:
    text = f"{HEAD}datasets: [{{path: a/a, fraction: 0.7}}, {{path: b/b, fraction: 0.3}}]\n"
    notes = notes_by_key(translated_text("trl", text, tmp_path))
    assert notes["datasets.0.fraction"].differs
    assert notes["datasets.1.fraction"].differs
    # The columns are not named: the format is a guess.
    assert notes["datasets.0.path"].differs


def test_the_handbooks_mixture(tmp_path: Path) -> None:
    text = f"""{HEAD}dataset_mixture:
  datasets:
    - {{id: org/one, config: SFT, split: train_sft, columns: [messages], weight: 1.0}}
    - {{id: org/two, columns: [messages], weight: 0.25}}
    - {{id: org/three, columns: [messages], split: "train[:9]", weight: 0.5}}
  seed: 0
  test_split_size: 1000
"""
    recipe = translated_text("trl", text, tmp_path)
    assert recipe.values["data.train"] == [
        source("org/one", "train_sft", name="SFT"),
        source("org/two", "train[:25%]"),
        source("org/three", "train[:9]"),
    ]
    assert recipe.values["data.hold_out"] == "1000 examples"
    notes = notes_by_key(recipe)
    assert notes["dataset_mixture.datasets.1.weight"].differs
    assert notes["dataset_mixture.datasets.2.weight"].differs
    assert "dataset_mixture.datasets.0.weight" not in notes


def test_a_data_set_of_weight_0_is_left_away(tmp_path: Path) -> None:
    text = f"""{HEAD}dataset_mixture:
  datasets:
    - {{id: org/one, columns: [messages], weight: 0}}
    - {{id: org/two, columns: [messages], weight: 1}}
"""
    recipe = translated_text("trl", text, tmp_path)
    assert recipe.values["data.train"] == source("org/two", "train")
    assert not notes_by_key(recipe)["dataset_mixture.datasets.0.weight"].differs
    with refuses(UsageError, names=["dataset_mixture.datasets.0.id"]):
        translated_text("trl", text.replace("weight: 1", "weight: 0.0"), tmp_path)
    text = f"{HEAD}datasets: [{{path: a/a, columns: [text], fraction: 1}}, {{path: b/b, fraction: 0}}]\n"
    recipe = translated_text("trl", text, tmp_path)
    assert recipe.values["data.train"] == source("a/a", "train", "text")
    assert not notes_by_key(recipe)["datasets.1.fraction"].differs


def test_pairs_of_the_handbook_are_dpo_unless_another_method_is_given(tmp_path: Path) -> None:
    text = f"{HEAD}dataset_mixture: {{datasets: [{{id: org/prefs}}]}}\nbeta: 0.1\n"
    recipe = translated_text("trl", text, tmp_path)
    assert recipe.values["method.name"] == "dpo"
    assert recipe.values["data.train"] == source("org/prefs", "train", "preference")
    assert notes_by_key(recipe)["beta"].differs
    recipe = translated_text("trl", text, tmp_path, method="orpo")
    assert recipe.values["method.name"] == "orpo"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("dataset_mixer: [org/a, org/b]", "dataset_mixer"),
        ("dataset_mixer: {org/a: 1}", "dataset_mixer.org/a"),
        ("datasets: [{path: org/a, data_dir: folder}]", "folder"),
        ("datasets: [{split: train}]", "datasets.0.path"),
        ("dataset_mixture: [{id: org/a, weight: 0.5}]", "dataset_mixture.0.id"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_refused(text: str, name: str, tmp_path: Path) -> None:
    with refuses(UsageError, names=[name]):
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
