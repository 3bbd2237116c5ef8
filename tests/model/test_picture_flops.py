"""The counted operations of vision parts: those of a real forward, and of the formula by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

import vision
from errors import holds
from tunesmith.config.schema import Model
from tunesmith.data.text.placeholders import PictureProcessor
from tunesmith.hub import picture_support
from tunesmith.hub.picture_support import TYPICAL_SIZE, add_vision, make_picture_row
from tunesmith.model.load import build_on_meta
from tunesmith.model.measured_spec import model_spec
from tunesmith.model.picture_flops import count_picture_flops
from tunesmith.model.shapes import SHAPES
from tunesmith.model.vision import picture_features
from tunesmith.model.vision_support import measure_pictures

pytestmark = pytest.mark.slow
SIZE = (120, 90)


def load(folder: Path, config: Any) -> PictureProcessor:
    return PictureProcessor.load(folder, AutoTokenizer.from_pretrained(folder), config, None)


def inputs_of(processor: PictureProcessor) -> dict[str, torch.Tensor]:
    pixels = processor.pixels([Image.new("RGB", SIZE)])
    return {name: torch.from_numpy(array) for name, array in pixels.inputs.items()}


LANES = [
    pytest.param(family, marks=[] if family in ("gemma3", "qwen3_vl") else [pytest.mark.nightly])
    for family in sorted(vision.FAMILIES | vision.MORE_FAMILIES)
]


@pytest.mark.parametrize("family", LANES)
def test_they_are_those_of_a_real_forward(family: str, tmp_path: Path) -> None:
    """As torch counts them with eager attention, whose products it sees."""
    vision.write_processor(tmp_path, family)
    config = AutoConfig.from_pretrained(tmp_path)
    if family == "smolvlm":
        # Its own processor wants num2words, and makes the same inputs.
        (tmp_path / "other").mkdir()
        other = vision.write_processor(tmp_path / "other", "idefics3")
        inputs = inputs_of(load(other, AutoConfig.from_pretrained(other)))
    else:
        inputs = inputs_of(load(tmp_path, config))
    stated = Model(name=family, dtype="fp32", vision=True)
    on_meta = build_on_meta(config.get_text_config(), stated, full_config=config)
    model = AutoModelForImageTextToText.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    with FlopCounterMode(display=False) as counter:
        picture_features(model, inputs)
    assert count_picture_flops(on_meta, inputs) == counter.get_total_flops() > 0


def test_a_shape_of_the_package_has_what_is_measured(tmp_path: Path) -> None:
    """Qwen3.5 9B, whose vision part is Transformers' default, beside the formula by hand."""
    shape = SHAPES["qwen3.5-9b"]
    vision.write_processor(tmp_path, "qwen3_5")
    file = tmp_path / "preprocessor_config.json"
    pixels = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16}
    file.write_text(json.dumps(json.loads(file.read_text()) | pixels))
    token_id = AutoConfig.from_pretrained(tmp_path).image_token_id
    config = AutoConfig.for_model(
        "qwen3_5",
        text_config=dict(shape.config),
        vision_config={"out_hidden_size": 4096},
        image_token_id=token_id,
    )
    processor = load(tmp_path, config)
    row = make_picture_row(processor, AutoTokenizer.from_pretrained(tmp_path))
    assert measure_pictures(config, row).state == "packed"
    spec = add_vision(model_spec(shape.config, where="test"), config, processor)
    assert {name: vars(spec)[name] for name in shape.vision} == shape.vision

    patches, tokens, width = 40 * 30, 20 * 15, 1152
    assert processor.count_tokens(TYPICAL_SIZE) == tokens
    layer = patches * (4 * width**2 + 2 * width * 4304) + 2 * patches**2 * width
    embedding = patches * (3 * 2 * 16 * 16) * width
    projector = tokens * ((4 * width) ** 2 + 4 * width * 4096)
    assert spec.picture_flops == 2 * (27 * layer + embedding + projector) // tokens


def test_a_run_goes_on_where_they_cannot_be_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> int:
        raise NotImplementedError("conv9d")

    monkeypatch.setattr(picture_support, "count_picture_flops", fail)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    vision.write_processor(tmp_path, "gemma3")
    config = AutoConfig.from_pretrained(tmp_path)
    text = model_spec(config.get_text_config().to_dict(), where="test")
    spec = add_vision(text, config, load(tmp_path, config))
    assert spec.vision_parameters > spec.picture_flops == 0
    assert holds(caplog.text, "conv9d")
