"""Ranks train on rows with pictures as one process does, also where one of them has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from picture_runs import FAMILIES, picture_run, write_mixed, write_vision_model
from ranks import gathered, run_each
from tunesmith.parallel import copies
from tunesmith.start.run import train
from tunesmith.training import trainer

pytestmark = [pytest.mark.slow, pytest.mark.long]

# Two examples a step: on one of them a picture, on none, on both.
ORDER = "PTTTPP"
# An adapter alone, and a projector in a model that is trained in full.
TRAINED: dict[str, dict[str, Any]] = {
    FAMILIES[0]: {},
    FAMILIES[1]: {"adapter": {"kind": "none"}, "model": {"train_projector": True}},
}


def numbers(model: Path, rows: Path, parallel: dict[str, int], out: str) -> dict[str, Any]:
    """Figures and pictures of each step on this rank, and the gradients of the first."""
    run = picture_run(
        model,
        rows,
        data={"shuffle": False},
        train={"duration": "3 steps", "global_batch": "2 examples", "micro_batch": "1 examples"},
        checkpoint={"every": None},
        **TRAINED[model.name],
        parallel=parallel,
        output_dir=str(rows.parent / out),
    )
    gradients: list[dict[str, Any]] = []
    pictures = []
    step, reduce = trainer.Trainer.train_step, trainer.reduce_gradients

    def counted(self: trainer.Trainer, batch: Any) -> Any:
        pictures.append(sum(bool(micro.pictures) for micro in batch.micro))
        return step(self, batch)

    def kept(found: dict[str, Any], *others: Any) -> None:
        reduce(found, *others)
        gradients.append(
            {name: gathered(tensor.detach()).numpy().copy() for name, tensor in found.items()}
        )

    # Tiny gradients are summed beside the backward too, so that a different order on two ranks fails.
    with (
        mock.patch.object(copies, "MIN_OVERLAPPED_ELEMENTS", 1000),
        mock.patch.object(trainer.Trainer, "train_step", counted),
        mock.patch.object(trainer, "reduce_gradients", kept),
    ):
        result = train(run, quiet=True)
    figures = [(record.loss, record.grad_norm) for record in result.records]
    return {"figures": figures, "gradients": gradients[0], "pictures": pictures}


WORLD = 2
CASES: dict[str, list[tuple[str, dict[str, int]]]] = {
    "full, shards": [(FAMILIES[1], {"shard": WORLD})],
    "copies": [(family, {"replicate": WORLD}) for family in FAMILIES],
}


@pytest.mark.parametrize(
    "group", ["full, shards", pytest.param("copies", marks=pytest.mark.nightly)]
)
def test_a_rank_without_pictures_gives_the_numbers_of_one_process(group, tmp_path):
    rows = write_mixed(tmp_path, len(ORDER), ORDER)
    alone, cases = [], []
    for family, mesh in CASES[group]:
        model = tmp_path / family
        if not model.exists():
            write_vision_model(model, family)
        name = f"{family}-{'-'.join(mesh)}"
        alone.append(numbers(model, rows, {}, f"{name}-alone"))
        cases.append((model, rows, mesh, name))
    found = run_each(WORLD, numbers, cases)
    for one, (*_, mesh, _), ranks in zip(alone, cases, zip(*found, strict=True), strict=True):
        # In the first step one rank has a picture, and in the second none has.
        assert sorted(rank["pictures"][0] for rank in ranks) == [0, 1]
        assert sum(rank["pictures"][1] for rank in ranks) == 0
        for number, rank in enumerate(ranks):
            for got, expected in zip(rank["figures"], one["figures"], strict=True):
                assert got[0] == pytest.approx(expected[0], rel=1e-6), mesh
                assert got[1] == pytest.approx(expected[1], rel=1e-5), mesh
            assert rank["gradients"].keys() == one["gradients"].keys()
            for name, whole in one["gradients"].items():
                here = rank["gradients"][name]
                is_shard = here.shape != whole.shape
                expected = np.array_split(whole, WORLD)[number] if is_shard else whole
                error = abs(here - expected).max()
                assert error <= 1e-6 * max(abs(expected).max(), 1e-3), (name, mesh)
