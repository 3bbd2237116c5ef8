"""The text model inside a vision-language checkpoint, against Transformers' class of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from tunesmith.config.schema import Model
from tunesmith.model import load
from tunesmith.model.weights import load_weights

from . import vision_models

IDS = torch.randint(3, 100, (1, 24), generator=torch.Generator().manual_seed(1))


def read(folder: Path) -> PreTrainedModel:
    spec = Model(name=str(folder), dtype="fp32")
    model = load.build_on_meta(load.load_config(folder, spec), spec)
    load.materialize(model, torch.device("cpu"))
    load_weights(model, folder)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def whole(folder: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=sorted(vision_models.FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_models.build(request.param, tmp_path_factory.mktemp(request.param))


def test_logits_are_those_of_the_whole_model(folder: Path) -> None:
    text = read(folder)
    assert "ForCausalLM" in type(text).__name__
    assert torch.equal(logits(text), logits(whole(folder)))
    tied = text.get_input_embeddings().weight is text.get_output_embeddings().weight
    assert tied == text.config.tie_word_embeddings
