"""`benchmarks/parity/selfcheck.py` fails on builds that train wrongly: each is a change of the
engine, made inside every rank. Three of the most dangerous ones are tested with every change.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Set
from typing import Any

import pytest
import selfcheck
import torch
import torch.distributed as dist
from selfcheck import (
    CHANGED_CHECK,
    COPIES_CHECK,
    LOSS_CHECK,
    NORM_CHECK,
    ONE,
    RESUME_CHECK,
    TRAINING_KINDS,
    SelfCheck,
    meshes_of,
)
from torch import Tensor

from ranks import run_ranks
from tunesmith import build_model
from tunesmith.batches.loader import GlobalBatch
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.methods.sft import SupervisedFineTuning
from tunesmith.parallel.copies import GradientSum
from tunesmith.parallel.mesh import MeshShape
from tunesmith.start import session
from tunesmith.train_model import TrainModel
from tunesmith.training import trainer
from tunesmith.training.checkpoint_saver import CheckpointSaver

pytestmark = pytest.mark.long


def rank() -> int:
    return int(os.environ["RANK"])


def exchanged(part: Tensor) -> Tensor:
    """The part of the other one of two ranks."""
    parts = [torch.empty_like(part) for _ in range(2)]
    dist.all_gather(parts, part.contiguous())
    return parts[1 - rank()]


def leave_an_adapter_out_of_the_optimizer() -> None:
    original = TrainModel.trained_parameters
    TrainModel.trained_parameters = lambda self: (
        p for p in original(self) if "0.mlp.up_proj.lora_B" not in p[0]
    )


def divide_by_the_ranks_own_tokens() -> None:
    def denominator(self, batch):
        parts = batch.micro if isinstance(batch, GlobalBatch) else [batch]
        return sum(part.supervised for part in parts)

    SupervisedFineTuning.denominator = denominator


def keep_gradients_to_oneself() -> None:
    GradientSum.finish = lambda self, gradients: None


def swap_moments_at_resume() -> None:
    original = session.read_sharded_optimizer

    def read(optimizer, *where):
        original(optimizer, *where)
        for part in optimizer.parts.values():
            part.state["exp_avg"].copy_(exchanged(part.state["exp_avg"]))

    session.read_sharded_optimizer = read


def pair_query_heads_with_other_keys() -> None:
    original = build_model.fill_parameters

    def fill(run, files, model, *where, **options):
        original(run, files, model, *where, **options)
        if dist.is_initialized():
            for name, parameter in model.named_parameters():
                if name.endswith("q_proj.weight"):
                    local = local_part(parameter).detach()
                    local.copy_(exchanged(local))

    build_model.fill_parameters = fill


def leave_partial_gradients_unadded() -> None:
    trainer.reduce_gradients = lambda grads, partial, mesh: None


COPY, SHARD, TENSOR = MeshShape(2, 1, 1), MeshShape(1, 2, 1), MeshShape(1, 1, 2)
BROKEN: list[tuple[Callable[[], None], str, MeshShape, set[str]]] = [  # the checks that must fail
    (leave_an_adapter_out_of_the_optimizer, "lora", COPY, {CHANGED_CHECK}),
    (divide_by_the_ranks_own_tokens, "lora", COPY, {LOSS_CHECK, NORM_CHECK}),
    (keep_gradients_to_oneself, "lora", COPY, {NORM_CHECK, COPIES_CHECK}),
    (swap_moments_at_resume, "full", SHARD, {RESUME_CHECK}),
    (pair_query_heads_with_other_keys, "lora", TENSOR, {LOSS_CHECK, NORM_CHECK}),
    (leave_partial_gradients_unadded, "lora", TENSOR, {NORM_CHECK, COPIES_CHECK}),
]


def check_one_mesh(kind: str, mesh: MeshShape, found: Set[str]) -> None:
    """Let `run_checks` train one kind on one mesh, with the files that the checks in `found` need."""
    selfcheck.TRAINING_KINDS = {kind: selfcheck.TRAINING_KINDS[kind]}
    selfcheck.meshes_of = lambda world, node: [mesh]
    selfcheck.check_nf4 = lambda device: None  # bitsandbytes loads a compiler, in every rank
    check_mesh = SelfCheck.check_mesh
    SelfCheck.check_mesh = lambda self, kind, shape, *more: (
        shape == ONE or check_mesh(self, kind, shape, *more)
    )
    if RESUME_CHECK not in found:
        selfcheck.STEPS = 2
        SelfCheck.check_resume = lambda self, *more: None
        CheckpointSaver.save = lambda self, **more: None
    if CHANGED_CHECK not in found:
        SelfCheck.count_changed = lambda self, run: (0, 0)
        CheckpointSaver.write_final = lambda self, step: None


def failed_checks(
    kind: str, mesh: MeshShape, change: Callable[[], None], found: Set[str]
) -> dict[str, Any]:
    """The rows that fail on a mesh in a build with `change`, by check."""
    check_one_mesh(kind, mesh, found)
    change()
    rows = selfcheck.run_checks(lambda row: None)
    return {row["check"].rpartition(": ")[2]: row for row in rows if row["passed"] is False}


EVERY_CHANGE = (divide_by_the_ranks_own_tokens, keep_gradients_to_oneself, leave_an_adapter_out_of_the_optimizer)  # fmt: skip


def in_its_lane(case: tuple[Any, ...]) -> Any:
    mark = pytest.mark.slow if case[0] in EVERY_CHANGE else pytest.mark.nightly
    return pytest.param(*case, id=case[0].__name__, marks=mark)


@pytest.mark.parametrize(("change", "kind", "mesh", "found"), map(in_its_lane, BROKEN))
def test_a_broken_build_fails(change, kind, mesh, found):
    for failed in run_ranks(mesh.world, failed_checks, kind, mesh, change, found):
        assert found <= failed.keys(), failed


@pytest.mark.slow
@pytest.mark.nightly
def test_two_ranks_pass_on_each_mesh():
    for rows in run_ranks(2, selfcheck.run_checks, print):
        assert [row for row in rows if not row["passed"]] == []
        checked = {row["check"].rpartition(": ")[0] for row in rows}
        meshes = [mesh.describe() for mesh in (ONE, COPY, SHARD, TENSOR)]
        assert checked == {f"{kind}, {mesh}" for kind in TRAINING_KINDS for mesh in meshes}


@pytest.mark.parametrize(
    ("world", "node", "expected"),
    [
        (3, 3, [(3, 1, 1), (1, 3, 1)]),
        (4, 4, [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]),
        (2, 1, [(2, 1, 1), (1, 2, 1)]),  # no tensor group over nodes
        (16, 8, [(16, 1, 1), (2, 8, 1), (1, 16, 1), (2, 1, 8), (2, 2, 4), (1, 2, 8)]),
    ],
)
def test_it_takes_a_mesh_of_each_kind(world, node, expected):
    assert [shape[:3] for shape in meshes_of(world, node)] == expected
