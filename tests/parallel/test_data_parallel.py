"""Copies and shards of a model on several ranks train as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ranks import run_ranks
from recipes import make_run
from tunesmith.training.run import train

STEPS = 6


def losses(model: Path, folder: Path, changes: dict[str, Any]) -> list[tuple[float, float, float]]:
    run = make_run(model, folder, train={"duration": f"{STEPS} steps", "micro_batch": "128 tokens"}, **changes)
    return [(r.loss, r.grad_norm, r.val_loss or 0.0) for r in train(run, say=None).records]


FULL, LORA = {"adapter": {"kind": "none"}}, {}
CASES = [
    ("lora-copies", LORA, {"replicate": 2}),
    ("lora-shards", LORA, {"shard": 2}),
    ("full-copies", FULL, {"replicate": 2}),
    ("full-shards", FULL, {"shard": 2}),
    ("full-hybrid", FULL, {"replicate": 2, "shard": 2}),
]


@pytest.mark.parametrize(("what", "parallel"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_losses_are_those_of_one_process(what, parallel, tiny, tmp_path):
    alone = losses(tiny, tmp_path, {**what, "output_dir": str(tmp_path / "alone")})
    world = parallel.get("replicate", 1) * parallel.get("shard", 1)
    found = run_ranks(
        world, losses, tiny, tmp_path, {**what, "parallel": parallel, "output_dir": str(tmp_path / "many")}
    )
    for step, (one, many) in enumerate(zip(alone, found[0], strict=True)):
        assert many == pytest.approx(one, rel=1e-6 if step == 0 else 1e-4)
