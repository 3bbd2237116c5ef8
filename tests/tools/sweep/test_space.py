"""Which keys a sweep varies, and which words are refused. No model is loaded."""

from __future__ import annotations

import pytest

from errors import refuses
from tunesmith.config.names import keys
from tunesmith.config.schema import is_section
from tunesmith.errors import RecipeError
from tunesmith.tools.sweep.space import (
    FIXED_KEY_REASONS,
    VARIED,
    check_varied,
    read_space,
    split_values,
)


def test_lists_and_fixed_words():
    fixed = ("train.seed=7", "adapter.target=[q_proj, v_proj]", "output_dir=a/../b", "train.dropout=0.1")  # fmt: skip
    words = ["train.learning_rate=1e-4, 3e-4", "train.betas=[0.9, 0.99],[0.9, 0.95]"]
    space = read_space([*words, *fixed])
    assert space.choices == {
        "train.learning_rate": ("1e-4", "3e-4"), "train.betas": ("[0.9, 0.99]", "[0.9, 0.95]"),
    }  # fmt: skip
    assert space.fixed == fixed
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
    ("words", "name", "fix"),
    [
        (["train.learning_rat=1,2"], "train.learning_rat", "train.learning_rate"),
        (["train.lr=1e-4,3e-4"], "train.lr", "train.learning_rate"),  # of another tool
        (["train.seed=1,2", "train.seed=3,4"], "train.seed", ""),
        (["train.seed=1"], "", ""),
        (["train.learning_rate=1e-5..1e-3"], "", "train.learning_rate=1e-4,3e-4"),  # a range
    ],
)
def test_words_that_name_no_sweep_are_refused(words: list[str], name: str, fix: str):
    with refuses(RecipeError, names=[name] * bool(name), fix=[fix] * bool(fix)) as caught:
        read_space(words)
    assert caught.value.fix
