"""Which run is better: said where it can be, and where it cannot, why."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from errors import holds, lines_with
from recipes import merge
from report.written import falling, pairs_eval, row_eval, write_eval, write_run
from tunesmith.cli.main import main
from tunesmith.errors import EXIT_OK
from tunesmith.metrics.run_figures import Spread
from tunesmith.reader.compare import (
    HASHES_OF_INPUTS,
    Verdict,
    differing_keys,
    judge,
    validation_noise,
)
from tunesmith.reader.figures import eval_figures
from tunesmith.reader.run_files import RunFiles, label_apart


def verdict(*runs) -> Verdict:
    return judge(runs)


def said(found: Verdict) -> str:
    return "\n".join([found.headline, *found.reasons])


def sentence(found: Verdict, *values: object) -> list[str]:
    """Its reasons that have all these values."""
    return [reason for reason in found.reasons if holds(reason, *values)]


def rate(value: float, seed: int = 42) -> dict:
    return {"train": {"learning_rate": value, "seed": seed}}


def test_the_lower_val_loss_on_the_same_rows_is_better(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", falling(2.0), recipe=rate(1e-3))
    bad = write_run(tmp_path / "bad", falling(2.5), recipe=rate(1e-4))
    for runs, best in (((good, bad), (0,)), ((bad, good), (1,))):
        found = verdict(*runs)
        assert (found.kind, found.best) == ("better", best)
        assert holds(found.headline, "good", "rows")
        assert holds(found.headline, "1.0100", "1.5100", "bad")
        assert sentence(found, "train.learning_rate", "0.001", "0.0001")
        assert sentence(found, "tunesmith train", "train.seed=43")


def test_the_advised_seed_draws_the_same_held_out_rows(tmp_path: Path) -> None:
    drawn = {"data": {"hold_out": "10 examples"}}
    good = write_run(tmp_path / "good", falling(2.0), recipe=rate(1e-3) | drawn)
    bad = write_run(tmp_path / "bad", falling(2.5), recipe=rate(1e-4) | drawn)
    found = verdict(good, bad)
    assert sentence(found, "tunesmith train", "train.seed=43", "data.hold_out_seed=42")


def test_rows_that_several_seeds_drew_are_not_compared(tmp_path: Path) -> None:
    hashes = {"validation_hash": "w" * 64}
    for name, seed, own, env in (
        ("one", 42, None, {}),
        ("other", 43, None, hashes),
        ("same", 43, 42, {}),
    ):
        drawn = {"data": {"hold_out": "5 %", "hold_out_seed": own}}
        write_run(tmp_path / name, falling(2.0), recipe=rate(1e-3, seed) | drawn, env=env)
    one, other, same = (RunFiles(tmp_path / name) for name in ("one", "other", "same"))
    assert sentence(verdict(one, other), "one: 42", "other: 43", "data.hold_out_seed")
    assert verdict(one, same).kind == "equal"
    # A file of its own was drawn by no seed.
    own = write_run(tmp_path / "own", falling(2.0), recipe=rate(1e-3), env=hashes)
    assert verdict(one, own).kind == "none"
    assert "drawn" not in said(verdict(one, own))


def test_a_gap_within_the_noise_is_none(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", falling(2.0, jitter=0.1), recipe=rate(1e-3))
    other = write_run(tmp_path / "other", falling(2.05, jitter=0.1), recipe=rate(1e-4))
    found = verdict(one, other)
    assert (found.kind, found.best) == ("equal", ())


def test_other_held_out_rows_are_not_compared(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", falling(2.0))
    for name, env, recipe in (
        ("hash", {"validation_hash": "w" * 64}, {}),
        ("fewer", {}, {"validate": {"max_examples": 8}}),
        ("unknown", {"validation_hash": None}, {}),
    ):
        found = verdict(one, write_run(tmp_path / name, falling(9.0), env=env, recipe=recipe))
        assert (found.kind, found.best) == ("none", ())
        what = (
            "it is unknown what val_loss was measured on"
            if name == "unknown"
            else "val_loss was measured on different"
        )
        assert found.headline.startswith(f"Not comparable: {what}")
        assert "tunesmith eval" in said(found)


def test_a_training_loss_alone_decides_nothing(tmp_path: Path) -> None:
    one, other = (
        write_run(tmp_path / "one", loss=0.1),
        write_run(tmp_path / "other", falling(3.0), loss=3.0),
    )
    found = verdict(one, other)
    assert (found.kind, found.best) == ("none", ())
    assert sentence(found, "one", "val_loss", "finished")
    assert "data.hold_out" in said(found)


def test_a_lower_training_loss_does_not_win_against_val_loss(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", falling(2.0), loss=1.5)
    fits = write_run(tmp_path / "fits", falling(2.5), recipe=rate(1e-2), loss=0.1)
    assert verdict(good, fits).best == (0,)


def test_seeds_give_the_noise(tmp_path: Path) -> None:
    """Pooled over both recipes: variances of 0.0002, so 0.0141, and so is the error of the
    difference of two means of two; with 2 degrees of freedom Student's t is beyond 4.30 once in 20
    times: 0.0608.
    """
    a = [
        write_run(tmp_path / f"a{s}", falling(2.0 + s * 0.02, jitter=0), recipe=rate(1e-3, s))
        for s in (0, 1)
    ]
    b = [
        write_run(tmp_path / f"b{s}", falling(2.02 + s * 0.02, jitter=0), recipe=rate(1e-4, s))
        for s in (0, 1)
    ]
    found = verdict(*a, *b)
    assert found.kind == "equal"
    assert sentence(found, "val_loss", "0.0141")
    assert "above 0.0608" in said(found)
    far = [
        write_run(tmp_path / f"c{s}", falling(2.5 + s * 0.02, jitter=0), recipe=rate(1e-5, s))
        for s in (0, 1)
    ]
    found = verdict(*a, *far)
    assert (found.kind, found.best) == ("better", (0, 1))
    assert holds(found.headline, "a0", "a1", "1.0100 ± 0.0141", "1.5100 ± 0.0141")


def test_one_recipe_on_edited_rows_is_two(tmp_path: Path) -> None:
    """The file of rows was edited in between, and the recipe was not."""
    good = write_run(tmp_path / "good", falling(2.0), env={"data_hash": "1" * 64})
    bad = write_run(tmp_path / "bad", falling(2.5), env={"data_hash": "2" * 64})
    judged = verdict(good, bad)
    assert (judged.kind, judged.best) == ("better", (0,))
    assert sentence(judged, HASHES_OF_INPUTS["data_hash"])


def test_the_same_rows_in_files_of_two_names_are_no_difference(tmp_path: Path) -> None:
    """As those of a Python program, which are kept in each run directory."""

    def source(name: str) -> dict:
        return {"data": {"train": {"source": name}}}

    runs = [
        write_run(tmp_path / "a", falling(2.0), recipe=merge(rate(1e-3), source("a.jsonl"))),
        write_run(tmp_path / "b", falling(2.5), recipe=merge(rate(1e-4), source("b.jsonl"))),
    ]
    judged = verdict(*runs)
    assert sentence(judged, "train.learning_rate", "0.001", "0.0001")
    assert not sentence(judged, "data.train.source")
    for run in runs:
        run.env["data_hash"] = None
    assert sentence(verdict(*runs), "data.train.source"), "the rows are not known to be the same"


def test_one_recipe_twice(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(s), falling(2.0 + s), recipe=rate(1e-3, s)) for s in (1, 2)]
    found = verdict(*runs)
    assert (found.kind, found.best) == ("equal", ())
    assert sentence(found, "2 runs", "2 seeds")


def test_an_unfinished_run_tells_nothing_of_the_seeds(tmp_path: Path) -> None:
    """It is compared after the steps that it took, and is in no mean."""
    whole = write_run(tmp_path / "whole", falling(2.0), recipe=rate(1e-3, 1))
    cut = write_run(
        tmp_path / "cut", falling(3.0, steps=20), steps=20, recipe=rate(1e-3, 2), finished=False
    )
    found = verdict(cut, whole)
    assert (found.kind, found.best) == ("none", ())
    assert holds(found.headline, "whole")
    assert "cut" not in found.headline
    assert sentence(found, "1.0100", "step 20", "1.4900", "2.4900")
    assert sentence(found, "cut (killed at step 20)")
    assert "±" not in said(found)
    also = write_run(tmp_path / "also", falling(2.1), recipe=rate(1e-3, 3))
    found = verdict(cut, whole, also)
    assert found.kind == "equal"
    # Bests of 1.01 and 1.11.
    assert sentence(found, "2 runs", "2 seeds", "1.0600 ± 0.0707")
    other = write_run(tmp_path / "other", falling(4.0), recipe=rate(1e-4))
    found = verdict(cut, whole, also, other)
    assert (found.kind, found.best) == ("better", (1, 2))


def test_an_unfinished_run_leads_or_is_led_so_far(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", falling(2.0), recipe=rate(1e-3))
    cut = write_run(
        tmp_path / "cut", falling(3.0, steps=20), steps=20, recipe=rate(1e-4), finished=False
    )
    assert verdict(whole, cut).kind == "none"


def test_the_loss_that_eval_measured_has_its_interval(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", falling(2.0))
    tuned = [1.0, 1.2, 0.8, 1.1, 0.9, 1.0]
    values = row_eval(tuned)
    values["losses"]["base"] = 1.5
    values["row_losses"]["base"] = [loss + 0.5 for loss in tuned]
    write_eval(run.folder, values)
    write_eval(run.folder, row_eval([1.0] * 5, "few", data="few.jsonl"), "few")
    run.refresh()
    cells = dict(eval_figures([run]))
    # Student's factor of five degrees of freedom, 2.571, times 0.1414 / sqrt(6)
    shown = "1.0000 (0.8516 to 1.1484), base 1.5000: -0.5000 (-0.5000 to -0.5000) at step 40"
    assert cells["eval: loss (held.jsonl, 6 rows)"] == [shown]
    [few] = cells["eval: loss (few.jsonl, 5 rows)"]
    assert few.split() == ["1.0000", "at", "step", "40"]
    values["row_losses"]["base"] = [1.5]
    write_eval(run.folder, values)
    run.refresh()
    [damaged] = dict(eval_figures([run]))["eval: loss (held.jsonl, 6 rows)"]
    assert damaged.split() == ["1.0000,", "base", "1.5000", "at", "step", "40"]


def test_cautions(tmp_path: Path) -> None:
    up = {**falling(2.0, jitter=0), 40: 1.9}
    rises = write_run(tmp_path / "rises", up, recipe=rate(1e-3))
    short = write_run(
        tmp_path / "short", falling(3.0, steps=20), steps=20, finished=False, env={"cpu": "another"}
    )
    text = said(verdict(rises, short))
    for values in (
        ("rises", "val_loss 1.9000", "step 36"),
        ("short (killed at step 20)", "val_loss"),
        ("rises 4,000", "short 2,000"),
        ("cpu", "differ"),
        ("step 20", "1.5000", "2.4900"),
    ):
        assert lines_with(text, *values)


def test_a_late_fall_counts_above_the_noise_of_the_measure(tmp_path: Path) -> None:
    """A rise of less than 1 % is news of a smooth curve, and none of one that moves as much."""
    for jitter in (0.0, 0.004):
        values = {
            step: 1 + 7e-6 * (step - 28) ** 2 + jitter * (-1) ** (step // 4)
            for step in range(4, 41, 4)
        }
        run = write_run(tmp_path / f"jitter {jitter}", values)
        assert bool(sentence(verdict(run), "ends at val_loss")) == (jitter == 0)


def test_every_difference_of_two_runs_is_named(tmp_path: Path) -> None:
    five = {"learning_rate": 1e-3, "warmup": "5 %", "weight_decay": 0.1, "clip_norm": 2.0}
    recipe = {
        "train": five | {"micro_batch": "1 examples", "schedule": "constant"},
        "log": {"every": 7},
    }
    env = {"hosts": ["spark-a", "spark-b"], "gpus": ["GB10", "GB10"], "torch": "2.14.0",
           "choices": {"compile": {"taken": "on", "why": "it gains"}}}  # fmt: skip
    found = verdict(
        write_run(tmp_path / "a", falling(2.0)),
        write_run(tmp_path / "b", falling(3.0), recipe=recipe, env=env),
    )
    text = said(found)
    keys = [f"train.{name}" for name in (*five, "schedule")]
    assert lines_with(text, *keys)
    assert lines_with(text, "`gpus`", "`torch`", "`choices.compile.taken`", "`hosts`")


def test_too_few_validations_to_know_the_noise(tmp_path: Path) -> None:
    found = verdict(
        write_run(tmp_path / "a", {40: 1.0}),
        write_run(tmp_path / "b", {40: 2.0}, recipe=rate(1e-9)),
    )
    assert (found.kind, found.best) == ("none", ())
    assert holds(found.headline, "chance", "1.0000", "2.0000")


def test_what_the_end_of_a_run_said_is_said_again(tmp_path: Path) -> None:
    rises = {**dict.fromkeys(range(4, 21, 4), 2.0), 8: 1.9}
    run = write_run(tmp_path / "my run", rises, steps=20)
    assert sentence(verdict(run), "my run (20)", "train.duration")
    assert sentence(verdict(run), "val_loss 2.0000", "step 8")
    unmeasured = write_run(tmp_path / "unmeasured", steps=20)
    assert sentence(verdict(run, unmeasured), "my run (20), unmeasured (20)")
    long = write_run(tmp_path / "long", dict.fromkeys(range(10, 51, 10), 2.0), steps=50)
    assert not sentence(verdict(long), "50")


def test_one_run(tmp_path: Path) -> None:
    found = verdict(write_run(tmp_path / "a", falling(2.0)))
    assert holds(found.headline, "a", "step 40", "val_loss 1.0100")
    assert verdict(write_run(tmp_path / "once", {60: 1.0}, steps=60)).reasons == []
    assert "without val_loss" in verdict(write_run(tmp_path / "b")).headline
    assert verdict(write_run(tmp_path / "c", steps=0, finished=False)).kind == "alone"


def test_differing_keys_tell_what_changes_nothing(tmp_path: Path) -> None:
    recipe = {
        "train": {"learning_rate": 3e-4, "micro_batch": "1 examples"},
        "adapter": {"target": ["q_proj", "v_proj"]},
    }
    found = differing_keys([write_run(tmp_path / "a"), write_run(tmp_path / "b", recipe=recipe)])
    assert [(one.key, one.values, one.learns) for one in found] == [
        ("adapter.target", ["all-linear", ["q_proj", "v_proj"]], True),
        ("train.learning_rate", [1e-4, 3e-4], True),
        ("train.micro_batch", ["auto", "1 examples"], False),
    ]


def test_what_ends_a_run_or_chooses_its_weights_changes_what_is_learned(tmp_path: Path) -> None:
    changed = {"validate": {"patience": 3, "every": "5 steps"}, "log": {"every": "7 steps"},
               "checkpoint": {"final": "last", "every": "9 steps", "keep": 2}}  # fmt: skip
    chosen = {"validate.patience", "validate.every", "checkpoint.final"}
    for kind, more in (("lora", set()), ("none", {"checkpoint.every"})):
        recipe = {"adapter": {"kind": kind}}
        runs = [
            write_run(tmp_path / kind / "a", falling(2.0), recipe=recipe),
            write_run(tmp_path / kind / "b", falling(3.0), recipe=recipe | changed),
        ]
        found = differing_keys(runs)
        assert {one.key for one in found if one.learns} == chosen | more
        assert {"log.every", "checkpoint.keep"} <= {one.key for one in found if not one.learns}


def test_a_section_that_one_run_leaves_empty_is_one_difference(tmp_path: Path) -> None:
    filled = {
        "method": {"name": "dpo", "beta": 0.1},
        "data": {"train": {"columns": {"chosen": "c"}}},
    }
    runs = [write_run(tmp_path / "sft"), write_run(tmp_path / "dpo", recipe=filled)]
    found = {one.key: one.values for one in differing_keys(runs)}
    assert found == {
        "method.name": ["sft", "dpo"],
        "method.beta": [None, 0.1],
        "data.train.columns.chosen": [None, "c"],
    }


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / place / "run") for place in ("a", "b")]
    label_apart(runs)
    assert [run.label for run in runs] == [
        str(tmp_path / "a" / "run"),
        str(tmp_path / "b" / "run"),
    ]


def test_figures_leave_out_the_first_step_of_the_speed(tmp_path: Path) -> None:
    """2 slow tokens a second in the first step, then alternately 100 and 300; the mean is weighted
    by time.
    """

    def pace(step: int) -> float:
        return 2.0 if step == 1 else 100.0 if step % 2 else 300.0

    def seconds(step: int) -> float:
        return 100.0 / pace(step)

    run = write_run(
        tmp_path / "a", steps=5, tokens_per_second=pace, step_seconds=seconds, data_seconds=lambda s: seconds(s) / 4,
        mfu=lambda s: pace(s) / 1000, memory_gib=float,
    )  # fmt: skip
    found = run.figures
    assert found.speed == Spread(
        pytest.approx(400 / (2 / 3 + 2)), pytest.approx(math.sqrt(4 * 100**2 / 3)), 4
    )
    assert found.waiting == pytest.approx(0.25)
    assert found.mfu == pytest.approx(0.15)
    assert (found.memory_gib, found.tokens, found.seconds) == (
        5.0,
        500,
        pytest.approx(50 + 2 + 2 / 3),
    )


def test_validation_noise_is_the_noise_and_not_the_trend() -> None:
    """Of a line with normal noise of 0.05, seed 0: 400 points, of which the second half estimates
    it to some 5 %.
    """
    draw = random.Random(0)
    assert validation_noise(
        [3 - 0.01 * i + draw.gauss(0, 0.05) for i in range(400)]
    ) == pytest.approx(0.05, rel=0.15)
    assert validation_noise([3 - 0.5 * i for i in range(20)]) == pytest.approx(0, abs=1e-12)
    assert validation_noise([1 + math.exp(-i) for i in range(12)]) < 2e-3, (
        "the bend of a curve that settles is no noise"
    )
    assert validation_noise([1.0, 2.0, 3.0, 4.0]) is None


def preferring(
    folder: Path, accuracies: dict[int, float], method: str = "dpo", **options
) -> RunFiles:
    """A run that learned from pairs, with its accuracy on held-out ones by step."""
    recipe = merge({"method": {"name": method}}, options.pop("recipe", {}))
    extra = {
        step: {"val_reward_accuracy": accuracies[step], "reward_margin": 1.0} for step in accuracies
    }
    val = dict.fromkeys(accuracies, options.pop("val_loss", 0.5))
    env = {"validation_examples": 100} | options.pop("env", {})
    return write_run(
        folder, val, recipe=recipe, env=env, extra=lambda step: extra.get(step, {}), **options
    )


def test_pairs_are_compared_by_accuracy_and_its_interval(tmp_path: Path) -> None:
    """val_loss of the same is equal: the accuracy decides. Of 100 pairs 0.9 and 0.7 have 95 %
    intervals of 82.9 to 94.8 and of 60.5 to 78.4 %: Newcombe's of the difference is beyond
    sqrt(7.1^2 + 8.4^2) = 11.0 points.
    """
    good = preferring(tmp_path / "good", {20: 0.9, 40: 0.85}, recipe=rate(1e-5))
    bad = preferring(tmp_path / "bad", {20: 0.6, 40: 0.7}, recipe=rate(1e-6))
    found = verdict(bad, good)
    assert (found.kind, found.best) == ("better", (1,))
    assert holds(found.headline, "90.0 %", "70.0 %", "good", "bad")
    assert sentence(found, "20.0 points", "82.9 to 94.8 %", "60.5 to 78.4 %", "above 11.0 points")
    assert sentence(found, "good", "85.0 %", "step 20")
    near = preferring(tmp_path / "near", {40: 0.82}, recipe=rate(1e-6))
    assert verdict(good, near).kind == "equal"
    alone = verdict(good)
    assert holds(alone.headline, "90.0 %", "82.9 to 94.8", "step 20")


def test_equal_accuracies_are_equal(tmp_path: Path) -> None:
    first = preferring(tmp_path / "first", {40: 0.9}, recipe=rate(1e-5), loss=0.5)
    tie = preferring(tmp_path / "tie", {40: 0.9}, recipe=rate(1e-6), loss=0.1)
    found = verdict(first, tie)
    assert found.kind == "equal"
    assert found.headline.count("90.0 %") == 2


def test_without_their_number_the_noise_of_pairs_is_that_of_the_curve(tmp_path: Path) -> None:
    env = {"validation_examples": None}
    good = preferring(tmp_path / "good", {40: 0.9}, recipe=rate(1e-5), env=env)
    bad = preferring(tmp_path / "bad", {40: 0.5}, recipe=rate(1e-6), env=env)
    assert verdict(good, bad).kind == "none"


def test_methods_that_measure_otherwise_are_compared_by_eval_alone(tmp_path: Path) -> None:
    """DPO's accuracy is against its reference, SimPO's is not; kto has none, and sft neither."""
    dpo = preferring(tmp_path / "dpo", {40: 0.9})
    simpo = preferring(tmp_path / "simpo", {40: 0.6}, "simpo")
    orpo = preferring(tmp_path / "orpo", {40: 0.9}, "orpo")
    sft = write_run(tmp_path / "sft", falling(2.0))
    assert verdict(simpo, orpo).kind == "better"
    found = verdict(dpo, simpo)
    assert (found.kind, found.best) == ("none", ())
    assert sentence(found, f"`tunesmith eval {dpo.folder} {simpo.folder}`")
    others = preferring(tmp_path / "others", {40: 0.6}, "simpo", env={"validation_hash": "w" * 64})
    assert sentence(verdict(dpo, others), f"{others.folder} --data held-out.jsonl`")
    for run, share in ((dpo, 0.95), (simpo, 0.6), (sft, 0.5)):
        write_eval(run.folder, pairs_eval(share))
        run.refresh()
    found = verdict(dpo, simpo, sft)
    assert (found.kind, found.best) == ("better", (0,))
    assert holds(found.headline, "95.0 %", "60.0 %")
    # Further pairs of one run do not hide those that all have.
    write_eval(simpo.folder, pairs_eval(0.99, row_hash="o" * 64), "further")
    simpo.refresh()
    assert verdict(dpo, simpo).best == (0,)
    # Of two evals of the same pairs the newer counts, whatever its name.
    write_eval(dpo.folder, pairs_eval(0.3), "again")
    dpo.refresh()
    assert verdict(dpo, simpo).best == (1,)
    # Other pairs are another measure.
    write_eval(simpo.folder, pairs_eval(0.99, row_hash="o" * 64))
    simpo.refresh()
    assert verdict(dpo, simpo).kind == "none"


def test_sft_runs_stay_by_loss_where_pairs_were_scored(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", falling(2.0), recipe=rate(1e-3))
    bad = write_run(tmp_path / "bad", falling(2.5), recipe=rate(1e-4))
    for run, share in ((good, 0.4), (bad, 0.9)):
        write_eval(run.folder, pairs_eval(share))
        run.refresh()
    assert verdict(good, bad).best == (0,)


def rows_around(mean: float, count: int = 40) -> list[float]:
    """Losses of rows that are easy or hard for all models, with a little of their own."""
    return [mean + 0.2 * (i % 7) + 0.01 * ((i * i) % 5) * mean for i in range(count)]


def evaluated(folder: Path, mean: float, learning_rate: float, **changes) -> RunFiles:
    """A run with one validation, and with what `eval` measured of each row."""
    run = write_run(folder, {40: mean}, recipe=rate(learning_rate), env={"validation_examples": 40})
    write_eval(run.folder, row_eval(rows_around(mean), **changes))
    run.refresh()
    return run


def test_what_eval_measured_row_by_row_decides(tmp_path: Path) -> None:
    """One validation tells no noise; rows that are hard for both runs do not blur their difference."""
    good = evaluated(tmp_path / "good", 2.0, 1e-3)
    bad = evaluated(tmp_path / "bad", 2.1, 1e-4)
    found = verdict(good, bad)
    assert (found.kind, found.best) == ("better", (0,))
    assert sentence(found, "good", "better", "bad", "40 rows", "held.jsonl")
    assert found.difference is not None
    assert (found.difference.first, found.difference.second) == ("good", "bad")
    assert found.difference.gap == pytest.approx(0.1019, abs=1e-3)
    assert 0 < found.difference.threshold < found.difference.gap
    # A third run, as of a sweep, that was not evaluated.
    third = write_run(tmp_path / "third", {20: 3.0}, recipe=rate(1e-5))
    assert verdict(third, good, bad).best == (1,)
    same = evaluated(tmp_path / "same", 2.0001, 1e-5)
    mixed = [loss + 0.01 * (-1) ** i for i, loss in enumerate(rows_around(2.0001))]
    write_eval(same.folder, row_eval(mixed))
    same.refresh()
    found = verdict(good, same)
    assert (found.kind, found.best) == ("equal", ())
    assert sentence(found, "same", "good", "40 rows", "95 % interval")


def test_a_best_that_another_run_may_equal_is_called_no_better(tmp_path: Path) -> None:
    """The nearest run is beaten; one further off varies more from row to row."""
    best = evaluated(tmp_path / "best", 2.0, 1e-3)
    beaten = evaluated(tmp_path / "beaten", 2.1, 1e-4)
    varying = evaluated(tmp_path / "varying", 2.2, 1e-5)
    losses = [loss + 3 * (-1) ** i for i, loss in enumerate(rows_around(2.2))]
    write_eval(varying.folder, row_eval(losses))
    varying.refresh()
    found = verdict(best, beaten, varying)
    assert (found.kind, found.best) == ("equal", ())
    assert holds(found.headline, "best", "varying")
    assert found.difference is not None
    assert found.difference.second == "varying"
    assert sentence(found, "varying", "best", "95 % interval")


def test_rows_that_were_trained_on_fewer_rows_or_other_ones_do_not_decide(tmp_path: Path) -> None:
    """Then `eval` of both is named, by a command to paste."""
    good = evaluated(tmp_path / "good", 2.0, 1e-3)
    for name, changes in (("seen", {"seen": 3}), ("other", {"row_hash": "o" * 64})):
        found = verdict(good, evaluated(tmp_path / name, 2.1, 1e-4, **changes))
        assert found.kind == "none"
        assert sentence(found, f"`tunesmith eval {good.folder} {tmp_path / name}`")
    fewer = [write_run(tmp_path / n, {40: 2.0}, recipe=rate(float(f"1e-{n}")), env={"validation_examples": 40}) for n in "23"]  # fmt: skip
    for run, mean in zip(fewer, (2.0, 2.5), strict=True):
        write_eval(run.folder, row_eval(rows_around(mean, 10)))
        run.refresh()
    assert verdict(*fewer).kind == "none"


def test_too_few_rows_decide_nothing(tmp_path: Path) -> None:
    runs = []
    for name, mean in (("a", 2.0), ("b", 3.0)):
        run = write_run(
            tmp_path / name, {40: mean}, recipe=rate(mean), env={"validation_examples": 3}
        )
        write_eval(run.folder, row_eval(rows_around(mean, 3)))
        run.refresh()
        runs.append(run)
    found = verdict(*runs)
    assert (found.kind, found.best) == ("none", ())
    assert sentence(found, "3 rows", "6")


def test_the_report_as_json_and_of_a_folder_of_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as of a sweep, also while its own process holds the lock of the folder."""
    evaluated(tmp_path / "sweep" / "01-good", 2.0, 1e-3)
    evaluated(tmp_path / "sweep" / "02-bad", 2.1, 1e-4)
    assert main(["report", str(tmp_path / "sweep"), "--json"]) == EXIT_OK
    found = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in found["runs"]] == ["01-good", "02-bad"]
    assert found["verdict"]["kind"] == "better"
    assert found["verdict"]["best"] == ["01-good"]
    assert holds(found["measure"], "eval")
    assert found["runs"][0]["best"]["step"] == 40
    assert found["runs"][1]["val_losses"] == [{"step": 40, "value": 2.1}]
    assert found["differing_keys"] == {"train.learning_rate": [1e-3, 1e-4]}
    assert not Path("report.html").exists()
    page = tmp_path / "page.html"
    words = ["report", str(tmp_path / "sweep"), "--json", "--output", str(page)]
    assert main(words) == EXIT_OK
    assert page.exists()
    capsys.readouterr()
    assert main(["status", str(tmp_path / "sweep"), "--json"]) == EXIT_OK
    states = [
        (Path(job["run_dir"]).name, job["state"]) for job in json.loads(capsys.readouterr().out)
    ]
    assert states == [("01-good", "finished"), ("02-bad", "finished")]
