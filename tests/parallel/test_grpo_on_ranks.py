"""Sampled answers and what is learned from them do not depend on the number of ranks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ranks import run_each, run_ranks
from recipes import make_run, merge
from tunesmith.errors import OtherRankError, StoppedError
from tunesmith.metrics.record import read_records
from tunesmith.start.run import train

pytestmark = [pytest.mark.slow, pytest.mark.long]

# Rank 0 gets all long answers, because the windows of prompts go to the ranks in turn: the odd
# prompts are rewarded for long answers, and the even ones for short answers.
REWARD = """
def lengths(answer, row):
    size = min(len(answer), 40) / 40
    return size if len(row["prompt"]) % 2 else 1 - size
"""
RL: dict[str, Any] = {
    "method": {"name": "grpo", "reward": "r.py:lengths", "group": 4, "answer_tokens": 12},
    "train": {"duration": "3 steps", "global_batch": "5 examples", "learning_rate": 1e-3},
    "validate": {"every": "3 steps"},
}
# Changes of the recipe, the mesh, and the number of answers that are sampled at the same time: with
# 4, a prompt is in each window, and with 64, one rank samples all answers and the other none.
CASES: dict[str, tuple[dict[str, Any], dict[str, int], int]] = {
    "adapter, copies": ({}, {"replicate": 2}, 4),
    "adapter, shards": ({}, {"shard": 2}, 4),
    "adapter, shards, one samples": ({}, {"shard": 2}, 64),
    "in full, shards": ({"adapter": {"kind": "none"}}, {"shard": 2}, 4),
    "in full, shards, one samples": ({"adapter": {"kind": "none"}}, {"shard": 2}, 64),
    "penalty to the base": ({"method": {"beta": 0.1}}, {"replicate": 2}, 4),
    # Five groups in five micro batches, so that one of three micro batches of rank 1 is empty.
    "adapter, penalty, shards": (
        {"method": {"beta": 0.1}, "train": {"micro_batch": "128 tokens"}},
        {"shard": 2},
        4,
    ),
}


def numbers(
    model: Path, folder: Path, changes: dict[str, Any], at_once: int
) -> list[dict[str, float]]:
    import tunesmith.model.layers.slots
    from tunesmith.methods.grpo import rollouts

    tunesmith.model.layers.slots.ANSWERS_AT_ONCE = at_once
    sampled = []
    sample = rollouts.sample
    rollouts.sample = lambda *args, **options: sampled.append(0) or sample(*args, **options)
    result = train(make_run(model, folder, **merge(RL, changes)), quiet=True)
    rollouts.sample = sample
    if at_once == 64:
        assert bool(sampled) == (os.environ.get("RANK", "0") == "0")
    else:  # the windows of 5 prompts go to the ranks in turn
        assert len(sampled) >= 3 * (5 // int(os.environ.get("WORLD_SIZE", "1")))
    return [
        {"loss": r.loss, "grad_norm": r.grad_norm, **r.extra, "rollout_seconds": 0.0}
        for r in result.records
    ]


def test_two_ranks_do_what_one_does(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(REWARD)
    alone, cases = {}, []
    for name, (what, mesh, at_once) in CASES.items():
        out = str(tmp_path / f"{name}, alone")
        alone[name] = numbers(tiny, tmp_path, {**what, "output_dir": out}, at_once)
        changes = {**what, "parallel": mesh, "output_dir": str(tmp_path / name)}
        cases.append((tiny, tmp_path, changes, at_once))
    on_ranks = run_each(2, numbers, cases)[0]
    for name, many in zip(alone, on_ranks, strict=True):
        for one, several in zip(alone[name], many, strict=True):
            assert several == pytest.approx(one, rel=1e-4, abs=1e-5), name
        for step in (1, 2, 3):
            file = f"rollouts/step-{step}.safetensors"
            ours, theirs = (load_file(tmp_path / run / file) for run in (name, f"{name}, alone"))
            assert np.array_equal(ours["ids"], theirs["ids"])
            assert ours["texts"].tobytes() == theirs["texts"].tobytes()
        if "adapter" in name:
            file = "final/adapter_model.safetensors"
            ours = load_file(tmp_path / name / file)
            for key, value in load_file(tmp_path / f"{name}, alone" / file).items():
                assert np.abs(ours[key] - value).max() < 1e-6, key


def stopped_in_step_2(model: Path, folder: Path) -> dict[int, list[float]]:
    """The times at which this rank draws tokens in each step, from the signal that rank 1 gets."""
    import tunesmith.model.layers.slots
    from tunesmith.methods.grpo import rollouts

    tunesmith.model.layers.slots.ANSWERS_AT_ONCE = 4
    times: dict[int, list[float]] = {}
    sample = rollouts.sample

    def slowly(*args: Any, step: int, **options: Any) -> Any:
        drawn = times.setdefault(step, [])

        def chosen(_: int) -> None:
            drawn.append(time.monotonic())
            if step == 1 and os.environ["RANK"] == "1":
                signal.raise_signal(signal.SIGTERM)
            time.sleep(0.2 if step == 1 else 0)

        return sample(*args, step=step, chosen=chosen, **options)

    rollouts.sample = slowly
    changes = {"method": {"answer_tokens": 40}, "parallel": {"replicate": 2}}
    with pytest.raises((StoppedError, OtherRankError)):
        train(make_run(model, folder, **merge(RL, changes)), quiet=True)
    return times


def test_a_stop_cancels_the_answers_that_are_being_drawn(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(REWARD)
    other, signalled = run_ranks(2, stopped_in_step_2, tiny, tmp_path)
    assert max(other) == max(signalled) == 1, "no step begins after the signal"
    assert len(signalled[1]) == 1
    # The heartbeat of each second tells the other rank, which would draw for 8 seconds.
    assert other[1][-1] - signalled[1][0] < 4
    assert read_records(tmp_path / "run" / "metrics.jsonl")[-1].step == 1
