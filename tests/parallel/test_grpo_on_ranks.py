"""Sampled answers and what is learned from them do not depend on the number of ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ranks import run_each
from recipes import make_run, merge
from tunesmith.training.run import train

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
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "adapter, copies": ({}, {"replicate": 2}),
    "adapter, shards": ({}, {"shard": 2}),
    "in full, shards": ({"adapter": {"kind": "none"}}, {"shard": 2}),
    "penalty to the base": ({"method": {"beta": 0.1}}, {"replicate": 2}),
}


def numbers(model: Path, folder: Path, changes: dict[str, Any]) -> list[dict[str, float]]:
    import tunesmith.training.rollouts

    tunesmith.training.rollouts.ANSWERS_AT_ONCE = 4  # a prompt in each window
    if os.environ.get("RANK", "0") != "0":
        # Nodes without a common disk do not have the file: reading it apart would end in a hang.
        tunesmith.training.rollouts.RolloutFile.read = lambda *_: pytest.fail("read on rank 1")
    result = train(make_run(model, folder, **merge(RL, changes)), quiet=True)
    return [
        {"loss": r.loss, "grad_norm": r.grad_norm, **r.extra, "rollout_seconds": 0.0}
        for r in result.records
    ]


def test_two_ranks_do_what_one_does(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(REWARD)
    alone, cases = {}, []
    for name, (what, mesh) in CASES.items():
        out = str(tmp_path / f"{name}, alone")
        alone[name] = numbers(tiny, tmp_path, {**what, "output_dir": out})
        changes = {**what, "parallel": mesh, "output_dir": str(tmp_path / name)}
        cases.append((tiny, tmp_path, changes))
    on_ranks = run_each(2, numbers, cases)[0]
    for name, many in zip(alone, on_ranks, strict=True):
        for one, several in zip(alone[name], many, strict=True):
            assert several == pytest.approx(one, rel=1e-4, abs=1e-5), name
        for step in (1, 2, 3):
            file = f"rollouts/step-{step}.safetensors"
            theirs = tmp_path / f"{name}, alone" / file
            if theirs.is_file():
                ours = load_file(tmp_path / name / file)
                assert np.array_equal(ours["ids"], load_file(theirs)["ids"])
        if "adapter" in name:
            file = "final/adapter_model.safetensors"
            ours = load_file(tmp_path / name / file)
            for key, value in load_file(tmp_path / f"{name}, alone" / file).items():
                assert np.abs(ours[key] - value).max() < 1e-6, key
