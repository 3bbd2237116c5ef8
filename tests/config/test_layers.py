"""A recipe over another and the command line over both: what stays, and what can be cleared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from errors import holds, refuses
from logged import logged_lines
from tunesmith.config.layers import override_layer, override_words
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Run, Source
from tunesmith.errors import RecipeError

from .bad_recipes import BASE

PARENT = """\
model: {name: org/model}
adapter: {rank: 4, modules_to_save: [embed_tokens]}
data:
  train:
    {source: org/rows, split: "train[:2000]", format: alpaca, columns: {instruction: q}, max_examples: 9, weight: 2}
  validation: {source: org/rows, split: "train[2000:]", format: alpaca, columns: {instruction: q}}
  seq_len: 512
train: {seed: 7, clip_norm: 0.5, betas: [0.8, 0.9]}
output_dir: runs/parent
"""


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "parent.yaml"
    path.write_text(PARENT)
    return path


def child(text: str) -> Run:
    Path("child.yaml").write_text(f"extends: parent.yaml\n{text}")
    return load_recipe("child.yaml")


def test_a_new_source_keeps_only_the_keys_beside_it(parent: Path) -> None:
    """In a child and on the command line, in any order; no validation rows are taken from other
    rows.
    """
    rows, both = (
        Source(source="org/mine", format="text"),
        ["data.train.source=org/mine", "data.train.format=text"],
    )
    for run in (
        child("data: {train: {source: org/mine, format: text}}\n"),
        load_recipe(parent, both),
        load_recipe(parent, both[::-1]),
        load_recipe(parent, ["data.train={source: org/mine, format: text}"]),
        load_recipe(parent, ["data.train.format=text", "data.train={source: org/mine}"]),
        load_recipe(parent, ["data.train=[{source: org/mine, format: text}]"]),
    ):
        assert (run.data.train, run.data.validation) == ((rows,), ())
        assert run.data.seq_len == 512


def test_the_same_source_is_changed_key_by_key(parent: Path) -> None:
    whole = load_recipe(parent)
    for run in (
        child('data: {train: {split: "train[:10]"}}\n'),
        child('data: {train: {source: org/rows, split: "train[:10]"}}\n'),
        load_recipe(parent, ["data.train.split=train[:10]"]),
        load_recipe(parent, ["data.train.split=train[:10]", "data.train.source=org/rows"]),
    ):
        assert run.data.train[0].split == "train[:10]"
        assert (run.data.train[0].format, run.data.train[0].columns) == (
            "alpaca",
            {"instruction": "q"},
        )
        assert run.data.validation == whole.data.validation


def test_the_same_name_in_another_folder_is_another_file(parent: Path) -> None:
    parent.write_text(PARENT.replace("org/rows", "rows.jsonl"))
    Path("sub").mkdir()
    rows = "data: {train: {source: rows.jsonl}}\n"
    Path("sub/child.yaml").write_text(f"extends: ../parent.yaml\n{rows}")
    data = load_recipe("sub/child.yaml").data
    assert data.train == (Source(source=str(Path("sub/rows.jsonl").absolute())),)
    assert data.validation == ()
    assert load_recipe(parent, ["data.train.source=rows.jsonl"]) == load_recipe(parent)


def test_validation_rows_of_their_own(parent: Path) -> None:
    """A layer's own validation counts beside its new rows, and is as new as rows to train on."""
    held = (Source(source="org/held"),)
    own = child("data: {train: {source: org/mine}, validation: {source: org/held}}\n").data
    assert own.validation == held
    data = load_recipe(parent, ["data.validation.source=org/held"]).data
    assert (data.validation, data.train) == (held, load_recipe(parent).data.train)
    with refuses(RecipeError, fix=["data.validation.source"]):
        load_recipe(parent, ["data.train.source=org/mine", "data.validation.split=test"])


def test_lists_of_sources(parent: Path) -> None:
    two = "data: {train: [{source: a/b, split: train}, {source: c/d, weight: 2}], validation: {source: a/b}}\n"
    Path("two.yaml").write_text("extends: parent.yaml\n" + two)
    run = load_recipe("two.yaml")
    assert run.data.train == (
        Source(source="a/b", split="train"),
        Source(source="c/d", weight=2.0),
    )
    assert run.data.validation == (Source(source="a/b"),)
    assert load_recipe("two.yaml", ["data.train.source=e/f"]).data.train == (Source(source="e/f"),)
    with refuses(RecipeError, names=["data.train.source"]):
        load_recipe("two.yaml", ["data.train.split=test"])
    for number in ("²", "9" * 5000, "-1"):
        with refuses(RecipeError, names=[f"data.train.{number}"]):
            load_recipe("two.yaml", [f"data.train.{number}.weight=1"])


def test_what_a_new_source_leaves_behind_is_said(parent: Path) -> None:
    others = ["data.train.source=org/mine", "data.train.format=alpaca"]
    Path("child.yaml").write_text("extends: parent.yaml\ndata: {validation: {source: org/held}}\n")
    with logged_lines() as told:
        load_recipe(parent, others, announce=True)
        load_recipe("child.yaml", announce=True)
        load_recipe(
            parent, ["data.train.split=train", "train.seed=1", "adapter.kind=none"], announce=True
        )
        load_recipe(parent, others)
        load_recipe(parent, [*others, "data.hold_out=9 %"], announce=True)
    beside = "data.train.split, data.train.columns, data.train.max_examples, data.train.weight"
    typed, file, held_out = told
    assert holds(typed, "command line", f"{beside}, data.validation", "data.hold_out='5 %'")
    held = "data.validation.split, data.validation.format, data.validation.columns"
    assert holds(file, "child.yaml:1", held)
    assert not holds(file, "data.hold_out")
    assert not holds(held_out, "data.hold_out")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.train.columns", "{}"),
        ("data.validation", "null"),
        ("data.validation", "{}"),
        ("data.validation", "[]"),
        ("data.validation", "~"),
        ("data.train.split", "null"),
        ("adapter.modules_to_save", "[]"),
    ],
)
def test_what_a_parent_gave_can_be_cleared(parent: Path, key: str, value: str) -> None:
    """What a child or the command line may set back to nothing: the key's own empty value, or null
    where it takes one.
    """
    *sections, name = key.split(".")
    flow = (
        "".join(f"{section}: {{" for section in sections) + f"{name}: {value}" + "}" * len(sections)
    )
    given = load_recipe(parent, [f"{key}={value}"])
    assert child(f"{flow}\n") == given
    if key.startswith("data.train."):
        assert getattr(given.data.train[0], name) == getattr(Source(source="x"), name)
    else:
        values = {"data": given.data.validation, "adapter": given.adapter.modules_to_save}
        assert values[sections[0]] == ()


@pytest.mark.parametrize(
    "key",
    ["train.learning_rate", "train.cpu_offload", "adapter", "data.seq_len", "data.train.columns",
     "adapter.modules_to_save", "model.name", "data.train.source", "output_dir"],
)  # fmt: skip
def test_no_value_is_not_the_default(parent: Path, key: str) -> None:
    """`train.learning_rate=$LR` of an unset variable; a null in a file, and from Python."""
    *sections, name = key.split(".")
    lines = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
    for empty in ("", " null", " ~"):
        text = "\n".join([*lines, f"{'  ' * len(sections)}{name}:{empty}"])
        with refuses(RecipeError, where=f"child.yaml:{len(sections) + 2}", names=[f"{key}:"]):
            child(f"{text}\n")
        where = f"command line: {key}"
        with refuses(RecipeError, where=where, names=[f"{key}:"]) as caught:
            load_recipe(parent, [f"{key}={empty.strip()}"])
        assert f"{key}=" in caught.value.fix
    with refuses(RecipeError, names=[f"{key}:"]):
        load_recipe(parent, {key: None})
    assert load_recipe(parent, ["train.clip_norm=null"]).train.clip_norm is None


def test_the_line_for_a_column_without_a_name_can_be_given(parent: Path) -> None:
    """`data.train.columns.instruction=$COLUMN` of an unset variable."""
    with refuses(RecipeError, names=["data.train.columns.instruction:"]) as caught:
        load_recipe(parent, ["data.train.columns.instruction="])
    line = re.search("'(.+?)'", caught.value.fix)
    assert line
    assert load_recipe(parent, [line[1]]).data.train[0].columns == {"instruction": "name"}


def test_an_empty_text_is_no_value(parent: Path) -> None:
    for key in ("model.revision", "data.train.split", "data.validation.split"):
        with refuses(RecipeError, where=f"command line: {key}", names=[key]):
            load_recipe(parent, [f"{key}=''"])
    key = "adapter.modules_to_save"
    with refuses(RecipeError, names=[f"{key}.0"], fix=[f"{key}=[]"]):
        load_recipe(parent, [f"{key}=['']"])
    # Some templates write a system message of their own where there is none.
    assert load_recipe(parent, ["data.system=''"]).data.system == ""


def test_extends_is_followed_so_far(parent: Path) -> None:
    """Each is read within another's reading: many of them would end the interpreter's stack."""
    Path("0.yaml").write_text(BASE)
    for i in range(1, 400):
        Path(f"{i}.yaml").write_text(f"extends: {i - 1}.yaml\n")
    assert load_recipe("20.yaml").model.name == "org/model"
    for last in (21, 399):
        with refuses(RecipeError, names=[20]) as caught:
            load_recipe(f"{last}.yaml")
        assert caught.value.where == f"{last - 20}.yaml:1"


def test_a_key_is_nested_so_deep(parent: Path) -> None:
    for key in ("a" + ".b" * 5000, "train" + ".x" * 21):
        with refuses(RecipeError, names=["key.sub=value"]):
            load_recipe(parent, [f"{key}=1"])


@pytest.mark.parametrize("name", ["rows.jsonl", "[{source: a.jsonl}, {source: b.jsonl}]"])
@pytest.mark.parametrize(("method", "expected"), [("dpo", "preference"), ("kto", "feedback")])
def test_other_rows_have_the_format_that_the_method_learns_from(
    method: str, expected: str, name: str, parent: Path
) -> None:
    rows = f"{{source: org/rows, format: {expected}}}"
    child = f"method: {method}\nmodel: {{name: org/model}}\noutput_dir: runs/x\n"
    parent.write_text(f"{child}data: {{train: {rows}, validation: {rows}}}\n")
    key = "data.train" if name.startswith("[") else "data.train.source"
    run = load_recipe(parent, [f"{key}={name}", "data.validation.source=other.jsonl"])
    formats = {source.format for source in (*run.data.train, *run.data.validation)}
    assert formats == {expected}
    with refuses(RecipeError, fix=[f"data.train.format={expected}"]):
        load_recipe(parent, ["data.train.source=rows.jsonl", "data.train.format=messages"])


@pytest.mark.parametrize(
    "overrides",
    [
        {"data.system": "Answer: # briefly", "validate.patience": None, "data.pack": False},
        {
            "data.train": {"source": "a.jsonl", "columns": {"prompt": "1"}},
            "train.betas": [0.9, 0.99],
        },
        "train.seed=7",
        ["train.seed=7", "train.duration=2 epochs"],
    ],
)
def test_overrides_as_words_say_the_same(overrides: Any) -> None:
    assert override_layer(override_words(overrides)).plain() == override_layer(overrides).plain()
