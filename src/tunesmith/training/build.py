"""The composition root: a recipe becomes a Session.

`prepare.py` reads and plans; then weights -> optimizer -> checkpoint
"""

import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.filesize import decimal as size_text
from transformers import PreTrainedModel

from tunesmith.adapter import lora
from tunesmith.adapter.peft_files import describe_misread
from tunesmith.build_model import (
    Weights,
    build_model,
    count_trained,
    fill_parameters,
)
from tunesmith.checkpoint.contents import read_optimizer
from tunesmith.checkpoint.resume import Progress, Start
from tunesmith.checkpoint.sharded import is_sharded, read_sharded_optimizer
from tunesmith.config.dump import digest, dump
from tunesmith.config.schema import Run
from tunesmith.data.batches.batch import Batch
from tunesmith.data.batches.loader import GlobalBatch, Loader
from tunesmith.data.prepare import TrainingData
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import ModelError, UsageError
from tunesmith.formats.scaled_matmul import SCALING_RECIPES
from tunesmith.host.chips import Peak
from tunesmith.host.files import (
    existing_folder,
    require_disk_space,
    write_atomically,
)
from tunesmith.hub.model_files import ModelFiles
from tunesmith.methods import METHODS
from tunesmith.methods.base import TrainModel
from tunesmith.metrics import hardware
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.spec import attention_weight, flops
from tunesmith.optim.optimizer import Optimizer
from tunesmith.optim.weight_gradients import fp32_gradients
from tunesmith.parallel.mesh import ALONE, Mesh
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning.measured_layers import count_active_adapter, count_adapter
from tunesmith.planning.resolve import (
    checkpoint_bytes,
)
from tunesmith.planning.run_plan import (
    RunPlan,
)
from tunesmith.quant.schemes import scheme_of
from tunesmith.run_dir import HELD_OUT, IDENTITY, RECIPE
from tunesmith.runtime.device import choose_device, free_device_memory
from tunesmith.runtime.host import keep_threads
from tunesmith.runtime.transfer import DevicePrefetcher
from tunesmith.training.agree import check_same_inputs
from tunesmith.training.compare_eight_bit import (
    LOSS_PROBE_TOKENS,
    MAX_LOSS_CHANGE,
    choose_sums,
    compare_with_bf16,
)
from tunesmith.training.prepare import Prepared, plan_model, prepare
from tunesmith.training.reference import BaseReference
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# Of held-out.txt, the first ones, with how they begin: each has to be read for it.
QUOTED_ROWS = 1000

LOSS_SCALE = 2.0**16


@dataclass
class Session:
    """All the live objects of one run."""

    run: Run
    files: ModelFiles  # of the base model, and its tokenizer
    data: TrainingData
    model: TrainModel
    optimizer: Optimizer
    plan: RunPlan  # what was decided for this machine, and why
    total_steps: int | None  # optimizer steps of the whole run; None where it ends by the clock
    hashes: Mapping[str, Any]  # of base and data, by their names in `Progress`
    peak: Peak  # of one rank, the peak that MFU is relative to
    ranks: Ranks = ONE_PROCESS
    mesh: Mesh = ALONE  # how the ranks share the work

    @property
    def device(self) -> torch.device:
        return torch.device(self.plan.device)

    def flops(self, examples: Sequence[int], supervised: int) -> float:
        """Floating-point operations of a step on these examples, of which `supervised` positions
        carry a label.
        """
        tokens = self.data.train
        spec = self.files.spec
        count = partial(flops, spec, trained="full", forwards=self.run.extra_forwards)
        if self.run.adapter.kind == "lora":
            adapter = sum(p.numel() for p in self.optimizer.params.values())
            # Tokens of texts never reach it.
            if self.run.model.train_projector:
                adapter -= spec.projector_parameters
            # Of experts that a token does not go to.
            idle = count_adapter(spec, self.run.adapter)
            idle -= count_active_adapter(spec, self.run.adapter)
            count = partial(count, trained="lora", adapter_parameters=adapter - idle)
        # What two sequences share is computed once.
        shared = tokens.shared[[*examples]]
        seen = spec.picture_flops * int(tokens.picture_tokens[[*examples]].sum())
        return count(tokens.document_lengths(examples), supervised) - count(shared, 0) + seen

    def memory_gib(self) -> float:
        """Peak memory of this start so far, GiB; what the trial of memory reset in the allocator's
        statistics counts.
        """
        return max(hardware.memory_gib(self.device), self.plan.trial_peak / 2**30)

    def loader(self, start_step: int) -> Loader:
        """Global batches from step `start_step` (0 for the first) to the end of the run, on the
        device.
        """
        return make_loader(
            self.data, self.files, self.plan, start_step, self.total_steps, self.mesh
        )


def build(
    run: Run,
    start: Start,
    *,
    why: bool = False,
    weights: Weights = "stored",
    measured: bool = False,
    ranks: Ranks = ONE_PROCESS,
    make_mesh: Callable[[MeshShape, str], Mesh] = Mesh.of,
) -> Session:
    """Make a Session, checking before each slow thing what can be checked without it: read and
    plan, load the model, compare a base in 8 bits, make the optimizer.

    Args:
        why: log the reason of each choice too.
        weights: "random" draws them on the device; `model.name` is then a folder that needs none.
        measured: for figures alone: no room is required for checkpoints, and rows are repeated so
            that no step is short.
        ranks, make_mesh: those that share the run, each building its Session at the same time, and
            what makes their mesh.
    """
    if torch.cuda.is_initialized():
        free_device_memory()  # of an earlier run of this process
    device = choose_device()
    prepared = prepare(run, start, device, ranks, why=why, weights=weights, measured=measured)
    run = prepared.run
    data = prepared.data
    check_same_inputs(run, start, prepared.files, data, ranks, drawn=weights == "random")
    torch.manual_seed(run.train.seed)
    model, plan = plan_model(prepared, start, device, ranks)
    mesh = make_mesh(plan.mesh, device.type)
    if not measured:
        with ranks.raise_on_all_ranks():
            check_disk(run, count_trained(run, model), prepared.files.folder, ranks)
    root, plan = load_model(prepared, model, plan, start, weights, mesh, ranks)
    if plan.base in SCALING_RECIPES:
        plan = compare_eight_bits(root, plan, mesh, prepared, ranks, weights)
    optimizer = make_optimizer(run, root, start, ranks)
    progress = start.progress or Progress()
    if device.type == "cpu":
        plan = replace(plan, why={**plan.why, "threads": keep_threads(progress.threads)})
    peak = hardware.find_peak(device, DTYPES[run.model.dtype])
    for line in describe_session(run, start, root, plan, peak, why=why):
        log.info(line)
    session = Session(
        run=prepared.recipe,
        files=prepared.files,
        data=data,
        model=root,
        optimizer=optimizer,
        plan=plan,
        total_steps=data.schedule.steps(run.train.duration),
        hashes=prepared.hashes,
        peak=peak,
        ranks=ranks,
        mesh=mesh,
    )
    is_over = session.total_steps is not None and progress.step >= session.total_steps
    if run.train.optimizer_in_backward and not is_over:
        check_one_micro_batch(run, session.loader(progress.step).batch(progress.step))
    return session


def load_model(
    prepared: Prepared,
    model: PreTrainedModel,
    plan: RunPlan,
    start: Start,
    weights: Weights,
    mesh: Mesh,
    ranks: Ranks,
) -> tuple[TrainModel, RunPlan]:
    """Load the model that is on meta, in the state of the checkpoint if there is one.

    Returns the plan too, which a trial of memory on a GPU corrects.
    """
    run, files, data = prepared.run, prepared.files, prepared.data
    checkpoint = start.checkpoint
    is_full = run.adapter.kind == "none"
    base_weights: Path | Literal["random"] | None = checkpoint if is_full else None
    if weights == "random":
        base_weights = "random"
    # One token is enough: one micro batch, the largest of the first step.
    [largest] = first_batches(make_loader(data, files, plan), torch.device(plan.device), 1)
    reference = None
    if is_full and METHODS[run.method.name].needs_reference:
        reference = BaseReference(run, data, prepared.hashes["model_hash"], ranks)
        if not reference.is_complete and weights == "stored":
            # It is measured on the base; a checkpoint's weights follow.
            base_weights = None
    root, plan = build_model(
        run,
        files,
        plan,
        model=model,
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
    root: TrainModel, plan: RunPlan, mesh: Mesh, prepared: Prepared, ranks: Ranks, weights: Weights
) -> RunPlan:
    """Take fast sums of a base in 8 bits where these hardly change the loss.

    Returns the plan with what was measured. ModelError if the base in 8 bits has another loss.
    """
    device = torch.device(plan.device)
    loader = make_loader(prepared.data, prepared.files, plan)
    batches = first_batches(loader, device, LOSS_PROBE_TOKENS)
    if device.type == "cuda":
        log.info("%s: %s", plan.base, choose_sums(root, batches, ranks))
    # Random weights have no file to compare with.
    if weights == "random":
        return plan
    change = compare_with_bf16(root, batches, mesh, ranks)
    with ranks.raise_on_all_ranks():
        if not change.is_tolerable and ranks.is_main_process:
            raise ModelError(
                f"{plan.base} changes the loss of the base by more than {MAX_LOSS_CHANGE:.0%}",
                where="model.quantize",
                why=change.describe(),
                fix="model.quantize=none",
            )
    reason = f"{plan.why['base']}; {count_of(change.layers, 'layer')}: {change.describe()}"
    return replace(plan, why={**plan.why, "base": reason})


def describe_session(
    run: Run, start: Start, root: TrainModel, plan: RunPlan, peak: Peak, *, why: bool
) -> Iterator[str]:
    """Lines for the user: what is trained, and what is unusual; with `why` each choice too, with
    its reason.
    """
    if scheme_of(run.model).has_fp8_matmuls and plan.base not in SCALING_RECIPES:
        yield f"warning: the base stays in {plan.base}: {plan.why['base']}"
    yield from plan.warnings
    trained = "all weights"
    if run.adapter.kind == "lora":
        trained = f"LoRA of rank {run.adapter.rank}"
    if plan.base not in DTYPES:
        trained += f", base: {plan.base}"
    name = run.model.name
    if Path(name).exists():
        name = Path(name).absolute().name  # config.yaml has all of it
    yield f"model: {name}: {trained}: {root.describe()}"
    if run.adapter.kind == "lora":
        reaches_all = run.adapter.target == lora.ALL_LINEAR
        unreached = lora.describe_unreached(root.model) if reaches_all else ""
        yield from filter(None, (unreached, describe_misread(root.model)))
    if why:
        yield from plan.describe(why=True)
    previous, now = start.micro_batch, plan.layout.micro_batch
    if previous is not None and now != previous:
        reason = f"train.micro_batch='{previous}' keeps it"
        if run.train.micro_batch == "auto":
            reason = "which no longer fits"
        effect = "dropout masks differ" if run.adapter.dropout else "sums are rounded differently"
        yield (
            f"the micro batch is {now}, and was {previous}, {reason}: "
            f"results differ from an uninterrupted run, because {effect}"
        )
    if why and "threads" in plan.why:
        yield f"threads: {torch.get_num_threads()}, {plan.why['threads']}"
    if peak.tflops and not peak.published:
        yield f"MFU is relative to {peak.tflops:.0f} TFLOP/s, {peak.source}"


def check_disk(run: Run, trained: int, base: Path, ranks: Ranks) -> None:
    """Refuse to begin a run whose checkpoints cannot be written.

    `trained` counts the trained parameters; `base` is the folder of the model.

    Of a model trained in full each node that shares no disk holds the parts of its own ranks.
    """
    size, copies = checkpoint_bytes(run, trained, base)
    if run.adapter.kind != "lora":
        size //= len({*ranks.run_dir_writers})
    out = Path(run.output_dir)
    # Beside those that stay there are the one being written, the best one, and final/.
    keep = shutil.disk_usage(existing_folder(out)).free // max(size, 1) - 3
    fix = "output_dir on a larger disk; df -h lists them"
    if keep >= 1:
        fix = f"checkpoint.keep={keep}, or {fix}"
    why = f"one takes {size_text(size)}, and {copies} may exist at once"
    require_disk_space(out, size * copies, what="the checkpoints", why=why, fix=fix)


def make_loader(
    data: TrainingData,
    files: ModelFiles,
    plan: RunPlan,
    start: int = 0,
    stop: int | None = None,
    mesh: Mesh = ALONE,
) -> Loader:
    """Global batches in the plan's layout, from step `start` up to `stop`.

    Iterating puts this rank's share of them on the device.
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
        # Pictures of a step may take gigabytes.
        ahead=0 if data.train.pictures is not None else Loader.ahead,
        prefetcher=DevicePrefetcher(device) if device.type == "cuda" else None,
    )


def first_batches(loader: Loader, device: torch.device, tokens: int) -> list[Batch]:
    """Return micro batches on the device, from the first step on, with at least `tokens` tokens.

    Within a step they have the order of `Loader.largest_first`. Epochs repeat.
    """
    batches: list[Batch] = []
    for step in itertools.count():
        for batch in loader.largest_first(step):
            batches.append(batch.to(device))
            if sum(batch.tokens for batch in batches) >= tokens:
                return batches
    raise AssertionError("unreachable: epochs repeat")


def check_one_micro_batch(run: Run, batch: GlobalBatch) -> None:
    """Refuse a step of several backwards where `train.optimizer_in_backward` updates the weights in
    the first.
    """
    key = "train.optimizer_in_backward"
    if run.train.optimizer_in_backward and len(batch.micro) > 1:
        what = (
            f"step {batch.step + 1} takes {len(batch.micro)} micro batches, but {key} requires one"
        )
        why = (
            "each parameter is updated as soon as its gradient is computed, "
            "so gradients cannot be accumulated"
        )
        raise UsageError(
            what, where=key, why=why, fix=f"a smaller train.global_batch, or {key}=false"
        )


def make_optimizer(run: Run, model: TrainModel, start: Start, ranks: Ranks) -> Optimizer:
    """The optimizer over everything that is trained, in the state of the checkpoint if there is
    one.
    """
    first_scale = LOSS_SCALE if run.model.dtype == "fp16" else None
    optimizer = Optimizer(model.trained_parameters(), run.train, loss_scale=first_scale)
    optimizer.use_fp32_gradients(fp32_gradients(model.model))
    folder, saved = start.checkpoint, start.progress
    if folder and saved and is_sharded(folder):
        read_sharded_optimizer(optimizer, folder, saved, ranks)
    elif folder and saved:
        scale, good_steps = saved.loss_scale, saved.good_steps
        with read_optimizer(folder) as tensors:
            optimizer.load_state_dict(
                tensors, scale=scale, growth_tracker=good_steps, where=str(folder)
            )
    return optimizer


def write_identity(session: Session, argv: list[str] | None) -> None:
    """Write env.json, which makes the directory a run's, and config.yaml: what was run, on what,
    from which data; and of rows that were drawn which ones they are.
    """
    run = session.run
    out = Path(run.output_dir)
    data = session.data
    plan = session.plan
    choices = {
        part: {"taken": choice, "why": plan.why[part]} for part, choice in plan.choices.items()
    }
    # The number that torch has now; the plan says why.
    why = plan.why.get("threads", "only the host's part runs on the CPU")
    choices["threads"] = {"taken": str(torch.get_num_threads()), "why": why}
    env = {
        **hardware.describe_machine(argv),
        "recipe_hash": digest(run),
        **session.hashes,
        "validation_examples": len(data.validation) if data.validation is not None else 0,
        "template": data.template.name,
        "mfu_peak": session.peak._asdict(),
        "choices": choices,
        "checks": data.describe_checks(),
    }
    if session.ranks.world > 1:
        env |= {"mesh": session.mesh.shape._asdict(), "hosts": session.ranks.hosts}
    write_atomically(out / IDENTITY, json.dumps(env, indent=1))
    write_atomically(out / RECIPE, dump(run))
    held_out = data.validation
    if run.data.hold_out and held_out is not None:
        lines: dict[str, str] = {}
        for i in range(len(held_out)):
            place = held_out.where(i)
            # A long document has several examples.
            if place not in lines:
                beginning = held_out.beginning(i) if len(lines) < QUOTED_ROWS else ""
                lines[place] = f"{place}  {beginning}".rstrip() + "\n"
        write_atomically(out / HELD_OUT, "".join(lines.values()))
