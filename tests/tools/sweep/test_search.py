"""What may vary, and how the steps are spent: without a model."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from errors import refuses
from tunesmith.cli.main import main
from tunesmith.config.names import keys
from tunesmith.config.schema import is_section
from tunesmith.errors import RecipeError
from tunesmith.tools.sweep.search import halve, rung_steps
from tunesmith.tools.sweep.space import (
    FIXED_KEY_REASONS,
    LIMIT,
    VARIED,
    Range,
    check_count,
    check_varied,
    read_space,
    split_values,
)


def test_lists_ranges_and_fixed_words():
    words = [
        "train.learning_rate=1e-4, 3e-4",
        "adapter.rank=4..64",
        "train.betas=[0.9, 0.99],[0.9, 0.95]",
        "train.seed=7",
    ]
    space = read_space(
        [*words, "adapter.target=[q_proj, v_proj]", "output_dir=a/../b", "train.dropout=0.1"]
    )
    assert space.choices == {
        "train.learning_rate": ("1e-4", "3e-4"), "train.betas": ("[0.9, 0.99]", "[0.9, 0.95]"),
    }  # fmt: skip
    assert space.ranges == {"adapter.rank": Range(4, 64, True)}
    assert space.ranges["adapter.rank"].log
    assert space.fixed == (
        "train.seed=7",
        "adapter.target=[q_proj, v_proj]",
        "output_dir=a/../b",
        "train.dropout=0.1",
    )
    assert [list(values.values()) for values in space.grid()] == [
        ["1e-4", "[0.9, 0.99]"], ["1e-4", "[0.9, 0.95]"], ["3e-4", "[0.9, 0.99]"], ["3e-4", "[0.9, 0.95]"],
    ]  # fmt: skip
    assert space.widest("adapter.rank") == ["adapter.rank=64"]
    assert space.widest("adapter.dropout") == []
    assert not read_space(["adapter.dropout=0..0.3"]).ranges["adapter.dropout"].log
    assert split_values('"a,b", c') == ['"a,b"', "c"]


def test_every_other_key_is_refused_with_a_reason():
    leaves = [key for key, (_, hint) in keys().items() if not is_section(hint)]
    refused = 0
    for key in leaves:
        if key in VARIED:
            check_varied(key, "1,2")
            continue
        with refuses(RecipeError, where="command line", names=[key]) as caught:
            check_varied(key, "1,2")
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
        (["train.learning_rate=1e-3..1e-5"], "is not a valid range for train.learning_rate"),
        (["adapter.rank=4..6.5"], "is not a valid range for adapter.rank"),
        (["train.schedule=1..2"], "is not a valid range for train.schedule"),
        (["train.seed=1,2", "train.seed=3,4"], "train.seed is set twice"),
        (["train.seed=1"], "no key varies"),
        (["train.learning_rate=1e-4,1e-4"], "has a value twice"),
        (["train.learning_rate=1e-4,3e-4,0.0001"], "has a value twice"),
        (["train.betas=[0.9, 0.99],[0.9,0.99]"], "has a value twice"),
    ],
)
def test_words_that_are_refused(words: list[str], said: str):
    with pytest.raises(RecipeError, match=said) as caught:
        read_space(words)
    assert caught.value.fix


def test_a_key_of_another_tool_keeps_its_values():
    with refuses(RecipeError, fix=["train.learning_rate=1e-4,3e-4"]):
        read_space(["train.lr=1e-4,3e-4"])


def test_values_that_differ_are_no_repetition():
    words = ["train.seed=9007199254740992,9007199254740993", "train.learning_rate=1e-4,1.1e-4"]
    assert len(read_space(words).grid()) == 4
    with pytest.raises(RecipeError) as caught:
        read_space(["train.learning_rate=1e-4,1e-4,3e-4"])
    assert caught.value.fix == "train.learning_rate=1e-4,3e-4"


def test_a_sweep_of_very_many_candidates_is_refused_with_its_number():
    listed = ",".join(map(str, range(1, 948)))
    words = [f"adapter.rank={listed}", f"train.seed={listed}"]
    with refuses(RecipeError, names=["896,809", "1,000"]) as caught:
        check_count(read_space(words), 16)
    assert "--candidates 16" in caught.value.fix
    drawn = read_space(["train.learning_rate=1e-5..1e-3"])
    with pytest.raises(RecipeError, match="897,000 candidates"):
        check_count(drawn, 897_000)
    check_count(drawn, LIMIT)
    check_count(read_space([words[0]]), 897_000)


def test_it_is_refused_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    listed = ",".join(map(str, range(1, 1002)))
    assert main(["sweep", str(tmp_path / "no-recipe.yaml"), f"train.seed={listed}"]) == 2
    assert "1,001 candidates" in capsys.readouterr().err


def test_rungs_double_and_leave_one():
    assert rung_steps(100, 8, 0, 9) == [12, 24, 48]
    assert rung_steps(100, 8, 5, 9) == [10, 20, 40]
    assert rung_steps(100, 8, 40, 9) == [12, 24, 48]  # a longer interval is not kept to
    assert rung_steps(100, 5, 0, 9) == rung_steps(100, 8, 0, 9)
    assert rung_steps(3, 8, 0, 9) == [1]
    assert [rung_steps(100, 8, 0, rungs) for rungs in (0, 1, 2)] == [[], [50], [25, 50]]
    assert rung_steps(100, 1, 0, 9) == []
    for total in range(1, 60):
        for count in range(1, 20):
            for rungs in (None, 9):
                assert all(
                    0 < step < total
                    for step in rung_steps(total, count, total % 7, rungs, total % 5)
                )


def test_the_default_stops_none_early_and_leaves_two():
    assert [rung_steps(100, count, 0) for count in (1, 2, 3, 4, 5, 8, 40)] == [
        [],
        [],
        [50],
        [50],
        *[[25, 50]] * 3,
    ]
    assert [rung_steps(total, 8, 0) for total in (8, 15, 16, 31, 32)] == [
        [],
        [],
        [8],
        [14],
        [8, 16],
    ]
    assert [rung_steps(100, 8, 0, None, warmup) for warmup in (3, 12, 13, 25, 26)] == [
        [25, 50]
    ] * 2 + [[50]] * 2 + [[]]
    assert rung_steps(100, 8, 0, 2, 90) == [25, 50]  # as told


def test_the_worse_half_stops_at_each_rung_and_nan_first():
    losses = {name: random.Random(name).random() for name in "abcdefgh"} | {"c": math.inf}
    trained: list[tuple[str, int | None]] = []

    def measure(name: str, until: int | None) -> float:
        trained.append((name, until))
        return losses[name]

    halve(list("abcdefgh"), [2, 4, 8], measure)
    order = sorted(losses, key=losses.__getitem__)
    for step, count in ((2, 8), (4, 4), (8, 2), (None, 1)):
        assert {name for name, until in trained if until == step} == {*order[:count]}
    trained.clear()
    halve(["c", "c"], [1], measure)
    assert trained == [("c", 1), ("c", 1)]


def test_values_of_ranges_are_drawn_by_the_seed():
    space = read_space(["train.learning_rate=1e-5..1e-2", "adapter.rank=4,8", "train.seed=0..9"])
    drawn = space.draw(14, seed=1)
    assert drawn == space.draw(14, seed=1)
    assert drawn != space.draw(14, seed=2)
    assert len({str(values) for values in drawn}) == 14
    for values in drawn:
        assert [*values] == ["adapter.rank", "train.learning_rate", "train.seed"]
        assert 1e-5 <= float(values["train.learning_rate"]) <= 1e-2
        assert values["adapter.rank"] in ("4", "8")
    assert {values["train.seed"] for values in space.draw(100, seed=1)} == {*map(str, range(10))}
    rates = [float(values["train.learning_rate"]) for values in space.draw(100, seed=1)]
    assert 20 < sum(rate < 1e-4 for rate in rates) < 45  # a third, by the logarithm


def test_the_values_are_those_that_optunas_random_sampler_drew():
    """RandomSampler(seed=42) of Optuna 5.0.0, which drew them up to this version."""
    space = read_space(
        ["adapter.rank=2..64", "adapter.dropout=0..0.3", "train.schedule=cosine,linear,constant"]
    )
    drawn = [
        (v["train.schedule"], v["adapter.rank"], v["adapter.dropout"])
        for v in space.draw(4, seed=42)
    ]
    assert drawn == [
        ("linear", "14", "0.04681"),
        ("constant", "14", "0.2124"),
        ("linear", "3", "0.05455"),
        ("constant", "8", "0.08737"),
    ]
