"""The time of a vision part in a plan, and its operations in the MFU of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errors import lines_with
from picture_runs import picture_recipe, write_mixed, write_vision_model
from tunesmith.cli.main import main
from tunesmith.config.dump import to_yaml
from tunesmith.config.load import load_recipe
from tunesmith.host.chips import CHIPS
from tunesmith.model.spec import ModelSpec
from tunesmith.stages.request import Request
from tunesmith.tools.plan import on_paper
from tunesmith.training.build import build

pytestmark = pytest.mark.slow
Planned = Callable[..., str]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of rows of which two in three have a picture."""
    folder = tmp_path_factory.mktemp("planned")
    model = write_vision_model(folder / "model", "qwen2_5_vl")
    recipe = picture_recipe(model, write_mixed(folder, 6))
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    return folder / "recipe.yaml"


@pytest.fixture
def planned(file: Path, capsys: pytest.CaptureFixture[str]) -> Planned:
    def show(*options: str) -> str:
        assert main(["plan", str(file), "--on", "h100", *options]) == 0
        return capsys.readouterr().out

    return show


def test_a_plan_has_it_once_the_rows_are_tokenized(
    file: Path, planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    specs: list[ModelSpec] = []
    with_vision = on_paper._with_vision

    def noted(*args: Any) -> ModelSpec:
        specs.append(with_vision(*args))
        return specs[-1]

    monkeypatch.setattr(on_paper, "_with_vision", noted)
    before = json.loads(planned("--json"))
    assert before["work"]["pictures"] is None
    first = before["meshes"][0]
    assert first["seconds"].get("vision part") is None
    of_token = specs[0].picture_flops / (1e12 * (CHIPS["h100"].tflops or 0))
    assert lines_with(planned(), "`tunesmith data`")

    session = build(Request(load_recipe(file), purpose="measure"))
    tokens = session.data.train
    pictures = int(tokens.picture_tokens.sum())
    assert (tokens.picture_tokens > 0).tolist() == [True, False, True] * 2
    assert pictures == session.data.train.counts.placeholders
    assert tokens.first(1).picture_tokens.tolist() == tokens.picture_tokens[:1].tolist()

    after = json.loads(planned("--json"))
    share = pictures / tokens.lengths.sum()
    assert after["work"]["pictures"] == pytest.approx(share)
    seconds = after["meshes"][0]["seconds"]
    assert seconds["vision part"] == pytest.approx(of_token * share * after["work"]["step"][0])
    assert after["meshes"][0]["step_seconds"] == pytest.approx(sum(seconds.values()))
    shown = planned()
    assert lines_with(shown, f"{share:.1%}")
    assert not lines_with(shown, "`tunesmith data`")

    # What MFU divides: a row of text has none of the vision part, one with a picture all of it.
    spec = session.files.spec
    assert spec.picture_flops == specs[0].picture_flops > 0
    flops = [session.flops([i], 1) for i in (0, 1)]
    monkeypatch.setattr(tokens, "picture_tokens", 0 * tokens.picture_tokens)
    assert flops[1] == session.flops([1], 1)
    alone = flops[0] - session.flops([0], 1)
    assert alone == spec.picture_flops * pictures / 4


def test_operations_that_could_not_be_counted_are_said_to_lack(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.hub import picture_support

    def zero(*_: object) -> int:
        return 0

    monkeypatch.setattr(picture_support, "measure_once", lambda _, __, make, ___: make())
    monkeypatch.setattr(picture_support, "count_picture_flops", zero)
    assert lines_with(planned(), "  the time", "vision")
