"""What is written reads back as the same run; what differs is told, and told whether it may."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.config.dump import differences, digest, dump, to_mapping, to_yaml
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Run, Source
from tunesmith.config.tree import read_value

# Text that YAML can hold: no lone surrogates, no control characters, which no file of UTF-8 YAML
# carries either.
text = st.text(st.characters(exclude_categories=("Cs",)), max_size=30) | st.sampled_from(
    ["yes", "3e-4", "null", "~", "0x10", "1_0", "- a", "a: b", "#x", "*a", "&a", "!t", "%", "a\nb\n", " x ", "'", '"', "\\", "\t", "🙂", "\x85", "\u2028", "\ufeff", "\x07"]
)  # fmt: skip


numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.slow
@settings(max_examples=50)
@given(st.dictionaries(text, text | numbers | st.booleans() | st.none(), min_size=1))
def test_every_scalar_round_trips(values: dict[str, object]) -> None:
    back = read_value(to_yaml(values), where="", base=Path()).plain()
    assert back == values
    assert [type(v) for v in back.values()] == [type(v) for v in values.values()]


@pytest.mark.parametrize("key", ["<<", "null", "a: b"])
def test_a_mapping_with_a_key_that_yaml_knows(key: str) -> None:
    """A column may have any name."""
    values = {key: "x", "columns": {"prompt": "a", key: "b"}}
    assert read_value(to_yaml(values), where="", base=Path()).plain() == values


@pytest.fixture
def run() -> Run:
    return load_recipe("llama3.1-8b-lora")


def test_dump_is_read_by_load(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump(run))
    assert load_recipe(path) == run
    full = load_recipe("llama3.1-8b-lora", ["adapter.kind=none"])
    path.write_text(dump(full))
    assert load_recipe(path) == full
    assert to_mapping(full)["adapter"] == {"kind": "none"}


FREE = {
    "log.every": "10 steps", "checkpoint.resume": "force", "train.micro_batch": "2048 tokens", "train.recompute": "full",
    "output_dir": "elsewhere", "parallel.replicate": "1", "train.duration": "2 epochs",
}  # fmt: skip
REFUSED = {
    "model.name": "a/b", "adapter.rank": "4", "data.seq_len": "512", "data.train.split": "train[:9]", "train.seed": "1",
    "train.learning_rate": "1e-3", "train.duration": "0.5 epochs", "data.pack": "false",
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [*FREE.items(), *REFUSED.items()])
def test_differences(run: Run, key: str, value: str) -> None:
    new = load_recipe("llama3.1-8b-lora", [f"{key}={value}"])
    (change,) = differences(run, new)
    assert change.key.replace(".0.", ".") == key
    assert change.allowed == (FREE.get(key) == value)
    assert change.old != change.new
    if key != "train.duration":  # it is judged by its direction, and is no part of the digest
        assert (digest(run) == digest(new)) == change.allowed


def test_differences_of_several(run: Run) -> None:
    assert differences(run, run) == []
    two = replace(run, data=replace(run.data, train=(*run.data.train, Source(source="a/b"))))
    changes = differences(run, two)
    assert {change.key.rpartition(".")[0] for change in changes} == {"data.train.1"}
    assert not any(change.allowed for change in changes)
    hour, more = (
        load_recipe("llama3.1-8b-lora", [f"train.duration={d}", "train.warmup=0 steps"])
        for d in ("1 h", "90 min")
    )
    assert [c.allowed for c in differences(hour, more) + differences(more, hour)] == [True, False]
