"""The model card: what the Hub reads of it, what a reader learns from it, and what it keeps to
itself.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from errors import holds
from recipes import make_run
from tunesmith.checkpoint import manifest
from tunesmith.checkpoint.model_card import model_card
from tunesmith.config.load import from_mapping
from tunesmith.config.schema import Model, Run, Source
from tunesmith.config.tree import read_value
from tunesmith.inference.load_run import locate_run
from tunesmith.training.run import train

LICENCE = "---\nlicense: other\nlicense_name: tiny-licence\nlicense_link: https://example.org/l\n---\n# tiny\n"


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("card")
    base = Path(shutil.copytree(tiny, folder / "my-base"))
    (base / "README.md").write_text(LICENCE)
    run = make_run(base, folder, data={"system": "/no_think"})
    train(run, quiet=True)
    return run


@pytest.mark.slow
def test_the_card_of_a_run(trained: Run) -> None:
    final = Path(trained.output_dir) / "final"
    text = (final / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert (data.license, data.license_name, data.license_link) == (
        "other",
        "tiny-licence",
        "https://example.org/l",
    )
    assert data.tags == ["tunesmith", "lora", "sft"]
    assert data.base_model is None, "a folder of this machine is nobody else's base"
    assert data.datasets is None
    for words in (
        "# my-base, fine-tuned",
        "`train.jsonl`",
        "8 (1.33 epochs, 64 examples)",
        "val_loss",
        "torch 2.",
    ):
        assert words in text
    assert str(final.parents[1]) not in text
    recipe = text.partition("```yaml\n")[2].partition("```")[0]
    assert "name: my-base\n" in recipe
    assert "system: /no_think\n" in recipe, "a text that looks like a path is none"
    again = from_mapping(
        read_value(recipe, where="card", base=final).plain(), where="card", base=final
    )
    assert again.train == trained.train


def test_the_manifest_covers_it_and_it_may_be_edited(trained: Run) -> None:
    final = Path(trained.output_dir) / "final"
    assert "README.md" in json.loads((final / "manifest.json").read_text())["files"]
    assert not (final.parent / "checkpoint-8" / "README.md").exists()
    before = (final / "README.md").read_text()
    try:
        (final / "README.md").write_text("---\nlicense: mit\n---\nMy words\n")
        assert manifest.find_damage(final) is None
        assert locate_run(final).holds == "adapter"
    finally:
        (final / "README.md").write_text(before)


@pytest.mark.slow
def test_a_merged_model_says_so(trained: Run, tmp_path: Path) -> None:
    merge = pytest.importorskip("tunesmith.tools.export.merge").merge
    merge(Path(trained.output_dir), tmp_path / "merged", device="cpu")
    text = (tmp_path / "merged" / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.library_name, data.license_name) == ("transformers", "tiny-licence")
    assert holds(text, "fp32")
    assert "8 (1.33 epochs, 64 examples)" in text
    assert str(tmp_path) not in text


def test_hub_ids_are_named_as_base_and_data_sets(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    snapshot = tmp_path / "models--someone--big" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text(LICENCE)
    (tmp_path / "models--someone--big" / "refs").mkdir()
    (tmp_path / "models--someone--big" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    rows = (
        Source(source="tatsu-lab/alpaca"),
        *trained.data.train,
        Source(source="tatsu-lab/alpaca"),
    )
    run = replace(trained, model=Model(name="someone/big"), data=replace(trained.data, train=rows))
    data = ModelCard(model_card(run.model, run, Path(run.output_dir))).data
    assert (data.base_model, data.datasets) == ("someone/big", ["tatsu-lab/alpaca"])
    assert data.license_name == "tiny-licence"


def test_an_adapter_without_a_run_or_with_a_damaged_one_still_has_a_card(
    trained: Run, tmp_path: Path
) -> None:
    bare = model_card(Model(name="someone/big"))
    assert ModelCard(bare).data.base_model == "someone/big"
    assert "```" not in bare
    (tmp_path / "metrics.jsonl").write_text("no JSON\n{}\n")
    assert "# my-base, fine-tuned" in model_card(trained.model, trained, tmp_path)


@pytest.mark.parametrize(
    "metadata", ["license: [a", "license: mit\n  x: : y", "1: 2", "- a", "license: [mit, other]"]
)
def test_a_broken_card_of_the_base_keeps_no_weights_from_the_disk(
    metadata: str, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# base\n")
    text = model_card(Model(name=str(tmp_path)))
    assert "license" in text.rpartition("---")[2]
    assert ModelCard(text).data.license is None


def test_an_environment_of_another_version_leaves_out_the_figures_alone(
    trained: Run, tmp_path: Path
) -> None:
    shutil.copy(Path(trained.output_dir) / "metrics.jsonl", tmp_path)
    for content in ("{}", "[]"):
        (tmp_path / "env.json").write_text(content)
        assert "# my-base, fine-tuned" in model_card(trained.model, trained, tmp_path)
