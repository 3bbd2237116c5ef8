"""The time of a vision part in a plan, and its operations in the MFU of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from invoke import invoke
from picture_runs import picture_recipe, write_mixed, write_vision_model
from tunesmith.config.dump import to_yaml
from tunesmith.config.load import load_recipe
from tunesmith.host.chips import CHIPS
from tunesmith.stages.request import Request
from tunesmith.training.build import build

pytestmark = pytest.mark.slow


def test_a_plan_has_it_once_the_rows_are_tokenized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    model = write_vision_model(tmp_path / "model", "qwen2_5_vl")
    file = tmp_path / "recipe.yaml"
    # Two in three rows have a picture.
    file.write_text(to_yaml(picture_recipe(model, write_mixed(tmp_path, 6))))

    def planned() -> dict[str, Any]:
        shown = invoke("plan", file, "--on", "h100", "--json")
        assert shown.code == 0, shown.err
        return json.loads(shown.out)

    assert planned()["work"]["pictures"] is None
    session = build(Request(load_recipe(file), purpose="measure"))
    tokens, spec = session.data.train, session.files.spec
    pictures = int(tokens.picture_tokens.sum())
    assert (tokens.picture_tokens > 0).tolist() == [True, False, True] * 2
    after = planned()
    share = pictures / tokens.lengths.sum()
    assert after["work"]["pictures"] == pytest.approx(share)
    seconds = after["meshes"][0]["seconds"]
    of_token = spec.picture_flops / (1e12 * CHIPS["h100"].tflops)
    assert seconds["vision part"] == pytest.approx(of_token * share * after["work"]["step"][0])

    # What MFU divides: a row of text has none of the vision part, one with a picture all of it.
    flops = [session.flops([i], 1) for i in (0, 1)]
    monkeypatch.setattr(tokens, "picture_tokens", 0 * tokens.picture_tokens)
    assert flops[1] == session.flops([1], 1)
    alone = flops[0] - session.flops([0], 1)
    assert alone == spec.picture_flops * pictures / 4 > 0
