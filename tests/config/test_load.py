"""Layers, overrides and paths: what wins, and where a relative path starts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from errors import refuses
from tunesmith.config.dump import to_mapping
from tunesmith.config.load import from_mapping, load_recipe
from tunesmith.config.names import keys, nearest, other_tools
from tunesmith.config.schema import Run
from tunesmith.errors import RecipeError
from tunesmith.units import Length, Size

from .bad_recipes import BASE


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good recipe in a folder of its own, which is not the working directory."""
    (tmp_path / "work").mkdir()
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    path = tmp_path / "recipes" / "base.yaml"
    path.write_text(
        BASE
        + "adapter: {rank: 4, alpha: 8, target: [q_proj]}\ntrain: {seed: 1, betas: [0.9, 0.95]}\n"
    )
    return path


def _extending(recipe: Path, text: str) -> Run:
    path = recipe.parent / "top.yaml"
    path.write_text(f"extends: base.yaml\n{text}")
    return load_recipe(path)


def test_a_recipe_in_utf_16_names_the_command_that_converts_it(tmp_path: Path) -> None:
    text = "model: {name: a/b}\n"
    path = tmp_path / "it's $(mine).yaml"
    path.write_bytes(f"\ufeff{text}".encode("utf-16-be"))
    with refuses(RecipeError, where=f"{path}:1") as refused:
        load_recipe(path)
    command = refused.value.fix.partition(">")[0]
    converted = subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True)
    assert converted.stdout == text


def test_typed(recipe: Path) -> None:
    run = load_recipe(
        recipe,
        ["train.duration=3 epochs", "train.global_batch=32768 tokens", "train.clip_norm=null"],
    )
    assert (run.adapter.rank, run.adapter.alpha, run.adapter.target) == (4, 8.0, ("q_proj",))
    assert type(run.adapter.alpha) is float  # a whole number where a number is asked for
    assert run.train.duration == Length(3, "epochs")
    assert run.train.global_batch == Size(32768, "tokens")
    assert run.train.clip_norm is None
    assert [source.source for source in run.data.train] == ["org/rows"]


def test_extends_merges_mappings_and_replaces_lists(recipe: Path) -> None:
    text = "adapter: {rank: 16, target: [v_proj, o_proj]}\ntrain: {betas: [0.8, 0.9]}\n"
    run = _extending(recipe, text)
    adapter = (run.adapter.rank, run.adapter.alpha, run.adapter.target)
    assert adapter == (16, 8.0, ("v_proj", "o_proj"))
    assert (run.train.betas, run.train.seed) == ((0.8, 0.9), 1)


@pytest.mark.parametrize(
    ("place", "counts"),
    [("recipes/base.yaml", True), ("recipes/below/base.yaml", True), ("other/base.yaml", False),
     ("recipes/run/config.yaml", False), ("recipes/link.yaml", False)],
)  # fmt: skip
def test_only_the_users_own_files_allow_code(place: str, counts: bool, tmp_path: Path) -> None:
    base = tmp_path / place
    base.parent.mkdir(parents=True, exist_ok=True)
    file = base
    if base.name == "link.yaml":
        file = tmp_path / "far.yaml"
        base.symlink_to(file)
    file.write_text(BASE.replace("model: {", "model: {trust_remote_code: true, "))
    (base.parent / "env.json").touch() if base.name == "config.yaml" else None
    own = tmp_path / "recipes" / "own.yaml"
    own.parent.mkdir(exist_ok=True)
    own.write_text(f"extends: {base}\n")
    if counts:
        assert load_recipe(own).model.trust_remote_code
    else:
        with refuses(RecipeError, where=f"{base}:1", names=["model.trust_remote_code"]):
            load_recipe(own)
    for overrides in (["model.trust_remote_code=true"], {"model.trust_remote_code": True}):
        assert load_recipe(own, overrides).model.trust_remote_code
    assert not load_recipe(own, ["model.trust_remote_code=false"]).model.trust_remote_code
    own.write_text(f"extends: {base}\nmodel: {{trust_remote_code: true}}\n")
    assert load_recipe(own).model.trust_remote_code


def test_an_error_below_extends_names_the_file_below(recipe: Path) -> None:
    recipe.write_text(BASE + "train:\n  sed: 1\n")
    with refuses(RecipeError, where="base.yaml:5"):
        _extending(recipe, "")


def test_full_fine_tuning_over_an_adapter(recipe: Path) -> None:
    assert _extending(recipe, "adapter: {kind: none}\n").adapter.kind == "none"
    for override in ("adapter.kind=none", "adapter={kind: none}"):
        run = load_recipe(recipe, [override])
        assert (run.adapter.kind, run.adapter.rank) == ("none", 8)
    assert load_recipe(recipe, ["adapter.kind=lora"]).adapter.rank == 4


def test_overrides_in_order(recipe: Path) -> None:
    words = ["train.seed=2", "train.seed=3", "train={weight_decay: 0.1}", "train.betas=[0.9, 0.99]"]
    train = load_recipe(recipe, words).train
    assert (train.seed, train.weight_decay, train.betas) == (3, 0.1, (0.9, 0.99))
    assert load_recipe(recipe, ["data.system=a=b"]).data.system == "a=b"


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


@pytest.mark.parametrize(
    ("overrides", "name", "key"),
    [
        ({"train.learning_rate": "2e-4"}, '"2e-4"', "train.learning_rate"),
        ({"train.sed": 3}, "train.sed", "train.sed"),
        ({"train": {"seed": {1}}}, "set", "train.seed"),
        ({"extends": "qwen3-8b-lora"}, "extends", "extends"),
        ({"adapter.kind": "none", "adapter.rank": 3}, "adapter.rank", "adapter.rank"),
    ],
)
def test_a_wrong_override_of_a_mapping_is_named(
    recipe: Path, overrides: dict, name: str, key: str
) -> None:
    with refuses(RecipeError, where=f"overrides: {key}") as caught:
        load_recipe(recipe, overrides)
    assert name in f"{caught.value.what}{caught.value.why}"


def test_overrides_of_sources(recipe: Path) -> None:
    """A single source takes a key; of a list the whole list is given."""
    run = load_recipe(recipe, ["data.train.split=train[:10%]"])
    assert run.data.train[0].split == "train[:10%]"
    two = "data.train=[{source: a/b}, {source: c/d, weight: 2}]"
    run = load_recipe(recipe, [two])
    assert [(s.source, s.weight) for s in run.data.train] == [("a/b", 1.0), ("c/d", 2.0)]
    for key in ("data.train.split", "data.train.1.split"):
        with refuses(RecipeError, names=["data.train"]):
            load_recipe(recipe, [two, f"{key}=test"])
    held_out = load_recipe(
        recipe, ["data.validation.source=a/b", "data.validation.format=text"]
    ).data.validation
    assert [(s.source, s.format) for s in held_out] == [("a/b", "text")]


def test_paths(recipe: Path) -> None:
    here, there = Path.cwd(), recipe.parent
    (there / "org").mkdir()
    (there / "org" / "model").mkdir()
    (there / "prompt.jinja").write_text("x")
    recipe.write_text(
        BASE.replace("org/rows", "rows.jsonl")
        + "adapter: {from: ../adapter}\n"
        + "# a folder of that name lies beside the recipe\n"
    )
    run = load_recipe(recipe, ["data.template=auto"])
    assert run.model.name == str(there / "org" / "model")
    assert run.data.train[0].source == str(there / "rows.jsonl")
    assert run.adapter.from_ == str(there.parent / "adapter")
    assert run.output_dir == str(here / "runs" / "x")
    run = load_recipe(
        recipe, ["model.name=org/model", "data.train.source=more.csv", "adapter.from=org/adapter"]
    )
    # Hub ids: no such folder here
    assert (run.model.name, run.adapter.from_) == (
        "org/model",
        "org/adapter",
    )
    assert run.data.train[0].source == str(here / "more.csv")
    assert load_recipe(recipe, ["model.name=small.gguf"]).model.name == str(here / "small.gguf")
    run = load_recipe(recipe, ["adapter.from=runs/none/final"])
    assert run.adapter.from_ == str(here / "runs/none/final"), "a Hub id has one slash"
    assert load_recipe(recipe, ["model.name=~/model"]).model.name == str(Path.home() / "model")
    with refuses(RecipeError, names=["data.template", "prompt.jinja"]):
        load_recipe(recipe, ["data.template=prompt.jinja"])
    assert load_recipe(recipe, [f"data.template={there}/prompt.jinja"]).data.template == str(
        there / "prompt.jinja"
    )


def test_from_mapping_takes_plain_values_only() -> None:
    def made(**more: object) -> Run:
        values = {"model": {"name": "a/b"}, "data": {"train": {"source": "c/d"}}}
        return from_mapping({**values, "output_dir": "x", **more}, where="x.yaml", base=Path())

    for key, value in {"output_dir": b"x", "train": {"seed": "1"}}.items():
        with refuses(RecipeError) as caught:
            made(**{key: value})
        assert caught.value.where.startswith(f"x.yaml: {key}")
    with refuses(RecipeError, where="x.yaml"):
        made(output_dir="\ud800")
    run = made(output_dir=Path("x"), train={"betas": (0.9, 0.95)})
    assert (run.output_dir, run.train.betas) == (str(Path.cwd() / "x"), (0.9, 0.95))
    assert from_mapping(to_mapping(run), where="", base=Path()) == run


def test_names_of_other_tools_lead_to_real_keys() -> None:
    """Every line of the table begins with a key of the recipe, and no name in it is a key of the
    recipe's top.
    """
    table = other_tools("keys")
    assert len(table) >= 50
    for name, line in table.items():
        assert line.split()[0].rstrip(":;,") in keys(), f"{name} -> {line}"
        assert name not in keys()


def test_words_of_other_tools_lead_to_real_values() -> None:
    words = other_tools("words")
    assert not set(other_tools("absent")) & set(words), "a word either has a value here or has none"
    assert len(words) >= 30
    for word, options in words.items():
        assert nearest(word, options.split()) is not None
        assert nearest(word, [options.split()[0]]) == options.split()[0]


def test_null_takes_away_the_validation_rows_of_a_recipe() -> None:
    """Who brings own rows to a shipped recipe must be able to say that there are none held out."""
    run = load_recipe("smollm2-135m-lora", ["data.validation=null"])
    assert run.data.validation == ()
    assert load_recipe("smollm2-135m-lora", ["data.validation=[]"]) == run


def test_a_whole_number_of_many_digits_from_python() -> None:
    for key in ("adapter.rank", "train.seed", "train.learning_rate"):
        with pytest.raises(RecipeError, match=key):
            load_recipe("smollm2-135m-lora", {key: -(10**4400)})
