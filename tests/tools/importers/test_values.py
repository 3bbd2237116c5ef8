"""Values of other tools' files as those tools read them: YAML 1.1, text for numbers and switches,
JSON in a text, and OmegaConf's references.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from errors import refuses
from tunesmith.errors import UsageError
from tunesmith.tools.importers.source_config import source_keys, yaml_1_1_scalar

from .translations import BASES, ROWS, notes_by_key, translated, translated_text

# A text for PyYAML, and the number that the tools make of it.
CAST = {"1e-4": 1e-4, "1e5": 1e5, "1.0e4": 1e4, "5e-7": 5e-7, "1_000e-3": 1.0}
PLAIN = (
    "16_384", "1_000.5", "017", "0o17", "0b101", "1:30", "190:20:30.5", "0x_1F", "1.0e-4", "yes",
    "No", "on", "OFF", "y", "n", "true", "~", "null", ".5", "5.", "089", "_1", "1_", "-1_0",
    "run_1_2", "1.2.3", "3B", "+.inf", "00",
)  # fmt: skip


@pytest.mark.parametrize("text", PLAIN)
def test_a_plain_scalar_is_what_pyyaml_reads(text: str) -> None:
    expected = yaml.safe_load(text)
    value = yaml_1_1_scalar(text)
    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize("text", CAST)
def test_a_number_that_is_text_to_pyyaml_is_the_number(text: str) -> None:
    assert isinstance(yaml.safe_load(text), str)
    assert yaml_1_1_scalar(text) == CAST[text]


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


@pytest.mark.parametrize(
    ("tool", "key", "ours", "value"),
    [
        ("axolotl", "sequence_len: 16_384", "data.seq_len", 16384),
        ("axolotl", 'sequence_len: "4096"', "data.seq_len", 4096),
        ("axolotl", "seed: 010", "train.seed", 8),
        ("axolotl", 'sample_packing: "true"', "data.pack", True),
        ("axolotl", "adapter: lora\nlora_r: 8\npeft_use_rslora: yes", "adapter.rslora", True),
        ("axolotl", 'lora_target_linear: "no"\nadapter: lora\nlora_r: 8', "adapter.target", None),
        ("trl", "learning_rate: 5e-7", "train.learning_rate", 5e-7),
        ("trl", 'packing: "false"', "data.pack", False),
        ("trl", 'use_peft: "no"', "adapter.kind", "none"),
        ("trl", 'seed: "7"', "train.seed", 7),
        ("llamafactory", 'train_on_prompt: "no"', "data.train_on", "response"),
        ("llamafactory", 'full_determinism: "yes"', "train.deterministic", True),
        ("torchtune", "optimizer_in_bwd: on", "train.optimizer_in_backward", True),
    ],
)
def test_numbers_and_switches_in_any_form(
    tool: str, key: str, ours: str, value: Any, tmp_path: Path
) -> None:
    text = f"{key}\n" + "".join(f"{name}: {json.dumps(v)}\n" for name, v in BASES[tool].items())
    recipe = translated_text(tool, text, tmp_path, **ROWS)
    if value is None:
        value = ["q_proj", "v_proj"]
    assert recipe.values[ours] == value
    assert type(recipe.values[ours]) is type(value)


def test_a_switch_that_is_neither_on_nor_off_is_refused(tmp_path: Path) -> None:
    with refuses(UsageError, where="file.yaml:1", names=("packing", "sometimes")):
        translated("trl", {"packing": "sometimes"} | BASES["trl"], tmp_path)


@pytest.mark.parametrize("word", ["no", '"no"', "False", "'NO'", "none"])
def test_no_evaluation_is_no_validation(word: str, tmp_path: Path) -> None:
    text = f"model_name_or_path: m\ndataset_name: d/d\neval_strategy: {word}\neval_steps: 10\n"
    recipe = translated_text("trl", text, tmp_path)
    assert "data.validation" not in recipe.values
    assert "validate.every" not in recipe.values


@pytest.mark.parametrize("word", ["no", '"no"'])
def test_no_saving_is_no_checkpoint(word: str, tmp_path: Path) -> None:
    text = f"model_name_or_path: m\ndataset_name: d/d\nsave_strategy: {word}\nsave_steps: 10\n"
    assert translated_text("trl", text, tmp_path).values["checkpoint.every"] is None


@pytest.mark.parametrize(
    "arguments", ["{min_lr_rate: 0.1}", """'{"min_lr_rate": 0.1}'""", "{min_lr: 1e-6}"]
)
def test_the_least_rate_of_a_schedule(arguments: str, tmp_path: Path) -> None:
    text = (
        "model_name_or_path: m\ndataset_name: d/d\nlearning_rate: 1.0e-5\n"
        f"lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {arguments}\n"
    )
    recipe = translated_text("trl", text, tmp_path)
    assert recipe.values["train.min_learning_rate"] == 1e-6
    assert recipe.values["train.schedule"] == "cosine"
    assert not [
        note for note in recipe.notes.values() if note.key.startswith("lr_scheduler_kwargs")
    ]


def test_other_arguments_of_a_schedule_in_json_are_named_one_by_one(tmp_path: Path) -> None:
    values = {"lr_scheduler_kwargs": '{"num_cycles": 3, "power": 2.0}'}
    recipe = translated("llamafactory", BASES["llamafactory"] | values, tmp_path)
    notes = notes_by_key(recipe)
    for name in ("num_cycles", "power"):
        assert notes[f"lr_scheduler_kwargs.{name}"].differs


REFERENCES = """\
model_dir: /m/Llama-3
rows: 4
packs: false
model: {_component_: torchtune.models.llama3.lora_llama3_8b}
checkpointer: {checkpoint_dir: "${model_dir}"}
tokenizer: {path: "${model_dir}/tokenizer.model", max_seq_len: 512}
dataset: {_component_: torchtune.datasets.alpaca_dataset, packed: "${packs}"}
optimizer: {lr: 1e-4}
batch_size: ${rows}
"""


def test_a_value_that_others_refer_to_needs_nothing(tmp_path: Path) -> None:
    recipe = translated_text("torchtune", REFERENCES, tmp_path)
    notes = notes_by_key(recipe)
    for name in ("model_dir", "rows", "packs"):
        assert not notes[name].differs
    # The type of the value that is referred to stays.
    assert recipe.values["data.pack"] is False
