"""Written files have the keys that Transformers 4 reads, with the values of the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from conftest import byte_tokenizer
from tunesmith.model.known.architectures import ARCHITECTURES
from tunesmith.model.weights.older_readers import write_for_older_readers

from .families import SMALL

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LINEAR = {"rope_type": "linear", "factor": 8.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

# A family and, where it is not null, its `rope_scaling` on the Hub.
SCALED: dict[str, dict[str, Any]] = {
    "llama": LLAMA3,
    "qwen2": YARN,
    "gemma3_text": LINEAR,
    "phi3": LONGROPE,
}


def read(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


@pytest.mark.parametrize(
    ("family", "scaled"),
    [*((family, True) for family in SCALED), *((family, False) for family in ARCHITECTURES)],
)
def test_the_older_keys_have_the_values_of_the_hub(
    family: str, scaled: bool, tmp_path: Path
) -> None:
    scaling = SCALED.get(family) if scaled else None
    hub = {"model_type": family, **SMALL, "rope_theta": 123456.0, "torch_dtype": "bfloat16"}
    hub["rope_scaling"] = scaling
    if family == "gemma3_text":
        hub |= {"rope_local_base_freq": 20000.0, "sliding_window_pattern": 3}
    if family == "phi3":
        hub |= {"original_max_position_embeddings": 128, "partial_rotary_factor": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(hub))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path).to_dict()
    write_for_older_readers(tmp_path)
    written = read(tmp_path)
    for key in hub.keys() - {"rope_scaling"}:
        assert written[key] == hub[key], key
    if family == "phi3" or scaling is None:
        assert written["rope_scaling"] == scaling, "Phi-3 takes exactly three keys"
    else:
        kind = scaling.get("rope_type", scaling.get("type"))
        assert written["rope_scaling"] == scaling | {"rope_type": kind, "type": kind}

    again = AutoConfig.from_pretrained(tmp_path).to_dict()
    for mapping in (config, again):
        rope = mapping["rope_parameters"]
        for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
            part.pop("type", None)
    assert again == config, "Transformers 5 reads the same model as before"


def test_a_tokenizer_names_a_class_that_transformers_4_has(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    original = AutoTokenizer.from_pretrained(tmp_path)
    values = json.loads(file.read_text())
    write_for_older_readers(tmp_path)
    written = json.loads(file.read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in written
    assert written["additional_special_tokens"] == values["extra_special_tokens"]
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert set(loaded.all_special_tokens) == set(original.all_special_tokens)
