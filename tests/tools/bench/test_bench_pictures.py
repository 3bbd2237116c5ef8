"""`tunesmith bench --picture`: drawn pictures of a size through a run's own steps, and refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from errors import check_shown, holds
from picture_runs import FAMILIES, picture_recipe, write_vision_model
from tunesmith.cli.main import main
from tunesmith.config.dump import to_yaml
from tunesmith.methods import base
from tunesmith.model.vision import see

pytestmark = pytest.mark.slow
# Tokens of pictures around 112 x 56: by the size of each, and the same for each.
TOKENS = {"qwen2_5_vl": {6, 8, 10, 12}, "gemma3": {4}}
# Beside 16 and 4 tokens of a larger one there is room for texts.
FITTING = {"qwen2_5_vl": "data.seq_len=144", "gemma3": "data.seq_len=132"}


@pytest.fixture(scope="module", params=FAMILIES)
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose own rows are not there."""
    folder = tmp_path_factory.mktemp(request.param)
    model = write_vision_model(folder / request.param, request.param)
    file = folder / f"{request.param}.yaml"
    file.write_text(to_yaml(picture_recipe(model, folder / "rows.jsonl", data={"seq_len": 256})))
    return file


def test_the_model_sees_drawn_pictures_around_the_size(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    features = []

    def noted(model: Any, pictures: Mapping[str, Tensor], **options: Any) -> Any:
        output = see(model, pictures, **options)
        features.append([len(each) for each in output.pooler_output])
        return output

    monkeypatch.setattr(base, "see", noted)
    out = tmp_path / "out.json"
    size = ["--picture", "112x56"]
    words = ["bench", str(recipe), *size, "--steps", "2", "--warmup", "1", "--json", str(out)]
    assert main(words) == 0
    report = json.loads(out.read_text())
    figures = report["figures"]
    # 4 examples a step; the first step is no timed one.
    timed = [tokens for step in features[-2:] for tokens in step]
    assert len(timed) == 8
    assert sum(timed) < figures["tokens"]
    assert set(timed) <= TOKENS[recipe.stem]
    assert (len(set(timed)) > 1) == (recipe.stem == "qwen2_5_vl")
    assert holds(report["recipe"]["data"]["train"], "112x56")


def test_what_a_picture_makes_impossible(recipe: Path, capsys: Any) -> None:
    """It is refused before the steps, by where, why and fix."""

    def refused(*words: str, **fields: Any) -> None:
        assert main(["bench", *words]) == 2
        check_shown(capsys.readouterr().err, **fields)

    path = str(recipe)
    for size in ("1024", "0x56", "axb", "-5x5", "100000x100000", "4000x8"):
        refused(path, f"--picture={size}", where="--picture", fix=["1024x768"])
    refused(path, "--picture", "56x56", "model.vision=false", where="model.vision")
    refused(
        path,
        "--picture",
        "56x56",
        "method=dpo",
        "data.train.format=preference",
        where="method",
        fix=["method=sft"],
    )
    shape = ["--shape", "qwen3-8b", "--tokenizer", "t", "--data", "d"]
    refused(*shape, "--picture", "56x56", where="--picture", fix=["qwen3.5-9b-vision-lora"])
    large = [path, "--picture", "560x560", "data.seq_len=4"]
    refused(*large, where="--picture", names=["560", "4"], fix=[FITTING[recipe.stem]])
