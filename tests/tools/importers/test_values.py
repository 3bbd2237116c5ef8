"""Scalars of other tools' files: YAML 1.1 as PyYAML reads it, and numbers that the tools cast."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.tools.importers.source_config import source_keys, yaml_1_1_scalar

# A text for PyYAML, and the number that the tools make of it.
CAST = {"1e-4": 1e-4, "1e5": 1e5, "1.0e4": 1e4, "5e-7": 5e-7, "1_000e-3": 1.0}
PLAIN = (
    "16_384", "1_000.5", "017", "0o17", "0b101", "1:30", "190:20:30.5", "0x_1F", "1.0e-4", "yes",
    "No", "on", "OFF", "y", "n", "true", "~", "null", ".5", "5.", "089", "_1", "1_", "-1_0",
    "run_1_2", "1.2.3", "3B", "+.inf", "00",
)  # fmt: skip


def test_a_plain_scalar_is_what_pyyaml_reads() -> None:
    for text in PLAIN:
        expected, value = yaml.safe_load(text), yaml_1_1_scalar(text)
        assert (value, type(value)) == (expected, type(expected)), text
    assert {text: yaml_1_1_scalar(text) for text in CAST} == CAST


@given(st.text("0123456789_:.-+exobEXnaif", min_size=1, max_size=12))
def test_any_plain_scalar_is_a_value(text: str) -> None:
    """It never raises, and a number of it is PyYAML's, or one that the tools cast."""
    value = yaml_1_1_scalar(text)
    try:
        expected = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return
    if isinstance(expected, int | float) and expected == expected:
        assert value == expected


def test_keys_with_a_dot_and_json_inside_of_json(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    nested = json.dumps({"b": json.dumps({"c": 1})})
    path.write_text(f".lora: &lora\n  lora_r: 8\na: {json.dumps(nested)}\nd: [1, 2]\n")
    keys = [(entry.key, entry.value) for entry in source_keys(path)]
    assert keys == [(".lora.lora_r", 8), ("a.b.c", 1), ("d", [1, 2])]
