"""YAML 1.2 by its core schema: what is written reads back as the same run; what differs is told."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.config.dump import differences, digest, dump, to_mapping, to_yaml
from tunesmith.config.load import load_recipe
from tunesmith.config.paths import inputs_of
from tunesmith.config.schema import Run, Source
from tunesmith.config.yaml_file import RecipeLayer, read_file, read_value, scalar
from tunesmith.errors import RecipeError

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
    back = read_value(to_yaml(values), "x", "").values["x"]
    assert back == values
    assert [type(v) for v in back.values()] == [type(v) for v in values.values()]


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


FACTS = {
    "3e-4": 3e-4, "1E5": 1e5, "1.": 1.0, ".5": 0.5, "-1.5e+3": -1500.0, "0": 0, "-7": -7, "+7": 7, "007": 7, "0o17": 15,
    "0xFF": 255, "0b11": "0b11", "1_000": "1_000", "12:30:45": "12:30:45", "2026-01-31": "2026-01-31", "on": "on",
    "off": "off", "yes": "yes", "No": "No", "y": "y", "true": True, "True": True, "FALSE": False, "tRue": "tRue",
    "null": None, "~": None, "Null": None, "none": "none", ".inf": math.inf, "-.INF": -math.inf, "inf": "inf", "nan": "nan",
    "3 %": "3 %", "train[:95%]": "train[:95%]", "e5": "e5", "1e": "1e", ".": ".", "=": "=",
}  # fmt: skip


def test_scalars() -> None:
    for text, expected in FACTS.items():
        for value in (scalar(text), read_value(text, "x", "").values["x"]):
            assert (value, type(value)) == (expected, type(expected)), text
        for quoted in (f'"{text}"', f"'{text}'"):
            assert read_value(quoted, "x", "").values["x"] == text
    assert math.isnan(scalar(".nan"))  # type: ignore[arg-type]


def test_every_key_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "# head\na:\n  b: 1\n  c:\n    - x\n    - y: 2\nd: {e: 3,\n    f: 4}\ng: |\n  long\n  text\nh:\n  1\n"
    )
    found = {
        key: place.removeprefix(f"{path}:") for key, place in read_file(path).positions.items()
    }
    lines = "a 2 a.b 3 a.c 4 a.c.0 5 a.c.1 6 a.c.1.y 6 d 7 d.e 7 d.f 8 g 9 h 12".split()
    assert found == {"": "2", **dict(zip(lines[::2], lines[1::2], strict=True))}


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    tree = read_file(path)
    assert tree.values == {"a": 1, "b": 2}
    assert tree.positions["b"] == f"{path}:2"


@settings(max_examples=40)
@given(st.text(max_size=60) | st.text("[]{}:,-&*!|>'\"%@`# \n\tax0?~<=", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert isinstance(read_value(text, "x", "here"), RecipeLayer)
    except RecipeError as refused:
        assert refused.where == "here"  # noqa: PT017
        assert refused.fix  # noqa: PT017


def test_the_file_of_a_reward_is_an_input_and_moves_with_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "model: {name: org/model}\noutput_dir: runs/x\n"
        "method: {name: grpo, reward: [exact, 'r.py:score']}\n"
        "data: {train: {source: org/rows, format: messages}}\n"
    )
    run = load_recipe(tmp_path / "a.yaml")
    assert run.method.reward == ("exact", f"{tmp_path / 'r.py'}:score")
    files = [value for key, value in inputs_of(run).items() if key.startswith("method.reward")]
    assert files == [str(tmp_path / "r.py")]
    (tmp_path / "b.yaml").write_text(dump(run))
    assert load_recipe(tmp_path / "b.yaml") == run
