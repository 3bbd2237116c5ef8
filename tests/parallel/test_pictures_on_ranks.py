"""Ranks train on rows with pictures as one process does, also where one of them has none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from picture_runs import FAMILIES, picture_run, write_mixed, write_vision_model
from ranks import free_port, gathered, run_ranks, world_of
from tunesmith.parallel import copies
from tunesmith.training import trainer
from tunesmith.training.run import train

pytestmark = [pytest.mark.slow, pytest.mark.long]

# Two examples a step: on one of them a picture, on none, on both.
ORDER = "PTTTPP"
STEPS = 3
# An adapter alone, and a projector in a model that is trained in full.
TRAINED: dict[str, dict[str, Any]] = {
    FAMILIES[0]: {},
    FAMILIES[1]: {"adapter": {"kind": "none"}, "model": {"train_projector": True}},
}


def numbers(model: Path, rows: Path, parallel: dict[str, int], out: str) -> dict[str, Any]:
    """Loss and gradient norm of each step, the gradients of the first, and the pictures that this
    rank has seen in each.
    """
    run = picture_run(
        model,
        rows,
        data={"shuffle": False},
        train={
            "duration": f"{STEPS} steps",
            "global_batch": "2 examples",
            "micro_batch": "1 examples",
        },
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


def numbers_of_all(cases: list[tuple[Any, ...]], ports: list[int]) -> list[dict[str, Any]]:
    """Of several recipes, one after the other in the same processes."""
    found = []
    for case, port in zip(cases, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        found.append(numbers(*case))
    return found


def assert_those_of_one_process(world: int, meshes: list[dict[str, int]], folder: Path) -> None:
    models = {family: write_vision_model(folder / family, family) for family in FAMILIES}
    rows = write_mixed(folder, len(ORDER), ORDER)
    alone = {family: numbers(model, rows, {}, f"{family}-1") for family, model in models.items()}
    cases = [
        (model, rows, mesh, f"{family}-{'-'.join(mesh)}")
        for family, model in models.items()
        for mesh in meshes
    ]
    assert all(world_of(mesh) == world for mesh in meshes)
    found = run_ranks(world, numbers_of_all, cases, [free_port() for _ in cases])
    for (model, _, mesh, _), ranks in zip(cases, zip(*found, strict=True), strict=True):
        one = alone[model.name]
        # In the first step one rank has a picture, and the others have none.
        assert sorted(rank["pictures"][0] for rank in ranks) == [*[0] * (world - 1), 1]
        assert sum(rank["pictures"][1] for rank in ranks) == 0
        for number, rank in enumerate(ranks):
            for (loss, norm), (expected_loss, expected_norm) in zip(
                rank["figures"], one["figures"], strict=True
            ):
                assert loss == pytest.approx(expected_loss, rel=1e-6), mesh
                assert norm == pytest.approx(expected_norm, rel=1e-5), mesh
            assert rank["gradients"].keys() == one["gradients"].keys()
            for name, whole in one["gradients"].items():
                here = rank["gradients"][name]
                is_shard = here.shape != whole.shape
                expected = np.array_split(whole, world)[number] if is_shard else whole
                error = abs(here - expected).max()
                assert error <= 1e-6 * max(abs(expected).max(), 1e-3), (name, mesh)


@pytest.mark.parametrize("world", [2])
def test_a_rank_without_pictures_gives_the_numbers_of_one_process(
    world: int, tmp_path: Path
) -> None:
    assert_those_of_one_process(world, [{"replicate": world}, {"shard": world}], tmp_path)
