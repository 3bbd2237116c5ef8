"""`tunesmith selfcheck` fails on builds that train wrongly: each is a change of the engine, made
inside every rank. Three of the most dangerous ones are tested with every change.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Set
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from errors import holds
from ranks import run_ranks
from tunesmith import build_model
from tunesmith.data.batches.loader import GlobalBatch
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import TunesmithError
from tunesmith.formats.nf4 import Nf4
from tunesmith.methods.base import TrainModel
from tunesmith.methods.sft import SupervisedFineTuning
from tunesmith.optim import optimizer
from tunesmith.parallel.copies import GradientSum
from tunesmith.parallel.mesh import MeshShape
from tunesmith.stages import agree
from tunesmith.tools.bench import selfcheck
from tunesmith.tools.bench.selfcheck import (
    CHANGED_CHECK,
    COPIES_CHECK,
    LOSS_CHECK,
    NORM_CHECK,
    ONE,
    RESUME_CHECK,
    SelfCheck,
)
from tunesmith.training import session, trainer
from tunesmith.training.checkpoint_saver import CheckpointSaver

pytestmark = pytest.mark.long


def rank() -> int:
    return int(os.environ["RANK"])


def exchanged(part: Tensor) -> Tensor:
    """The part of the other one of two ranks."""
    parts = [torch.empty_like(part) for _ in range(2)]
    dist.all_gather(parts, part.contiguous())
    return parts[1 - rank()]


# ---- of any training ----


def leave_an_adapter_out_of_the_optimizer() -> None:
    original = TrainModel.trained_parameters
    TrainModel.trained_parameters = lambda self: (
        p for p in original(self) if "0.mlp.up_proj.lora_B" not in p[0]
    )


def install_another_torch_on_a_rank() -> None:
    versions = agree.installed_versions()
    agree.installed_versions = lambda: versions | {"torch": versions["torch"] + ".1" * rank()}


# ---- of copies ----


def divide_by_the_ranks_own_tokens() -> None:
    def denominator(self, batch):
        return (
            sum(m.supervised for m in batch.micro)
            if isinstance(batch, GlobalBatch)
            else batch.supervised
        )

    SupervisedFineTuning.denominator = denominator


def keep_gradients_to_oneself() -> None:
    GradientSum.finish = lambda self, gradients: None


def sum_the_gradients_of_every_micro_batch() -> None:
    GradientSum.is_last_backward = property(lambda self: True, lambda self, value: None)


# ---- of shards ----


def average_over_shards() -> None:
    original = FSDPModule.set_gradient_divide_factor
    FSDPModule.set_gradient_divide_factor = lambda self, factor: original(self, 2.0)


def swap_moments_at_resume() -> None:
    original = session.read_sharded_optimizer

    def read(optimizer, *where):
        original(optimizer, *where)
        for part in optimizer.parts.values():
            part.state["exp_avg"].copy_(exchanged(part.state["exp_avg"]))

    session.read_sharded_optimizer = read


def forget_moments_at_resume() -> None:
    session.read_sharded_optimizer = lambda optimizer, *where: None


# ---- of tensor groups ----


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


def read_another_ranks_moments() -> None:
    original = optimizer.local_slices

    def local_slices(like):
        cuts, shape = original(like), like.shape
        return tuple(
            cut if cut == slice(0, n) else slice(n - cut.stop, n - cut.start)
            for cut, n in zip(cuts, shape, strict=True)
        )

    optimizer.local_slices = local_slices


def quantize_parts_by_themselves() -> None:
    """Their scales are then rounded with others: the loss is 4e-5 off."""

    original = Nf4.quantize

    def quantize(self, layer, dense):
        cut, layer.tensor_shard = layer.tensor_shard, None
        whole = dense if isinstance(dense, Tensor) else dense.read()
        original(self, layer, whole.chunk(cut.parts, cut.dim)[cut.part] if cut else whole)

    Nf4.quantize = quantize


COPY, SHARD, TENSOR = MeshShape(2, 1, 1), MeshShape(1, 2, 1), MeshShape(1, 1, 2)
BROKEN: list[tuple[Callable[[], None], str, MeshShape, set[str]]] = [  # the checks that must fail
    (leave_an_adapter_out_of_the_optimizer, "lora", COPY, {CHANGED_CHECK}),
    (divide_by_the_ranks_own_tokens, "lora", COPY, {LOSS_CHECK, NORM_CHECK}),
    (keep_gradients_to_oneself, "lora", COPY, {NORM_CHECK, COPIES_CHECK}),
    (sum_the_gradients_of_every_micro_batch, "full", COPY, {NORM_CHECK}),
    (average_over_shards, "full", SHARD, {NORM_CHECK}),
    (pair_query_heads_with_other_keys, "lora", TENSOR, {LOSS_CHECK, NORM_CHECK}),
    (leave_partial_gradients_unadded, "lora", TENSOR, {NORM_CHECK, COPIES_CHECK}),
    (read_another_ranks_moments, "lora", TENSOR, {RESUME_CHECK}),
    (quantize_parts_by_themselves, "nf4 lora", TENSOR, {LOSS_CHECK, NORM_CHECK}),
]


def check_one_mesh(kind: str, mesh: MeshShape, found: Set[str]) -> None:
    """Let `run_checks` train one kind on one mesh, for the checks in `found`.

    Without RESUME_CHECK in `found` the two steps before it are taken; files are written and read only if
    RESUME_CHECK or CHANGED_CHECK, which need them, are in `found`.
    """
    selfcheck.TRAINING_KINDS = {kind: selfcheck.TRAINING_KINDS[kind]}
    selfcheck.meshes_of = lambda world, node: [mesh]
    if kind != "nf4 lora":  # bitsandbytes loads a compiler, in every rank
        selfcheck.check_nf4 = lambda device: None
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
    kind: str,
    mesh: MeshShape,
    change: Callable[[], None],
    found: Set[str] = frozenset({RESUME_CHECK, CHANGED_CHECK}),
) -> dict[str, Any]:
    """The rows that fail on a mesh in a build with `change`, by check."""
    check_one_mesh(kind, mesh, found)
    change()
    report = selfcheck.run_checks(lambda row: None)
    return {
        row["check"].rpartition(": ")[2]: row for row in report["checks"] if row["passed"] is False
    }


EVERY_CHANGE = (divide_by_the_ranks_own_tokens, keep_gradients_to_oneself, leave_an_adapter_out_of_the_optimizer)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "kind", "mesh", "found"),
    [
        pytest.param(
            *case,
            id=case[0].__name__,
            marks=pytest.mark.slow if case[0] in EVERY_CHANGE else pytest.mark.nightly,
        )
        for case in BROKEN
    ],
)
def test_a_broken_build_fails(change, kind, mesh, found):
    for failed in run_ranks(mesh.world, failed_checks, kind, mesh, change, found):
        assert found <= failed.keys(), failed


def nothing() -> None:
    """The build as it is."""


def passed_resumes(*changes: Callable[[], None]) -> list[bool]:
    """Whether a run on shards passes the check of its resume in a build with each of `changes`."""
    check_one_mesh("full", SHARD, {RESUME_CHECK})
    check_resume, read = SelfCheck.check_resume, session.read_sharded_optimizer

    def check_each(self: SelfCheck, *given: Any) -> None:
        for change in changes:
            session.read_sharded_optimizer = read
            change()
            check_resume(self, *given)

    SelfCheck.check_resume = check_each
    report = selfcheck.run_checks(lambda row: None)
    return [row["passed"] for row in report["checks"] if row["check"].endswith(RESUME_CHECK)]


@pytest.mark.nightly
def test_a_build_that_resumes_wrongly_fails():
    """One run, of which each build takes the last steps again."""
    changes = [nothing, swap_moments_at_resume, forget_moments_at_resume]
    for passed in run_ranks(2, passed_resumes, *changes):
        assert passed == [True, False, False]


def raised(kind: str, mesh: MeshShape, change: Callable[[], None]) -> tuple[str, str]:
    """The error that ends this rank: its class and text."""
    try:
        failed_checks(kind, mesh, change)
    except TunesmithError as error:
        return type(error).__name__, error.text()
    return "", ""


@pytest.mark.nightly
def test_ranks_with_other_software_are_refused() -> None:
    found = run_ranks(2, raised, "lora", COPY, install_another_torch_on_a_rank)
    [text] = [text for name, text in found if name == "MachineError"]
    assert holds(text, "torch")
