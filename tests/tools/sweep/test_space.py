"""Which keys a sweep varies, and which words are refused. No model is loaded."""

from __future__ import annotations

import pytest

from errors import refuses
from tunesmith.cli.main import OTHER_OPTIONS, main
from tunesmith.config.names import keys
from tunesmith.config.schema import is_section
from tunesmith.errors import EXIT_USAGE, RecipeError
from tunesmith.tools.sweep.space import (
    FIXED_KEY_REASONS,
    VARIED,
    check_varied,
    read_space,
    split_values,
)


def test_lists_and_fixed_words():
    words = [
        "train.learning_rate=1e-4, 3e-4",
        "train.betas=[0.9, 0.99],[0.9, 0.95]",
        "train.seed=7",
    ]
    space = read_space(
        [*words, "adapter.target=[q_proj, v_proj]", "output_dir=a/../b", "train.dropout=0.1"]
    )
    assert space.choices == {
        "train.learning_rate": ("1e-4", "3e-4"), "train.betas": ("[0.9, 0.99]", "[0.9, 0.95]"),
    }  # fmt: skip
    assert space.fixed == (
        "train.seed=7",
        "adapter.target=[q_proj, v_proj]",
        "output_dir=a/../b",
        "train.dropout=0.1",
    )
    assert [list(values.values()) for values in space.grid()] == [
        ["1e-4", "[0.9, 0.99]"], ["1e-4", "[0.9, 0.95]"], ["3e-4", "[0.9, 0.99]"], ["3e-4", "[0.9, 0.95]"],
    ]  # fmt: skip
    assert split_values('"a,b", c') == ['"a,b"', "c"]


def test_every_other_key_is_refused_with_a_reason():
    leaves = [key for key, (_, hint) in keys().items() if not is_section(hint)]
    refused = 0
    for key in leaves:
        if key in VARIED:
            check_varied(key)
            continue
        with refuses(RecipeError, where="command line", names=[key]) as caught:
            check_varied(key)
        assert caught.value.why in FIXED_KEY_REASONS.values()
        assert key in caught.value.fix
        refused += 1
    assert refused > 50
    assert {*VARIED} < {*leaves}
    with pytest.raises(RecipeError) as caught:
        read_space(["model.quantize=none,nf4"])
    assert caught.value.why == FIXED_KEY_REASONS["model"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.learning_rat=1,2"], "unknown key train.learning_rat"),
        (["lr=1,2"], "unknown key lr"),
        (["nothing.here=1,2"], "unknown key nothing.here"),
        (["train.seed=1,2", "train.seed=3,4"], "train.seed is set twice"),
        (["train.seed=1"], "at least one key with several values"),
    ],
)
def test_words_that_are_refused(words: list[str], said: str):
    with pytest.raises(RecipeError, match=said) as caught:
        read_space(words)
    assert caught.value.fix


def test_a_key_of_another_tool_names_ours():
    with refuses(RecipeError, fix=["train.learning_rate"]):
        read_space(["train.lr=1e-4,3e-4"])


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("train.learning_rate=1e-5..1e-3", "train.learning_rate=1e-5,1e-3"),
        ("train.learning_rate=1e-3 .. 2e-5", "train.learning_rate=1e-3,2e-5"),
        ("adapter.rank=4..64", "adapter.rank=4,64"),
        ("adapter.rank=4..5", "adapter.rank=4,5"),
        ("train.seed=0..9", "train.seed=0,9"),
        ("adapter.dropout=0..0.3", "adapter.dropout=0,0.3"),
        ("adapter.dropout=-1..1", "adapter.dropout=-1,1"),
    ],
)
def test_a_range_is_refused_with_a_list_of_values(word: str, fix: str) -> None:
    key = word.partition("=")[0]
    with refuses(RecipeError, where=f"command line: {key}", names=["range"]) as caught:
        read_space([word])
    assert caught.value.fix.endswith(f": {fix}")
    assert len(read_space([fix]).grid()) > 1


@pytest.mark.parametrize("option", ["--rungs", "--to-the-end", "--candidates"])
def test_options_of_earlier_versions_name_what_replaces_them(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [option] if option == "--to-the-end" else [option, "2"]
    assert main(["sweep", "my-recipe.yaml", "train.seed=1,2", *words]) == EXIT_USAGE
    fix = OTHER_OPTIONS[f"tunesmith sweep {option}"]
    assert f"fix: {fix}" in " ".join(capsys.readouterr().err.split())
