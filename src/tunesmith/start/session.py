"""The last stage of a start: load the model, and create the session of the training."""

import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from tunesmith.batches.batch import Batch
from tunesmith.batches.loader import Loader
from tunesmith.build_model import build_model, fill_parameters
from tunesmith.checkpoint.contents import read_optimizer
from tunesmith.checkpoint.resume import Progress, Start
from tunesmith.checkpoint.sharded import is_sharded, read_sharded_optimizer
from tunesmith.config.schema import Run
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import ModelError
from tunesmith.formats.scaled_matmul import SCALING_RECIPES
from tunesmith.methods import make_method
from tunesmith.metrics import hardware
from tunesmith.model.known.dtypes import DTYPES
from tunesmith.optim.optimizer import Optimizer
from tunesmith.optim.weight_gradients import fp32_gradients
from tunesmith.parallel.mesh import Mesh
from tunesmith.planning.compare_eight_bit import (
    LOSS_PROBE_TOKENS,
    MAX_LOSS_CHANGE,
    choose_sums,
    compare_with_bf16,
)
from tunesmith.planning.run_plan import RunPlan
from tunesmith.runtime.host import keep_threads
from tunesmith.start.lines import loss_change_text, sums_line
from tunesmith.start.plan import PlanFacts
from tunesmith.train_model import Method, TrainModel
from tunesmith.training.reference import BaseReference
from tunesmith.training.session import Session, check_one_micro_batch, make_loader
from tunesmith.units import count_of

log = logging.getLogger(__name__)


LOSS_SCALE = 2.0**16


def open_session(facts: PlanFacts, ranks: Ranks = ONE_PROCESS) -> Session:
    """Load the model and the optimizer, and restore a checkpoint. This is a collective call."""
    run = facts.run
    data = facts.data
    plan = facts.plan
    device = facts.machine.device
    mesh = Mesh.of(plan.mesh, device.type)
    method = make_method(run.method)
    root, plan = load_model(facts, method, mesh, ranks)
    fault = method.find_model_fault(root)
    if fault is not None:
        raise fault
    if plan.base in SCALING_RECIPES:
        plan = compare_eight_bits(root, plan, mesh, facts, ranks)
    optimizer = make_optimizer(run, root, facts.start, ranks)
    progress = facts.start.progress or Progress()
    if device.type == "cpu":
        plan = replace(plan, why={**plan.why, "threads": keep_threads(progress.threads)})
    session = Session(
        recipe=facts.machine.recipe,
        run=run,
        files=facts.files,
        data=data,
        model=root,
        optimizer=optimizer,
        plan=plan,
        total_steps=data.schedule.steps(run.train.duration),
        hashes=facts.hashes,
        peak=hardware.find_peak(device, DTYPES[run.model.dtype]),
        ranks=ranks,
        mesh=mesh,
    )
    is_over = session.total_steps is not None and progress.step >= session.total_steps
    if not is_over and run.train.optimizer_in_backward:
        check_one_micro_batch(run, session.loader(progress.step).batch(progress.step))
    return session


def load_model(
    facts: PlanFacts, method: Method, mesh: Mesh, ranks: Ranks
) -> tuple[TrainModel, RunPlan]:
    """Load the weights into the model, which is on the meta device. If there is a checkpoint, load
    the trained weights from it.

    Returns the model and the plan. On a GPU, a memory trial may have changed the plan.
    """
    run = facts.run
    files = facts.files
    data = facts.data
    plan = facts.plan
    checkpoint = facts.start.checkpoint
    is_full = run.adapter.kind == "none"
    base_weights: Path | Literal["random"] | None = checkpoint if is_full else None
    if facts.machine.request.weights == "random":
        base_weights = "random"
    loader = make_loader(data, files, plan)
    largest = method.largest_batch(run, loader).to(torch.device(plan.device))
    reference = None
    if is_full and run.uses_reference:
        reference = BaseReference(run, data, facts.hashes["model_hash"], ranks)
        if not reference.is_complete and facts.machine.request.weights == "stored":
            # The reference log-probabilities are measured with the base's weights, so load these
            # first. The checkpoint's weights are loaded after the measurement.
            base_weights = None
    root, plan = build_model(
        run,
        files,
        plan,
        method=method,
        model=facts.model,
        weights=base_weights,
        adapter=None if is_full else checkpoint,
        probe=largest,
        mesh=mesh,
        ranks=ranks,
    )
    if reference is not None and not reference.is_complete:
        with make_loader(data, files, plan, mesh=mesh) as loader:
            reference.measure(root, loader, mesh)
        if checkpoint is not None:
            fill_parameters(run, files, root.model, checkpoint, ranks)
    return root, plan


def compare_eight_bits(
    root: TrainModel, plan: RunPlan, mesh: Mesh, facts: PlanFacts, ranks: Ranks
) -> RunPlan:
    """Check how much the rounding to 8 bits changes the loss of the base. Use fast accumulation if
    it hardly changes the loss.

    Return the plan with the measured losses. Raise ModelError if 8-bit rounding changes the loss
    too much.
    """
    device = torch.device(plan.device)
    loader = make_loader(facts.data, facts.files, plan)
    batches = first_batches(loader, device, LOSS_PROBE_TOKENS)
    if device.type == "cuda":
        log.info(sums_line(plan.base, choose_sums(root, batches, ranks)))
    # Random weights are not read from a file, so there are no dense weights to compare with.
    if facts.machine.request.weights == "random":
        return plan
    change = compare_with_bf16(root, batches, mesh, ranks)
    with ranks.raise_on_all_ranks():
        if not change.is_tolerable and ranks.is_main_process:
            raise ModelError(
                f"quantization to {plan.base} changes the base model too much: the "
                f"{loss_change_text(change)}, and the limit is {MAX_LOSS_CHANGE:.0%}",
                where="model.quantize",
                fix="set model.quantize=none",
            )
    change_text = f"{count_of(change.layers, 'layer')}: {loss_change_text(change)}"
    return replace(plan, why={**plan.why, "base": f"{plan.why['base']}; {change_text}"})


def first_batches(loader: Loader, device: torch.device, tokens: int) -> list[Batch]:
    """Return the first micro batches with at least `tokens` tokens in total, on the device.

    The batches begin with the first step. Within a step they are in the order of
    `Loader.largest_first`. If the data has fewer tokens, it is repeated.
    """
    batches = []
    for step in itertools.count():
        for batch in loader.largest_first(step):
            batches.append(batch.to(device))
            if sum(batch.tokens for batch in batches) >= tokens:
                return batches
    raise AssertionError("unreachable: epochs repeat")


def make_optimizer(run: Run, model: TrainModel, start: Start, ranks: Ranks) -> Optimizer:
    """Create the optimizer for all trained parameters. If there is a checkpoint, load its optimizer
    state.
    """
    first_scale = LOSS_SCALE if run.model.dtype == "fp16" else None
    optimizer = Optimizer(model.trained_parameters(), run.train, loss_scale=first_scale)
    optimizer.use_fp32_gradients(fp32_gradients(model.model))
    folder = start.checkpoint
    saved = start.progress
    if not folder or not saved:
        return optimizer
    if is_sharded(folder):
        read_sharded_optimizer(optimizer, folder, saved, ranks)
        return optimizer
    with read_optimizer(folder) as tensors:
        optimizer.load_state_dict(
            tensors,
            scale=saved.loss_scale,
            growth_tracker=saved.good_steps,
            where=str(folder),
        )
    return optimizer
