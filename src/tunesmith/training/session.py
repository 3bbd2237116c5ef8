"""The last stage of a start: create a Session, which holds all objects that a training needs."""

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tunesmith.batches.batch import Batch
from tunesmith.batches.loader import GlobalBatch, Loader
from tunesmith.build_model import build_model, fill_parameters
from tunesmith.checkpoint.contents import read_optimizer
from tunesmith.checkpoint.resume import Progress, Start
from tunesmith.checkpoint.sharded import is_sharded, read_sharded_optimizer
from tunesmith.config.dump import digest, dump
from tunesmith.config.schema import REFERENCE_METHODS, Run
from tunesmith.config.trust import mark_own_run
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import ModelError, UsageError
from tunesmith.formats.scaled_matmul import SCALING_RECIPES
from tunesmith.host.chips import Peak
from tunesmith.host.files import write_atomically
from tunesmith.hub.model_files import ModelFiles
from tunesmith.methods import METHODS
from tunesmith.methods.base import TrainModel
from tunesmith.metrics import hardware
from tunesmith.model.arch.spec import attention_weight, flops
from tunesmith.model.known.dtypes import DTYPES
from tunesmith.optim.optimizer import Optimizer
from tunesmith.optim.weight_gradients import fp32_gradients
from tunesmith.parallel.mesh import ALONE, Mesh
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning.compare_eight_bit import (
    LOSS_PROBE_TOKENS,
    MAX_LOSS_CHANGE,
    choose_sums,
    compare_with_bf16,
)
from tunesmith.planning.measured_layers import count_active_adapter, count_adapter
from tunesmith.planning.run_plan import RunPlan
from tunesmith.presentation.data import contract_lines
from tunesmith.run_dir import HELD_OUT, IDENTITY, RECIPE
from tunesmith.runtime.host import keep_threads
from tunesmith.runtime.transfer import DevicePrefetcher
from tunesmith.start.lines import loss_change_text, sums_line
from tunesmith.start.plan import PlanFacts
from tunesmith.start.prepare import TrainingData
from tunesmith.training.answer_groups import largest_answer_batch
from tunesmith.training.reference import BaseReference
from tunesmith.training.stop_control import StopControl
from tunesmith.units import count_of

if TYPE_CHECKING:
    from tunesmith.training.rollouts import RewardedSampling

log = logging.getLogger(__name__)

# Maximum number of rows whose first words are in held-out.txt. The number is limited, because each
# of these rows must be read from its data file.
QUOTED_ROWS = 1000

LOSS_SCALE = 2.0**16


@dataclass
class Session:
    """The objects that a running training needs, such as the model, the data, the plan and the
    optimizer.
    """

    recipe: Run  # the recipe that config.yaml stores
    run: Run  # the recipe for training, adapted to the model and the machine
    files: ModelFiles  # files of the base model and of its tokenizer
    data: TrainingData
    model: TrainModel
    optimizer: Optimizer
    plan: RunPlan  # choices for this machine, with the reason of each
    total_steps: int | None  # optimizer steps of the whole run, or None if a time limit ends it
    hashes: Mapping[str, Any]  # hashes of base and data, named as in `Progress`
    peak: Peak  # peak FLOP/s of one rank, the reference for MFU
    ranks: Ranks = ONE_PROCESS
    mesh: Mesh = ALONE  # how the ranks divide the work

    @property
    def device(self) -> torch.device:
        return torch.device(self.plan.device)

    def flops(self, examples: Sequence[int], supervised: int) -> float:
        """Compute the floating-point operations of a step on these examples.

        Args:
            supervised: number of positions with a label.
        """
        run = self.run
        tokens = self.data.train
        spec = self.files.spec
        count = partial(flops, spec, trained="full", forwards=run.extra_forwards)
        if run.adapter.kind == "lora":
            adapter = sum(p.numel() for p in self.optimizer.params.values())
            # Do not count the projector, because text tokens do not pass through it.
            if run.model.train_projector:
                adapter -= spec.projector_parameters
            # Count only the adapters of the experts that a token uses.
            adapter -= count_adapter(spec, run.adapter)
            adapter += count_active_adapter(spec, run.adapter)
            count = partial(count, trained="lora", adapter_parameters=adapter)
        indices = list(examples)
        document_flops = count(tokens.document_lengths(examples), supervised)
        # If the two sequences of a pair share tokens, these tokens are computed only once, so
        # subtract them.
        shared_flops = count(tokens.shared[indices], 0)
        picture_tokens = int(tokens.picture_tokens[indices].sum())
        return document_flops - shared_flops + spec.picture_flops * picture_tokens

    def memory_gib(self) -> float:
        """Return the peak memory since the run was started or resumed, in GiB.

        At its end, the memory trial resets the allocator's statistics, so the peak of the trial is
        taken from the plan.
        """
        return max(hardware.memory_gib(self.device), self.plan.trial_peak / 2**30)

    def batches(
        self, start_step: int, stop: StopControl, ends: Callable[[], bool]
    ) -> AbstractContextManager[Iterable[GlobalBatch]]:
        """Return the global batches that training uses: of the rows, or of sampled answers.

        Args:
            stop, ends: see `Rollouts`.
        """
        loader = self.loader(start_step)
        if not self.model.method.samples_answers:
            return loader
        from tunesmith.training.rollouts import Rollouts

        return Rollouts(self, loader, stop, ends)

    @cached_property
    def sampling(self) -> "RewardedSampling":
        """Sampler of answers and their rewards, for reinforcement learning."""
        from tunesmith.training.rollouts import RewardedSampling

        return RewardedSampling(self)

    def loader(self, start_step: int) -> Loader:
        """Return a loader of global batches on the device that begins with step `start_step` (from
        0).
        """
        return make_loader(
            self.data, self.files, self.plan, start_step, self.total_steps, self.mesh
        )


def open_session(
    facts: PlanFacts,
    ranks: Ranks = ONE_PROCESS,
    make_mesh: Callable[[MeshShape, str], Mesh] = Mesh.of,
) -> Session:
    """Load the model, create the optimizer, and restore the checkpoint. This is a collective call.

    Args:
        make_mesh: function that creates the mesh of the ranks.
    """
    run = facts.run
    data = facts.data
    plan = facts.plan
    device = facts.machine.device
    mesh = make_mesh(plan.mesh, device.type)
    root, plan = load_model(facts, mesh, ranks)
    if root.method.samples_answers and not root.takes_slots:
        raise ModelError(
            "this model cannot be trained with grpo",
            where="method.name",
            why="its layers with chunked attention cannot continue answers",
            fix="use rejection sampling: tunesmith generate --samples --keep",
        )
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


def load_model(facts: PlanFacts, mesh: Mesh, ranks: Ranks) -> tuple[TrainModel, RunPlan]:
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
    if run.samples_answers:
        largest = largest_answer_batch(run, loader).to(torch.device(plan.device))
    else:
        # With a minimum of 1 token, `first_batches` returns only the largest micro batch of the
        # first step.
        [largest] = first_batches(loader, torch.device(plan.device), 1)
    reference = None
    if is_full and run.method.name in REFERENCE_METHODS:
        reference = BaseReference(run, data, facts.hashes["model_hash"], ranks)
        if not reference.is_complete and facts.machine.request.weights == "stored":
            # The reference log-probabilities are measured with the base's weights, so load these
            # first. The checkpoint's weights are loaded after the measurement.
            base_weights = None
    root, plan = build_model(
        run,
        files,
        plan,
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
                f"quantization to {plan.base} changes the base model's loss by more than "
                f"{MAX_LOSS_CHANGE:.0%}",
                where="model.quantize",
                why=f"the {loss_change_text(change)}",
                fix="set model.quantize=none",
            )
    change_text = f"{count_of(change.layers, 'layer')}: {loss_change_text(change)}"
    return replace(plan, why={**plan.why, "base": f"{plan.why['base']}; {change_text}"})


def make_loader(
    data: TrainingData,
    files: ModelFiles,
    plan: RunPlan,
    start: int = 0,
    stop: int | None = None,
    mesh: Mesh = ALONE,
) -> Loader:
    """Return a loader of global batches in the plan's layout, for steps `start` to `stop` - 1.

    The batches that the loader yields contain only this rank's part and are on the device.
    """
    device = torch.device(plan.device)
    layout = plan.layout.multiple_of(plan.mesh.tensor)
    trained: Literal["full", "lora"] = "full" if data.run.adapter.kind == "none" else "lora"
    return Loader(
        data.train,
        data.schedule,
        **vars(layout),
        pad_id=files.pad_id,
        start_step=start,
        stop_step=stop,
        share=(mesh.data_rank, mesh.shape.data),
        attention_weight=attention_weight(files.spec, trained=trained),
        mismatches=METHODS[data.run.method.name].needs_mismatched,
        # Do not load pictures ahead of time, because the pixels of a step may take gigabytes.
        ahead=0 if data.train.pictures is not None else Loader.ahead,
        prefetcher=DevicePrefetcher(device) if device.type == "cuda" else None,
    )


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


def check_one_micro_batch(run: Run, batch: GlobalBatch) -> None:
    """Raise UsageError if a step has several micro batches but `train.optimizer_in_backward` is
    set.

    With this option, the first backward already updates the weights, so the gradients of several
    micro batches cannot be accumulated.
    """
    key = "train.optimizer_in_backward"
    if run.train.optimizer_in_backward and len(batch.micro) > 1:
        raise UsageError(
            f"step {batch.step + 1} takes {len(batch.micro)} micro batches, but {key} requires one",
            where=key,
            why="each parameter is updated as soon as its gradient is computed, "
            "so gradients cannot be accumulated",
            fix=f"set a smaller train.global_batch, or {key}=false",
        )


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


def write_identity(session: Session, argv: list[str] | None) -> None:
    """Write env.json, config.yaml and held-out.txt, the list of held-out rows, into the run
    directory.

    env.json marks the folder as a run directory, and describes the machine, the data and the
    choices of the plan.
    """
    recipe = session.recipe
    out = Path(recipe.output_dir)
    data = session.data
    plan = session.plan
    choices = {
        part: {"taken": choice, "why": plan.why[part]} for part, choice in plan.choices.items()
    }
    # Store the number of threads that torch uses now. If the plan has a reason for this number,
    # store it too.
    why = plan.why.get("threads", "only the host's part runs on the CPU")
    choices["threads"] = {"taken": str(torch.get_num_threads()), "why": why}
    env = {
        **hardware.describe_machine(argv),
        "recipe_hash": digest(recipe),
        **session.hashes,
        "validation_examples": len(data.validation) if data.validation is not None else 0,
        "template": data.template.name,
        "mfu_peak": session.peak._asdict(),
        "choices": choices,
        "checks": contract_lines(data.contracts),
    }
    if session.ranks.world > 1:
        env |= {"mesh": session.mesh.shape._asdict(), "hosts": session.ranks.hosts}
    write_atomically(out / IDENTITY, json.dumps(env, indent=1))
    write_atomically(out / RECIPE, dump(recipe))
    mark_own_run(out / RECIPE)
    held_out = data.validation
    if recipe.data.hold_out and held_out is not None:
        lines: dict[str, str] = {}
        for i in range(len(held_out)):
            place = held_out.where(i)
            # A long document is split into several examples, but its row is listed only once.
            if place not in lines:
                beginning = held_out.beginning(i) if len(lines) < QUOTED_ROWS else ""
                lines[place] = f"{place}  {beginning}".rstrip() + "\n"
        write_atomically(out / HELD_OUT, "".join(lines.values()))
