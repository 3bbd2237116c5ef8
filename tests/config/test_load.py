"""Layers, overrides and paths of a recipe, and recipes that are refused."""

from __future__ import annotations

import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from errors import holds, refuses
from logged import logged_lines
from tunesmith.config import check
from tunesmith.config.layers import override_layer, override_words
from tunesmith.config.load import load_recipe
from tunesmith.config.names import keys, nearest, other_tools
from tunesmith.config.schema import Run, Source
from tunesmith.config.trust import mark_own_run
from tunesmith.errors import RecipeError, UsageError
from tunesmith.units import Length

from .bad_recipes import BAD_RECIPES, BASE, Bad


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good recipe in a folder of its own, which is not the working directory."""
    (tmp_path / "work").mkdir()
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    path = tmp_path / "recipes" / "base.yaml"
    adapter = "adapter: {rank: 4, alpha: 8, target: [q_proj]}\n"
    path.write_text(f"{BASE}{adapter}train: {{seed: 1, betas: [0.9, 0.95]}}\n")
    return path


def test_a_recipe_over_another_and_the_command_line_over_both(recipe: Path) -> None:
    top = recipe.parent / "top.yaml"
    top.write_text("extends: base.yaml\nadapter: {rank: 16, target: [v_proj, o_proj]}\n")
    adapter = load_recipe(top).adapter
    assert (adapter.rank, adapter.alpha, adapter.target) == (16, 8.0, ("v_proj", "o_proj"))
    top.write_text("extends: base.yaml\nadapter: {kind: none}\n")
    assert load_recipe(top).adapter.kind == "none"
    for override in ("adapter.kind=none", "adapter={kind: none}"):
        run = load_recipe(recipe, [override])
        assert (run.adapter.kind, run.adapter.rank) == ("none", 8)
    words = ["train.seed=2", "train.seed=3", "train={weight_decay: 0.1}", "train.betas=[0.9, 0.99]"]
    train = load_recipe(recipe, words).train
    assert (train.seed, train.weight_decay, train.betas) == (3, 0.1, (0.9, 0.99))
    assert load_recipe(recipe, ["data.system=a=b"]).data.system == "a=b"
    recipe.write_text(BASE + "train:\n  sed: 1\n")
    with refuses(RecipeError, where="base.yaml:5"):
        load_recipe(top)


CODE = {"model.trust_remote_code": "true", "method.reward": "own.py:score", "method.reward.0": "[own.py:score]"}  # fmt: skip


@pytest.mark.parametrize("key", CODE)
@pytest.mark.parametrize(
    ("place", "beside", "counts"),
    [("recipes/base.yaml", "", True), ("recipes/below/base.yaml", "", False), ("other/base.yaml", "", True), ("recipes/link.yaml", "", True),
     *(("recipes/run/config.yaml", name, False) for name in ("env.json", "metrics.jsonl", "final/a", "checkpoint-3/a", "rollouts/a", "adapter_config.json")),
     ("recipes/config.yaml", "final/a", False), ("recipes/config.yaml", "", True)],
)  # fmt: skip
def test_only_the_users_own_files_allow_code(
    key: str, place: str, beside: str, counts: bool, tmp_path: Path
) -> None:
    base = file = tmp_path / place
    base.parent.mkdir(parents=True, exist_ok=True)
    if base.name == "link.yaml":
        file = tmp_path / "far.yaml"
        base.symlink_to(file)
    section, _, name = key.removesuffix(".0").partition(".")
    line = f"{{{name}: {CODE[key]}}}"
    if section == "method":
        line = line.replace("{", "{name: grpo, ")
    file.write_text(f"{BASE}method: {line}\n" if section == "method" else BASE.replace("model: {", f"model: {line[:-1]}, "))  # fmt: skip
    if beside:
        (base.parent / beside).parent.mkdir(exist_ok=True)
        (base.parent / beside).touch()
    own = tmp_path / "recipes" / "own.yaml"
    own.parent.mkdir(exist_ok=True)
    own.write_text(f"extends: {base}\n")
    for named in (own, base) if beside else (own,):
        with nullcontext() if counts else pytest.raises(RecipeError, match=rf"{section}\.{name}"):
            load_recipe(named)
    load_recipe(own, trusts_code=True)
    load_recipe(own, [f"{section}.{name}={CODE[key]}"])
    # A run of this user has written the file, until another person replaces it.
    mark_own_run(base)
    if beside:
        load_recipe(own)
        file.write_text(file.read_text() + "# changed\n")
        with pytest.raises(RecipeError, match=rf"{section}\.{name}"):
            load_recipe(own)
    own.write_text(f"extends: {base}\n{section}: {line}\n")
    load_recipe(own)


def test_overrides_of_a_mapping_keep_their_types(recipe: Path) -> None:
    """From Python nothing is read as YAML: `on` and `null` in quotes are text."""
    overrides = {
        "train.clip_norm": None,
        "train": {"duration": "3 epochs", "betas": (0.8, 0.9)},
        "data.system": "null",
        "data.train.source": Path("mine") / "rows.jsonl",
        "adapter.target": ["on"],
    }
    run = load_recipe(recipe, overrides)
    assert (run.train.clip_norm, run.train.betas, run.train.seed) == (None, (0.8, 0.9), 1)
    assert run.train.duration == Length(3, "epochs")
    assert (run.data.system, run.adapter.target) == ("null", ("on",))
    assert run.data.train[0].source == str(Path.cwd() / "mine" / "rows.jsonl")


def test_paths(recipe: Path) -> None:
    """Those of a recipe start beside it, those of the command line at the working directory."""
    here, there = Path.cwd(), recipe.parent
    (there / "org" / "model").mkdir(parents=True)
    recipe.write_text(BASE.replace("org/rows", "rows.jsonl") + "adapter: {from: ../adapter}\n")
    run = load_recipe(recipe)
    assert run.model.name == str(there / "org" / "model")
    assert run.data.train[0].source == str(there / "rows.jsonl")
    assert run.adapter.from_ == str(there.parent / "adapter")
    assert run.output_dir == str(here / "runs" / "x")
    words = ["model.name=org/model", "data.train.source=more.csv", "adapter.from=org/adapter"]
    run = load_recipe(recipe, words)
    # Hub ids: no such folder here
    assert (run.model.name, run.adapter.from_) == ("org/model", "org/adapter")
    assert run.data.train[0].source == str(here / "more.csv")
    for key, path in (("model.name", "small.gguf"), ("adapter.from", "runs/none/final")):
        run = load_recipe(recipe, [f"{key}={path}"])
        assert str(here / path) in (run.model.name, run.adapter.from_), "a Hub id has one slash"
    assert load_recipe(recipe, ["model.name=~/model"]).model.name == str(Path.home() / "model")


def test_names_and_words_of_other_tools_lead_to_real_keys_and_values() -> None:
    table, words = other_tools("keys"), other_tools("words")
    assert len(table) >= 50
    for name, line in table.items():
        assert line.split()[0].rstrip(":;,") in {*keys(), "extends"}, f"{name} -> {line}"
        assert name not in keys()
    assert len(words) >= 30
    assert not set(other_tools("absent")) & set(words), "a word either has a value here or has none"
    for word, options in words.items():
        assert nearest(word, [options.split()[0]]) == options.split()[0]


# --- a recipe over another, and the command line over both


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
    """Validation rows are not taken from other rows."""
    rows = Source(source="org/mine", format="text")
    both = ["data.train.source=org/mine", "data.train.format=text"]
    for run in (
        child("data: {train: {source: org/mine, format: text}}\n"),
        load_recipe(parent, both),
        load_recipe(parent, both[::-1]),
        load_recipe(parent, ["data.train={source: org/mine, format: text}"]),
    ):
        assert (run.data.train, run.data.validation) == ((rows,), ())
        assert run.data.seq_len == 512


def test_the_same_source_is_changed_key_by_key(parent: Path) -> None:
    whole = load_recipe(parent)
    for run in (
        child('data: {train: {split: "train[:10]"}}\n'),
        load_recipe(parent, ["data.train.split=train[:10]"]),
        load_recipe(parent, ["data.train.split=train[:10]", "data.train.source=org/rows"]),
    ):
        source = run.data.train[0]
        assert (source.split, source.format) == ("train[:10]", "alpaca")
        assert source.columns == {"instruction": "q"}
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
    assert run.data.train == (Source(source="a/b", split="train"), Source(source="c/d", weight=2.0))
    assert run.data.validation == (Source(source="a/b"),)
    assert load_recipe("two.yaml", ["data.train.source=e/f"]).data.train == (Source(source="e/f"),)
    with refuses(RecipeError, names=["data.train.source"]):
        load_recipe("two.yaml", ["data.train.split=test"])


def test_what_a_new_source_leaves_behind_is_said(parent: Path) -> None:
    with logged_lines() as told:
        others = ["data.train.source=org/mine", "data.train.format=alpaca"]
        load_recipe(parent, others, announce=True)
        load_recipe(parent, ["data.train.split=train", "train.seed=1"], announce=True)
    (line,) = told
    beside = "data.train.split, data.train.columns, data.train.max_examples, data.train.weight"
    assert holds(line, "command line", f"{beside}, data.validation", "data.hold_out='5 %'")


@pytest.mark.parametrize(
    "word", ["data.validation=null", "data.validation=[]", "data.train.split=null"]
)
def test_what_a_parent_gave_can_be_cleared(parent: Path, word: str) -> None:
    data = load_recipe(parent, [word]).data
    cleared = data.validation if "validation" in word else data.train[0].split
    assert cleared in ((), None)


@pytest.mark.parametrize(
    "key",
    ["train.learning_rate", "adapter", "data.train.columns", "model.name", "data.train.source"],
)
def test_no_value_is_not_the_default(parent: Path, key: str) -> None:
    """`train.learning_rate=$LR` of an unset variable, an empty text, and None from Python."""
    for empty in ("", "null"):
        with refuses(RecipeError, where=f"command line: {key}", names=[f"{key}:"]):
            load_recipe(parent, [f"{key}={empty}"])
    with refuses(RecipeError, names=[f"{key}:"]):
        load_recipe(parent, {key: None})
    assert load_recipe(parent, ["train.clip_norm=null"]).train.clip_norm is None
    with refuses(RecipeError, where="command line: data.train.split"):
        load_recipe(parent, ["data.train.split=''"])


@pytest.mark.parametrize(("method", "expected"), [("dpo", "preference"), ("kto", "feedback")])
def test_other_rows_have_the_format_that_the_method_learns_from(method, expected, parent) -> None:
    rows = f"{{source: org/rows, format: {expected}}}"
    child = f"method: {method}\nmodel: {{name: org/model}}\noutput_dir: runs/x\n"
    parent.write_text(f"{child}data: {{train: {rows}, validation: {rows}}}\n")
    files = ["data.train.source=rows.jsonl", "data.validation.source=other.jsonl"]
    run = load_recipe(parent, files)
    formats = {source.format for source in (*run.data.train, *run.data.validation)}
    assert formats == {expected}
    with refuses(RecipeError, fix=[f"data.train.format={expected}"]):
        load_recipe(parent, ["data.train.source=rows.jsonl", "data.train.format=messages"])


@pytest.mark.parametrize(
    "overrides",
    [
        {"data.system": "Answer: # briefly", "validate.patience": None, "data.pack": False},
        {"data.train": {"source": "a.jsonl", "columns": {"prompt": "1"}}},
        ["train.seed=7", "train.duration=2 epochs"],
    ],
)
def test_overrides_as_words_say_the_same(overrides: Any) -> None:
    assert override_layer(override_words(overrides)).values == override_layer(overrides).values


@pytest.mark.parametrize("bad", BAD_RECIPES, ids=[bad.name for bad in BAD_RECIPES])
def test_refused(bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(bad.recipe, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_recipe("r.yaml", bad.overrides)
    errors = [caught.value, *getattr(caught.value, "others", ())]
    found = [error for error in errors if bad.what in error.what and error.where == bad.where]
    assert [bad.fix in error.fix for error in found] == [True], caught.value
    assert caught.value.exit_code == 2


def test_all_errors_of_a_recipe_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each error of several_errors.yaml has its line, and the user's own value in its fix."""
    monkeypatch.chdir(tmp_path)
    for case in YAML(typ="safe").load(Path(__file__).with_name("several_errors.yaml")):
        Path("r.yaml").write_text(case["recipe"])
        with pytest.raises(RecipeError) as caught:
            load_recipe("r.yaml", case.get("overrides", ()))
        shown = f"{caught.value.text()}\n".split("error: ")[1:]
        assert len(shown) == len(case["errors"]), caught.value
        for text, parts in zip(shown, case["errors"], strict=True):
            assert all(part in text for part in parts), (case["name"], parts, text)


def test_table_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base of all rows is a good recipe, so each row is refused for its own fault."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(BASE)
    assert load_recipe("r.yaml").model.name == "org/model"
    assert len({bad.name for bad in BAD_RECIPES}) == len(BAD_RECIPES) >= 50


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    latin, huge, run, pipe = (tmp_path / name for name in ("l.yaml", "h.yaml", "run", "p.yaml"))
    latin.write_bytes(b"model:\n  name: caf\xe9\n")
    huge.write_bytes(b"#" * (256 << 10) + b"\n")
    run.mkdir()
    os.mkfifo(pipe)
    for path, place, fix in (
        (latin, f"{latin}:2", "iconv"),
        (huge, huge, "page of YAML"),
        (run, run, "name a recipe file"),
        (pipe, pipe, "tunesmith recipes"),
    ):
        with pytest.raises(UsageError) as caught:
            load_recipe(path)
        assert (caught.value.where, fix in caught.value.fix) == (str(place), True)


def test_rules_name_keys_and_facts() -> None:
    """A misspelled name in rules.json would be a rule that never applies."""
    derived = {"amount", "unit", "count", "repeated", "largest", "sources", "all", "embed", "twice"}
    for rule in check._rules():
        conditions = {**rule["if"], **rule.get("unless", {})}
        texts = " ".join(rule.get(part, "") for part in ("what", "fix", "why"))
        limits = [
            value.partition(" ")[2]
            for value in conditions.values()
            if "." in value and isinstance(value, str)
        ]
        for name in (*conditions, *limits, *re.findall(r"\{([\w.]+)\}", texts)):
            for key in rule["keys"]:
                whole = check._absolute(name, key)
                base, _, suffix = whole.rpartition(".")
                is_known = whole in keys() or (base in keys() and suffix in derived)
                assert is_known or whole in ("row_tokens", "key"), (key, name)
