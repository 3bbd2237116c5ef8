"""The model card: what the Hub and a reader learn from it, and what it keeps to itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from errors import holds
from tunesmith.answers.load_run import locate_run
from tunesmith.checkpoint import manifest
from tunesmith.checkpoint.model_card import model_card
from tunesmith.config.load import from_mapping, load_recipe
from tunesmith.config.schema import Model, Source
from tunesmith.config.yaml_file import read_value

LICENCE = "---\nlicense: other\nlicense_name: tiny-licence\nlicense_link: https://example.org/l\n---\n# tiny\n"


@pytest.mark.slow
def test_the_card_of_a_run(trained: Path, tiny: Path) -> None:
    final = trained / "final"
    text = (final / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert data.tags == ["tunesmith", "lora", "sft"]
    assert data.base_model is None, "a folder of this machine is nobody else's base"
    assert data.datasets is None
    assert holds(text, tiny.name, "train.jsonl")
    assert str(trained.parent) not in text
    assert str(tiny.parent) not in text
    recipe = text.partition("```yaml\n")[2].partition("```")[0]
    assert f"name: {tiny.name}\n" in recipe
    values = read_value(recipe, "card", "card").values["card"]
    again = from_mapping(values, where="card", base=final)
    run = load_recipe(trained / "config.yaml")
    assert again.train == run.train


@pytest.mark.slow
def test_the_manifest_covers_it_and_it_may_be_edited(trained_copy: Callable[[], Path]) -> None:
    final = trained_copy() / "final"
    assert "README.md" in json.loads((final / "manifest.json").read_text())["files"]
    assert not (final.parent / "checkpoint-8" / "README.md").exists()
    (final / "README.md").write_text("---\nlicense: mit\n---\nMy words\n")
    assert manifest.find_damage(final) is None
    assert locate_run(final).holds == "adapter"


@pytest.mark.slow
def test_hub_ids_are_named_as_base_and_data_sets_with_the_licence(trained, tmp_path, monkeypatch):
    commit, place = "0" * 40, tmp_path / "models--someone--big"
    for file, text in ((f"snapshots/{commit}/README.md", LICENCE), ("refs/main", commit)):
        (place / file).parent.mkdir(parents=True)
        (place / file).write_text(text)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    run, alpaca = load_recipe(trained / "config.yaml"), Source(source="tatsu-lab/alpaca")
    rows = (alpaca, *run.data.train, alpaca)
    run = replace(run, model=Model(name="someone/big"), data=replace(run.data, train=rows))
    data = ModelCard(model_card(run.model, run)).data
    assert (data.base_model, data.datasets) == ("someone/big", ["tatsu-lab/alpaca"])
    licence = (data.license, data.license_name, data.license_link)
    assert licence == ("other", "tiny-licence", "https://example.org/l")


@pytest.mark.parametrize("metadata", ["license: [a", "- a", "license: [mit, other]"])
def test_a_broken_card_of_the_base_keeps_no_weights_from_the_disk(metadata, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# base\n")
    text = model_card(Model(name=str(tmp_path)))
    assert "license" in text.rpartition("---")[2]
    assert ModelCard(text).data.license is None
