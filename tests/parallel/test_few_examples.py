"""A global batch that does not divide by the ranks, or has fewer examples than there are ranks,
trains as one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ranks import run_ranks
from recipes import make_run
from tunesmith.training.run import train

pytestmark = pytest.mark.slow

FULL: dict[str, Any] = {"adapter": {"kind": "none"}}
HEAD: dict[str, Any] = {"adapter": {"target": ["q_proj", "down_proj", "lm_head"]}}
# Sums over ranks are taken in another order: 2 steps in fp32 move a loss by about 1e-6 of itself.
ROUNDING = 1e-5


def start(
    model: Path, folder: Path, mesh: dict[str, int], what: dict[str, Any]
) -> list[tuple[float, ...]]:
    """Loss, gradient norm, examples, tokens and idle share of two steps."""
    settings = {"duration": "2 steps", "global_batch": "8 examples", "micro_batch": "128 tokens"}
    out = str(folder / f"run-{'-'.join(map(str, mesh.values()))}")
    result = train(
        make_run(model, folder, held=False, train=settings, parallel=mesh, output_dir=out, **what),
        quiet=True,
    )
    return [
        (r.loss, r.grad_norm, r.examples, r.tokens, r.idle_share or 0.0) for r in result.records
    ]


@pytest.mark.parametrize(
    ("mesh", "what"),
    [({"shard": 3}, FULL), ({"replicate": 10}, HEAD)],
    ids=["3 ranks, full", "10 ranks, the head too"],
)
def test_eight_examples_a_step_on_any_number_of_ranks(mesh, what, tiny, tmp_path):
    one = start(tiny, tmp_path, {}, what)
    world = next(iter(mesh.values()))
    found = run_ranks(world, start, tiny, tmp_path, mesh, what)
    assert all(rank == found[0] for rank in found)
    for (*numbers, _), (*known, _) in zip(found[0], one, strict=True):
        assert numbers == pytest.approx(known, rel=ROUNDING)
    assert [row[2] for row in found[0]] == [8, 8]
    shares = [row[4] for row in found[0]]
    assert min(shares) >= (0.2 if world == 10 else 0.0)  # at least 2 of 10 ranks have nothing to do
