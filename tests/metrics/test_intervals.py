"""The intervals against published figures, a plain bootstrap and exact probabilities."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from intervals import shares

from errors import holds
from tunesmith.metrics.intervals import (
    PairedIntervals,
    difference_sentence,
    expanded_tail,
    mcnemar_chance,
    mean_interval,
    paired_intervals,
    paired_losses,
    paired_share_interval,
)


@pytest.mark.slow
def test_it_is_the_percentile_bootstrap() -> None:
    """Against 20,000 resamples of another generator, whose noise is below 0.02 for 60 rows."""
    rng = np.random.default_rng(1)
    base, tuned = shares(rng, 60)
    draw = random.Random(5)
    differences = []
    for _ in range(20_000):
        rows = draw.choices(range(60), k=60)
        differences.append(sum(tuned[i] - base[i] for i in rows) / 60)
    tail = expanded_tail(60)
    low, high = np.quantile(differences, [tail, 1 - tail])
    found = paired_intervals(base, tuned)
    assert found.difference.mean == pytest.approx((tuned - base).mean())
    assert found.difference.low == pytest.approx(low, abs=0.02)
    assert found.difference.high == pytest.approx(high, abs=0.02)


def test_the_tail_is_students_for_few_rows_and_two_and_a_half_percent_for_many() -> None:
    """Hesterberg's expanded percentile: Phi(-t sqrt(n / (n - 1))), with t from a printed table."""
    for count, t in ((6, 2.5706), (11, 2.2281), (31, 2.0423), (121, 1.9799)):
        expected = 0.5 * math.erfc(t * math.sqrt(count / (count - 1)) / math.sqrt(2))
        assert expanded_tail(count) == pytest.approx(expected, rel=0.01)
    assert expanded_tail(100_000) == pytest.approx(0.025, rel=1e-3)


def test_an_example_of_fagerland_lydersen_and_laake() -> None:
    """Airways before and after a transplant: 21 children, 1 and 7 of whom changed."""
    interval = paired_share_interval(1, 7, 21)
    assert interval == pytest.approx((-0.286, -0.517, -0.026), abs=6e-4)
    assert mcnemar_chance(1, 7) == pytest.approx(0.039, abs=6e-4)


def exact_probabilities(rows: int, share: float) -> list[float]:
    return [math.comb(rows, k) * share**k * (1 - share) ** (rows - k) for k in range(rows + 1)]


def test_ends_of_a_share_are_those_of_the_binomial_with_mid_p() -> None:
    interval = mean_interval([1.0] * 3 + [0.0] * 22)
    for end, above in ((interval.low, 0.025), (interval.high, 0.975)):
        probabilities = exact_probabilities(25, end)
        assert sum(probabilities[4:]) + probabilities[3] / 2 == pytest.approx(above, abs=1e-9)


@pytest.mark.slow
def test_equally_good_models_are_told_apart_in_at_most_five_percent() -> None:
    """Exactly, for any share of rows that differ. Without McNemar's test it is up to 5.4 %."""
    rows, apart = 25, []
    for lost in range(rows + 1):
        for won in range(lost + 1, rows + 1 - lost):
            difference = paired_share_interval(won, lost, rows)
            chance = mcnemar_chance(won, lost)
            if PairedIntervals(difference, won + lost, chance, rows).is_apart:
                apart.append((won, won + lost))
    for share in (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8):
        differ = exact_probabilities(rows, share)
        error = 0.0
        for won, differing in apart:
            # One model or the other wins so many.
            error += 2 * differ[differing] * math.comb(differing, won) / 2**differing
        assert error <= 0.05, share


@pytest.mark.parametrize(("count", "low"), [(1, 0.025), (20, 0.8316)])
def test_equal_scores_have_the_exact_interval_of_a_share(count: int, low: float) -> None:
    """Clopper-Pearson's for all of n right, by its printed table."""
    assert mean_interval([1.0] * count) == pytest.approx((1, low, 1), abs=1e-4)
    assert mean_interval([0.0] * count) == pytest.approx((0, 0, 1 - low), abs=1e-4)


@pytest.mark.parametrize("factor", [10, -3])
def test_rewards_of_any_size_have_the_interval_of_their_scale(factor: float) -> None:
    rewards = np.random.default_rng(0).random(40)
    interval = mean_interval((factor * rewards).tolist())
    scaled = sorted(factor * end for end in mean_interval(rewards.tolist())[1:])
    assert [interval.low, interval.high] == pytest.approx(scaled)
    # Equal rewards say nothing about the size of other rewards.
    assert mean_interval([factor] * 5) == (factor, -math.inf, math.inf)


def pairs(won: int, lost: int, same: int) -> PairedIntervals:
    return paired_intervals(
        [0.0] * won + [1.0] * (lost + same), [1.0] * won + [0.0] * lost + [1.0] * same
    )


@pytest.mark.parametrize(
    ("won", "lost", "same", "verdict", "said"),
    [
        (30, 5, 65, "better", ["100 rows", "+25.0"]), (5, 30, 65, "worse", ["100 rows", "-25.0"]),
        (10, 9, 81, "no", ["100 rows", "+1.0"]), (5, 0, 0, "no", ["5 rows"]),
        (6, 0, 0, "better", ["6 rows"]), (15, 6, 79, "no", ["+0.0", "+18.4", "5.2%"]),
    ],
)  # fmt: skip
def test_one_sentence_says_better_worse_or_not_told_apart(won, lost, same, verdict, said):
    found = pairs(won, lost, same)
    sentence = difference_sentence("exact", found)
    assert holds(sentence, verdict, *said)
    assert [word for word in ("better", "worse", "no") if holds(sentence, word)] == [verdict]
    assert found.differing == won + lost


def test_pairs_count_and_not_the_two_means() -> None:
    """The same means: told apart where the same rows are hard for both, not where others are."""
    hard, more = [1.0] * 50 + [0.0] * 50, [1.0] * 62 + [0.0] * 38
    assert paired_intervals(hard, more).is_apart
    assert not paired_intervals(hard, more[::-1]).is_apart


def test_of_rows_of_one_length_the_interval_of_losses_is_students() -> None:
    """Of the rows' differences: -0.1, 0.0, ..., 0.8, with t of 9 degrees of freedom, 2.2622."""
    differences = [0.1 * (i - 1) for i in range(10)]
    found = paired_losses([4.0] * 10, [4.0 + 4 * d for d in differences], [4] * 10)
    reach = 2.2622 * float(np.std(differences, ddof=1)) / math.sqrt(10)
    assert (found.rows, found.differing) == (10, 9)
    assert found.difference == pytest.approx((0.35, 0.35 - reach, 0.35 + reach), abs=1e-4)
    assert found.is_apart
    said = difference_sentence("loss", found, first="one", second="other")
    ends = f"{0.35 - reach:+.4f} to {0.35 + reach:+.4f}"
    assert holds(said, "other", "worse", "one", "10 rows", "0.3500", ends)


@pytest.mark.parametrize(
    "losses", [[1.0] * 10, [2.0] * 5 + [1.0] * 5, [math.nan] * 10, [math.inf] * 10]
)
def test_losses_without_an_interval_are_not_told_apart(losses: list[float]) -> None:
    found = paired_losses([1.0] * 10, losses, [4] * 10)
    assert not found.is_apart
    sentence = difference_sentence("loss", found)
    assert holds(sentence, "finite" if not math.isfinite(losses[0]) else "no")


def test_the_interval_of_losses_holds_where_long_rows_are_unlike_short_ones() -> None:
    """In about 95 of 100 evaluations of 40 rows, drawn from rows whose difference is known."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(400):
        tokens = rng.integers(5, 100, 40)
        # Long rows gain more: a mean of the rows' means would be off.
        gains = -0.002 * tokens + rng.normal(0, 0.3, 40)
        found = paired_losses(2.0 * tokens, (2.0 + gains) * tokens, tokens.tolist())
        # E[n (-0.002 n)] / E[n] over 5 to 99.
        sizes = np.arange(5, 100)
        true = -0.002 * float((sizes**2).mean() / sizes.mean())
        held += found.difference.low <= true <= found.difference.high
    assert 0.92 <= held / 400 <= 0.98
