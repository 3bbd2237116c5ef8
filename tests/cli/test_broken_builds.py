"""`tunesmith selfcheck` fails on builds that train wrongly: each is a change of the engine, made
inside every rank.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from errors import holds
from ranks import environment_of, forkserver, free_port, run_ranks
from tunesmith import build_model
from tunesmith.data.batches.loader import GlobalBatch
from tunesmith.data.batches.schedule import BatchSchedule
from tunesmith.distributed import row_exchange
from tunesmith.distributed.ranks import HEARTBEAT_VARIABLE
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import OtherRankError, TunesmithError
from tunesmith.formats.nf4 import Nf4
from tunesmith.methods.base import TrainModel
from tunesmith.methods.sft import SupervisedFineTuning
from tunesmith.model.fused import FusedNorm
from tunesmith.optim import optimizer
from tunesmith.optim.adamw import ParameterState
from tunesmith.parallel import tensor
from tunesmith.parallel.copies import GradientSum
from tunesmith.parallel.mesh import MeshShape
from tunesmith.stages import agree
from tunesmith.stages import plan as plan_stage
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

pytestmark = [pytest.mark.slow, pytest.mark.long]


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


def give_a_rank_another_base() -> None:
    original = build_model.fill_parameters

    def fill(run, files, model, *where, **options):
        original(run, files, model, *where, **options)
        with torch.no_grad():
            local_part(model.get_parameter("model.layers.0.mlp.up_proj.weight")).add_(0.01 * rank())

    build_model.fill_parameters = fill


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


def shuffle_by_rank() -> None:
    original = BatchSchedule.examples
    BatchSchedule.examples = lambda self, step: original(self, step + rank() % 2)


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


def forget_the_number_of_updates_at_resume() -> None:
    original = session.read_sharded_optimizer

    def read(optimizer, *where):
        original(optimizer, *where)
        for part in optimizer.parts.values():
            part.state["step"].zero_()

    session.read_sharded_optimizer = read


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


def leave_outputs_of_row_parallel_layers_unadded() -> None:
    original = row_exchange._exchange
    row_exchange._exchange = lambda x, group, gather: (
        original(x, group, gather) if gather else x.chunk(2)[group.rank]
    )


def leave_partial_gradients_unadded() -> None:
    trainer.reduce_gradients = lambda grads, partial, mesh: None


def forget_that_norms_have_partial_gradients() -> None:
    original = tensor._ModelSharder.replicate_module

    def replicate_module(self, module):
        original(self, module)
        if isinstance(module, FusedNorm):
            self.partial.discard(module.weight)

    tensor._ModelSharder.replicate_module = replicate_module


def count_whole_parameters_once_a_rank() -> None:
    original = ParameterState.of

    def of(name, param, train):
        part = original(name, param, train)
        if hasattr(param, "device_mesh"):
            part.sharding_groups = (param.device_mesh.get_group(0),)
        return part

    ParameterState.of = of


def begin_the_vocabulary_one_token_late() -> None:
    original = tensor._ModelSharder.shard_vocabulary

    def shard_vocabulary(self, embedding, head):
        original(self, embedding, head)
        embedding.first += self.group.rank

    tensor._ModelSharder.shard_vocabulary = shard_vocabulary


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
    (give_a_rank_another_base, "lora", COPY, {LOSS_CHECK, NORM_CHECK}),
    (divide_by_the_ranks_own_tokens, "lora", COPY, {LOSS_CHECK, NORM_CHECK}),
    (shuffle_by_rank, "lora", COPY, {LOSS_CHECK, NORM_CHECK}),
    (keep_gradients_to_oneself, "lora", COPY, {NORM_CHECK, COPIES_CHECK}),
    (sum_the_gradients_of_every_micro_batch, "full", COPY, {NORM_CHECK}),
    (average_over_shards, "full", SHARD, {NORM_CHECK}),
    (pair_query_heads_with_other_keys, "lora", TENSOR, {LOSS_CHECK, NORM_CHECK}),
    (leave_outputs_of_row_parallel_layers_unadded, "lora", TENSOR, {LOSS_CHECK, NORM_CHECK}),
    (leave_partial_gradients_unadded, "lora", TENSOR, {NORM_CHECK, COPIES_CHECK}),
    (forget_that_norms_have_partial_gradients, "full", TENSOR, {NORM_CHECK, COPIES_CHECK}),
    (count_whole_parameters_once_a_rank, "lora", TENSOR, {NORM_CHECK}),
    (begin_the_vocabulary_one_token_late, "full", TENSOR, {LOSS_CHECK, NORM_CHECK}),
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


@pytest.mark.parametrize(
    ("change", "kind", "mesh", "found"), BROKEN, ids=[case[0].__name__ for case in BROKEN]
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


def test_a_build_that_resumes_wrongly_fails():
    """One run, of which each build takes the last steps again."""
    changes = [
        nothing,
        swap_moments_at_resume,
        forget_moments_at_resume,
        forget_the_number_of_updates_at_resume,
    ]
    for passed in run_ranks(2, passed_resumes, *changes):
        assert passed == [True, False, False, False]


def give_a_rank_another_model_file() -> None:
    original = plan_stage.weights_digest
    plan_stage.weights_digest = lambda folder: original(folder)[rank() :]


def cut_keys_by_columns() -> None:
    original = tensor._ModelSharder.shard_linear

    def shard_linear(self, layer, dim):
        original(self, layer, tensor.COLUMNS if layer.out_features == 256 else dim)  # k and v

    tensor._ModelSharder.shard_linear = shard_linear


def fail_on_rank_1() -> None:
    original = trainer.Trainer.train_step

    def train_step(self, batch):
        if dist.is_initialized() and rank() == 1 and batch.step == 1:
            raise ValueError("a kernel failed")
        return original(self, batch)

    trainer.Trainer.train_step = train_step


def raised(kind: str, mesh: MeshShape, change: Callable[[], None]) -> tuple[str, str]:
    """The error that ends this rank: its class and text."""
    try:
        failed_checks(kind, mesh, change)
    except TunesmithError as error:
        return type(error).__name__, error.text()
    return "", ""


def test_ranks_with_other_software_are_refused() -> None:
    found = run_ranks(2, raised, "lora", COPY, install_another_torch_on_a_rank)
    [text] = [text for name, text in found if name == "MachineError"]
    assert holds(text, "torch")


@pytest.mark.parametrize(
    ("change", "mesh", "words"),
    [
        (cut_keys_by_columns, TENSOR, "RuntimeError: "),
        (fail_on_rank_1, COPY, "ValueError: a kernel failed"),
        (
            give_a_rank_another_model_file,
            COPY,
            "the weights of model.name changed since this run started",
        ),
    ],
)
def test_an_error_of_a_mesh_is_told_once_and_names_it(change, mesh, words):
    found = run_ranks(2, raised, "lora", mesh, change)
    told = [text for name, text in found if name == "RunError"]
    assert [name for name, _ in found].count("OtherRankError") == 2 - len(told)
    assert told
    assert all(f"error: lora, {mesh.describe()}: {words}" in text for text in told)


def stop_on_rank_1() -> None:
    original = trainer.Trainer.train_step

    def train_step(self, batch):
        if dist.is_initialized() and rank() == 1 and batch.step == 1:
            time.sleep(1000)
        return original(self, batch)

    trainer.Trainer.train_step = train_step


def hang(env: dict[str, str], folder: Path) -> None:
    """A rank of a build that hangs; what it prints goes to a file."""
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.stderr = (folder / f"stderr-{env['RANK']}").open("w")
    selfcheck.STUCK_SECONDS = 8.0  # five times what a mesh takes between two signs of progress
    try:
        failed_checks("lora", COPY, stop_on_rank_1, set())
    except OtherRankError as error:  # where the other's end breaks the connection first
        raise SystemExit(error.exit_code) from None


def test_a_rank_that_hangs_ends_all_with_one_message(tmp_path):
    context, port = forkserver(), free_port()
    envs = [environment_of(r, 2, port) | {HEARTBEAT_VARIABLE: "3"} for r in range(2)]
    ranks = [context.Process(target=hang, args=(env, tmp_path)) for env in envs]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(150)
        assert [process.exitcode for process in ranks] == [1, 1]
    finally:
        for process in ranks:
            process.kill()
    said = "".join(path.read_text() for path in sorted(tmp_path.glob("stderr-*")))
    assert said.count("error: ") == 1
    assert re.search(r"error: rank 1 on .* (8|9|1\d) s", said)
    assert f"rank 1: lora, {COPY.describe()}: training, step 1" in said
