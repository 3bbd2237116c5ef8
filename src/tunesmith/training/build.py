"""The composition root: a recipe becomes a Session, in the order in which faults are cheapest to
find.

machine -> model files -> data and token contract -> model on meta -> plan -> weights -> optimizer
-> checkpoint
"""

import itertools
import json
import logging
import math
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
from tunesmith.adapter.peft_files import describe_misread, read_adapter
from tunesmith.build_model import (
    Weights,
    build_model,
    count_trained,
    define_model,
    fill_parameters,
)
from tunesmith.checkpoint.contents import read_optimizer
from tunesmith.checkpoint.manifest import check_sums
from tunesmith.checkpoint.resume import (
    COUNTER,
    Progress,
    Start,
    as_it_began,
    check_unchanged,
    describe_resume,
)
from tunesmith.checkpoint.sharded import is_sharded, read_sharded_optimizer
from tunesmith.checkpoint.start_adapter import adapter_digest, find_adapter
from tunesmith.config.dump import digest, dump
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Run
from tunesmith.data.batch import Batch
from tunesmith.data.contract import CutAnswers
from tunesmith.data.folders import check_local
from tunesmith.data.loader import GlobalBatch, Loader
from tunesmith.data.prepare import TrainingData, find_trained_rows, prepare_data
from tunesmith.data.source import is_local
from tunesmith.data.tokens import Repeats
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import MachineError, TunesmithError, UsageError
from tunesmith.formats.scaled_matmul import SCALING_RECIPES
from tunesmith.host import packages
from tunesmith.host.chips import Chip, Peak
from tunesmith.host.files import (
    existing_folder,
    from_here,
    require_disk_space,
    write_atomically,
)
from tunesmith.host.memory import available_memory
from tunesmith.host.shell import shell_word
from tunesmith.hub import fetch
from tunesmith.hub.download import FetchProgress
from tunesmith.hub.model_files import ModelFiles, read_model_files, spec_of_folder
from tunesmith.methods import METHODS
from tunesmith.methods.base import TrainModel
from tunesmith.metrics import hardware
from tunesmith.metrics.trackers import key_and_fix, trackers_of
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.recurrent_kernels import describe_trials
from tunesmith.model.safetensors_files import weights_digest
from tunesmith.model.shipped import check_frozen
from tunesmith.model.spec import ModelSpec, attention_weight, check_seq_len, flops
from tunesmith.model.tokenizer import eos_ids
from tunesmith.optim.optimizer import Optimizer
from tunesmith.optim.weight_gradients import fp32_gradients
from tunesmith.parallel.mesh import ALONE, Mesh
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning.forecast import Planner
from tunesmith.planning.machines import cluster_of
from tunesmith.planning.measured_layers import count_active_adapter, count_adapter
from tunesmith.planning.resolve import (
    check_bf16,
    checkpoint_bytes,
    probe_machine,
    resolve_dtype,
)
from tunesmith.planning.run_plan import (
    Machine,
    RunPlan,
    one_document_a_row,
    shares_prompts,
)
from tunesmith.planning.workload import measure_work
from tunesmith.quant.replace import eight_bit_shapes
from tunesmith.quant.schemes import scheme_of
from tunesmith.run_dir import HELD_OUT, IDENTITY, RECIPE, Phase
from tunesmith.runtime.device import chip_of, choose_device, free_device_memory
from tunesmith.runtime.host import keep_threads
from tunesmith.runtime.transfer import DevicePrefetcher
from tunesmith.training.agree import check_same_inputs
from tunesmith.training.compare_eight_bit import (
    PROBE_TOKENS,
    TOLERANCE,
    choose_sums,
    compare_with_bf16,
)
from tunesmith.training.reference import BaseReference

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

    @property
    def dtype(self) -> torch.dtype:
        """Type of the matmuls."""
        return DTYPES[self.run.model.dtype]

    @property
    def peak_tflops(self) -> float | None:
        """Of all ranks together."""
        return self.peak.tflops * self.ranks.world if self.peak.tflops else None

    def flops(self, examples: Sequence[int], supervised: int) -> float:
        """Floating-point operations of a step on these examples, of which `supervised` positions
        carry a label.
        """
        tokens = self.data.train
        spec = self.files.spec
        count = partial(flops, spec, trained="full", forwards=self.run.extra_forwards)
        if self.run.adapter.kind == "lora":
            adapter = sum(p.numel() for p in self.optimizer.params.values())
            # Of experts that a token does not go to.
            idle = count_adapter(spec, self.run.adapter)
            idle -= count_active_adapter(spec, self.run.adapter)
            count = partial(count, trained="lora", adapter_parameters=adapter - idle)
        # What two sequences share is computed once.
        shared = tokens.shared[[*examples]]
        return count(tokens.document_lengths(examples), supervised) - count(shared, 0)

    def memory_gib(self) -> float:
        """Peak memory of this start so far, GiB; what the trial of memory reset in the allocator's
        statistics counts.
        """
        return max(hardware.memory_gib(self.device), self.plan.trial_peak / 2**30)

    def describe_ranks(self, step: int) -> list[str]:
        """A line for the user, before step `step`, where there are several ranks."""
        if self.ranks.world == 1:
            return []
        idle = self.loader(step).batch(step).idle_share if self.mesh.shape.data > 1 else 0.0
        hosts = ", ".join(dict.fromkeys(self.ranks.hosts))
        mesh = f"{self.mesh.shape.describe()}, {self.plan.why['mesh']}"
        lines = [f"{self.ranks.world} ranks on {hosts}: {mesh}; idle share of a step: {idle:.1%}"]
        if self.run.log.samples and self.data.validation is not None and self.mesh.shape.tensor > 1:
            lines.append(
                "no sample answers at validation: "
                "a model that is cut over a tensor group does not generate"
            )
        return lines

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
    """Make a Session, checking before each slow thing what can be checked without it.

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
    chip = common_chip(device, ranks)
    # What one rank of a node downloads and tokenizes, the others read from the cache.
    with ranks.raise_on_all_ranks(), ranks.local_main_process_first():
        run = run_as_it_began(run, start)
        check_machine(run, device, chip)
        check_inputs(run, start)
        files, hashes = read_base(run, start, chip, ranks, weights=weights)
        # As the recipe has it, but for what `auto` means in its model section: config.yaml keeps
        # it, and a resumed run compares its own with it.
        run = session_run = replace(run, model=files.model)
        run = lay_out_rows(run, files)
        # Nothing is learned in a measurement, and a run that began keeps the rows that it began
        # with.
        cut_answers: CutAnswers = "warn" if measured or start.checkpoint else "refuse"
        data = read_data(run, start, files, hashes, cut_answers, why=why)
        if measured:
            data = fill_steps(data)
    check_same_inputs(run, start, files, data, ranks, drawn=weights == "random")
    torch.manual_seed(run.train.seed)
    load = partial(
        load_model,
        run,
        start,
        files,
        data,
        device,
        ranks,
        weights=weights,
        measured=measured,
        make_mesh=make_mesh,
        model_hash=hashes["model_hash"],
    )
    root, plan, mesh = load_compared(load, files, data, device, ranks, weights=weights)
    optimizer = make_optimizer(run, root, start, ranks)
    progress = start.progress or Progress()
    if device.type == "cpu":
        plan = replace(plan, why={**plan.why, "threads": keep_threads(progress.threads)})
    peak = hardware.find_peak(device, DTYPES[run.model.dtype])
    for line in describe_session(run, start, root, plan, peak, why=why):
        log.info(line)
    total_steps = data.schedule.steps(run.train.duration)
    session = Session(
        session_run, files, data, root, optimizer, plan, total_steps, hashes, peak, ranks, mesh
    )
    is_over = total_steps is not None and progress.step >= total_steps
    if run.train.optimizer_in_backward and not is_over:
        check_one_micro_batch(run, session.loader(progress.step).batch(progress.step))
    return session


def lay_out_rows(run: Run, files: ModelFiles) -> Run:
    """The recipe with one document a row, where the model's layers do not keep packed documents
    apart.

    RecipeError where its steps are counted in tokens, which only packed rows fill.
    """
    support = files.support
    for line in support.describe():
        log.info(line)
    if support.state != "padded":
        return run
    return one_document_a_row(run, files.config.model_type, support.why)


def common_chip(device: torch.device, ranks: Ranks) -> Chip:
    """The chip that all ranks choose a dtype for; a collective call.

    That of a rank without units for bf16, if there is one, with the least memory of all.
    """
    chips = ranks.all_gather_object(chip_of(device, ranks.heartbeat.peers.local_processes()))
    chip = min(chips, key=lambda chip: chip.bf16)
    return replace(chip, gib=min(chip.gib for chip in chips))


def run_as_it_began(run: Run, start: Start) -> Run:
    """The recipe of a run that goes on: `auto` stands for what it did under its checkpoints."""
    model = as_it_began(run.model, start.previous_run)
    if model.dtype != run.model.dtype:
        log.info(f"model.dtype: {model.dtype}, as this run began")
    return replace(run, model=model)


def read_base(
    run: Run, start: Start, chip: Chip, ranks: Ranks, *, weights: Weights
) -> tuple[ModelFiles, dict[str, Any]]:
    """The files of the base, brought from the Hub where they are missing, and the hash of its
    weights.
    """
    # A resumed run's rows were cut to this length when it began.
    seq_len = None if start.checkpoint else run.data.seq_len
    model = run.model
    folder = Path(model.name)
    if model.dtype == "auto":

        def read_sizes() -> ModelSpec:
            # Drawn weights have a folder with less in it than a fetch demands.
            place = fetch.fetch_for_tokens(model) if weights == "stored" else folder
            return spec_of_folder(place, model)

        dtype, line = resolve_dtype(model, run.train, chip, read_sizes)
        model = replace(model, dtype=dtype)
        log.info(line)
    if weights == "stored":
        folder = fetch.fetch(model, progress=FetchProgress(draws_bar=False), seq_len=seq_len)
        if ranks.local_rank == 0:
            check_sums(folder)  # the base may be a model that an earlier run wrote
    files = read_model_files(folder, model)
    check_frozen(replace(run, model=files.model))
    if seq_len is not None:
        check_seq_len(files.spec, seq_len, where=f"{folder}/config.json")
    return files, {"model_hash": weights_digest(folder) if weights == "stored" else None}


def load_model(
    run: Run,
    start: Start,
    files: ModelFiles,
    data: TrainingData,
    device: torch.device,
    ranks: Ranks,
    *,
    weights: Weights,
    measured: bool,
    make_mesh: Callable[[MeshShape, str], Mesh],
    model_hash: str | None,
    refused: str = "",
) -> tuple[TrainModel, RunPlan, Mesh]:
    """Plan the run and load its model: without an fp8 base if that was `refused`, for the reason in
    it.
    """
    model, plan = plan_model(run, start, files, data, device, ranks, refused)
    mesh = make_mesh(plan.mesh, device.type)
    if not measured:
        with ranks.raise_on_all_ranks():
            check_disk(run, count_trained(run, model), files.folder, ranks)
    checkpoint = start.checkpoint.path if start.checkpoint else None
    is_full = run.adapter.kind == "none"
    base_weights: Path | Literal["random"] | None = checkpoint if is_full else None
    if weights == "random":
        base_weights = "random"
    # One token is enough: one micro batch, the largest of the first step.
    [largest] = first_batches(make_loader(data, files, plan), device, 1)
    reference = None
    if is_full and METHODS[run.method.name].needs_reference:
        reference = BaseReference(run, data, model_hash, ranks)
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
    return root, plan, mesh


def load_compared(
    load: Callable[..., tuple[TrainModel, RunPlan, Mesh]],
    files: ModelFiles,
    data: TrainingData,
    device: torch.device,
    ranks: Ranks,
    *,
    weights: Weights,
) -> tuple[TrainModel, RunPlan, Mesh]:
    """What `load` gives, with a base in 8 bits only where that hardly changes the loss, and fast
    sums of its products alike.

    load: `load_model` of the run; `refused` loads it again with a base in bf16.
    """
    root, plan, mesh = load()
    if plan.base not in SCALING_RECIPES:
        return root, plan, mesh
    batches = first_batches(make_loader(data, files, plan), device, PROBE_TOKENS)
    if device.type == "cuda":
        log.info("%s: %s", plan.base, choose_sums(root, batches, ranks))
    # Random weights have no file to compare with.
    if weights == "random":
        return root, plan, mesh
    change = compare_with_bf16(root, batches, mesh, ranks)
    if change.is_tolerable:
        reason = f"{plan.why['base']}; {change.layers} layers: {change.describe()}"
        return root, replace(plan, why={**plan.why, "base": reason}), mesh
    dropped = f"{plan.base} was tried and rejected: it changes the loss by more than"
    # Both hold memory that the second model needs. A base in bf16 leaves room for another micro
    # batch.
    del root, batches
    free_device_memory()
    return load(refused=f"{dropped} {TOLERANCE:.0%}: {change.describe()}")


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
    yield from describe_trials(root.recurrent_trials)
    if run.adapter.kind == "lora" and run.adapter.target == lora.ALL_LINEAR:
        left_out = lora.describe_unreached(root.model)
        if left_out:
            yield left_out
    if run.adapter.kind == "lora":
        misread = describe_misread(root.model)
        if misread:
            yield misread
    if why:
        yield from plan.describe(why=True)
    yield from describe_micro_batch(start, run, plan)
    yield from describe_rounding(start, run)
    if why and "threads" in plan.why:
        yield f"threads: {torch.get_num_threads()}, {plan.why['threads']}"
    if peak.tflops and not peak.published:
        yield f"MFU is relative to {peak.tflops:.0f} TFLOP/s, {peak.source}"


def plan_model(
    run: Run,
    start: Start,
    files: ModelFiles,
    data: TrainingData,
    device: torch.device,
    ranks: Ranks,
    refused: str = "",
) -> tuple[PreTrainedModel, RunPlan]:
    """The model on meta, and what each of the ranks will do, on which mesh; why no base in 8 bits
    will do, if it is `refused`.
    """
    with ranks.raise_on_all_ranks():
        model = define_model(run, files)
        shapes = eight_bit_shapes(model)
        machine = probe_machine(run, files, device, shapes, ranks.heartbeat.peers.local_processes())
    machines, local = (
        ranks.all_gather_object(machine),
        # Nodes with unlike numbers of ranks are planned as smaller, equal ones.
        math.gcd(*ranks.all_gather_object(ranks.local_world)),
    )
    with ranks.raise_on_all_ranks():
        machine, trained = common_machine(machines, ranks), count_trained(run, model)
        if refused:
            machine = replace(machine, scaling=(None, refused))
        cluster = cluster_of(machine.name, ranks.world // local, local)
        work = measure_work(run, files.spec, data.train, schedule=data.schedule)
        plan = Planner(run, files.spec, cluster, work, machine, trained, start.micro_batch).choose()
        # `memory.host` is a rank's share; the ranks of a node have one host.
        needed, there = plan.memory.host * ranks.local_world, available_memory()
        if needed > there:
            what = (
                f"the host needs {size_text(needed)} for offloading, "
                f"but only {size_text(there)} are available"
            )
            fix = "train.cpu_offload=[], or more nodes"
            raise MachineError(
                what, where="train.cpu_offload", why=f"{ranks.local_world} ranks are on it", fix=fix
            )
    ranks.heartbeat.phase(Phase.LOADING)
    return model, plan


def common_machine(machines: Sequence[Machine], ranks: Ranks) -> Machine:
    """The machine that all ranks plan for: as each of them, with the least memory.

    Raises:
        MachineError: they differ in more. Ranks that compute otherwise would not give equal
            numbers.
    """
    first = machines[0]
    for rank, machine in enumerate(machines):
        for part in ("attention", "compiles", "scaling", "integrated"):
            value, first_value = getattr(machine, part), getattr(first, part)
            if value != first_value:
                raise MachineError(
                    f"{ranks.name(rank)} and {ranks.name(0)} differ: "
                    f"{part} {value}, and {first_value}",
                    why="all ranks must compute identically",
                    fix="make the nodes the same, or set what differs in the recipe, "
                    "such as train.compile=off",
                )
    have_one_name = len({machine.name for machine in machines}) == 1
    tightest = min(machines, key=lambda machine: machine.card_bytes)
    return replace(
        first,
        free_bytes=min(machine.free_bytes for machine in machines),
        card_bytes=tightest.card_bytes,
        limit=tightest.limit,
        # Each rank's own GPU, by its index.
        device=machines[ranks.rank].device,
        name=first.name if have_one_name else "",
    )


def read_data(
    run: Run,
    start: Start,
    files: ModelFiles,
    hashes: dict[str, Any],
    cut_answers: CutAnswers,
    *,
    why: bool,
) -> TrainingData:
    """Prepare the data, add its hashes to the base's, compare all with the checkpoint, and log what
    is trained on; with `why` also how it was checked.
    """
    for line in files.describe():
        log.info(line)
    check_unchanged(start, run, hashes)
    shares = shares_prompts(run, files.support.recurrent)
    if start.progress is not None:
        # Sums are rounded otherwise: a run goes on as it began.
        shares = shares and bool(start.progress.shares_prompts)
    data = prepare_data(
        run,
        files.tokenizer,
        eos_ids(files.folder, files.tokenizer),
        files.vocab_rows,
        cut_answers=cut_answers,
        position_limit=files.spec.position_limit,
        shares_prompts=shares,
    )
    hashes |= {"data_hash": data.digest, "validation_hash": data.validation_digest}
    if METHODS[run.method.name].needs_reference and run.adapter.from_ is not None:
        hashes["reference_hash"] = adapter_digest(run.adapter.from_)
    check_unchanged(start, run, hashes)
    log.info(data.describe(why=why))
    if run.adapter.from_ is not None and start.checkpoint is None:
        for line in describe_earlier_run(run.adapter.from_, data):
            log.info(line)
    limit = files.spec.position_limit or files.spec.context
    longest = int(data.train.lengths.max())
    if longest > limit:
        text = f"the longest example has {longest:,} tokens, but the model supports {limit:,}"
        log.warning(f"{text}; fix: data.seq_len={limit}")
    for line in describe_resume(start, run, data.schedule):
        log.info(line)
    return data


def describe_earlier_run(adapter: str, data: TrainingData) -> list[str]:
    """Lines for the user where the run of the adapter that is continued had another base, or was
    trained on rows that are held out now.

    adapter: as in `adapter.from`; of one that is no run's nothing is known.
    """
    folder = find_adapter(adapter).folder
    if not (folder.parent / RECIPE).is_file():
        return []
    name = from_here(folder.parent)
    try:
        earlier = load_recipe(folder.parent / RECIPE)
    except TunesmithError as error:
        return [f"warning: could not check what {name} was trained on: {error.what}"]
    lines = []
    base = data.run.model.name
    if earlier.model.name != base:
        lines.append(
            f"warning: the base of {name} is {earlier.model.name}, and here it is {base}; if these "
            f"are two models, fix: {shell_word(f'model.name={earlier.model.name}')}"
        )
    if data.validation is None:
        return lines
    tokenizer = data.template.tokenizer
    seen, fault = find_trained_rows(
        data.validation, earlier, data.run.data, data.template, tokenizer
    )
    if seen is None:
        lines.append(
            f"warning: could not check whether {name} was trained on held-out rows: {fault}"
        )
    elif seen.count:
        lines.append(_warn_of_trained_rows(name, seen, len(data.validation)))
    return lines


def _warn_of_trained_rows(name: str, seen: Repeats, held_out: int) -> str:
    return (
        f"warning: {name} was trained on {seen.count:,} of the {held_out:,} rows that are held out "
        f"now, so val_loss is too optimistic; first {seen.where} ({seen.earlier}); fix: name a "
        "file without the rows of that run, or train on all rows from the base, without "
        "adapter.from"
    )


def fill_steps(data: TrainingData) -> TrainingData:
    """The data with rows repeated within an epoch where a step of the run would be short."""
    schedule = data.schedule
    data = data.repeated(schedule.steps(data.run.train.duration) or 0)
    if data.schedule is not schedule:
        last = schedule.steps_per_epoch(0)
        log.info(
            f"step {last} would be incomplete: rows are repeated within an epoch to fill every step"
        )
    return data


def describe_micro_batch(start: Start, run: Run, plan: RunPlan) -> list[str]:
    """A line for the user where a resumed run takes another micro batch than before."""
    previous, now = start.micro_batch, plan.layout.micro_batch
    if previous is None or now == previous:
        return []
    why = f"train.micro_batch='{previous}' keeps it"
    if run.train.micro_batch == "auto":
        why = "which no longer fits"
    effect = "dropout masks differ" if run.adapter.dropout else "sums are rounded differently"
    return [
        f"the micro batch is {now}, and was {previous}, {why}: "
        f"results differ from an uninterrupted run, because {effect}"
    ]


def describe_rounding(start: Start, run: Run) -> list[str]:
    """A line for the user where a checkpoint is of a version that drew the noise of stochastic
    rounding otherwise.
    """
    if run.train.master_weights != "stochastic" or start.progress is None:
        return []
    if start.progress.rounding == COUNTER:
        return []
    return [
        "stochastic rounding: this version draws other noise than the one that wrote the "
        "checkpoint: weights are rounded equally well on average, but not bit for bit"
    ]


def check_machine(run: Run, device: torch.device, chip: Chip) -> None:
    """Refuse a dtype that the device has no matmuls for, and packages that are not installed.

    It comes before anything is fetched. A CPU that only emulates products in bf16 is warned of.
    """
    dtype = run.model.dtype
    check_bf16(dtype, chip)
    if dtype == "bf16" and not chip.bf16:
        log.warning(
            "this CPU has no units for bf16, whose products take up to 200 times as long as fp32's;"
            " fix: model.dtype=fp32"
        )
    if run.train.cpu_offload and device.type == "cpu":
        log.warning("train.cpu_offload has no effect on a CPU")
    if run.train.optimizer == "adamw-8bit":
        packages.bnb_functional("8-bit moments", "train.optimizer")
    scheme_of(run.model).check_device(device)
    if dtype == "fp16" and device.type == "cpu":
        raise MachineError(
            "fp16 cannot be trained on a CPU",
            where="model.dtype",
            why="its matmuls are emulated, hundreds of times slower than bf16",
            fix="model.dtype=bf16, or model.dtype=fp32",
        )


def check_inputs(run: Run, start: Start) -> None:
    """Refuse packages, data files, a tokenizer and an adapter that are missing, before the model is
    looked up at the Hub.
    """
    for name in trackers_of(run):
        packages.require(name, **key_and_fix(run, name))
    for source in (*run.data.train, *run.data.validation):
        if is_local(source.source):
            check_local(Path(source.source).expanduser())
    if run.model.tokenizer is not None and Path(run.model.tokenizer).is_absolute():
        fetch.fetch_without_weights(run.model.tokenizer)
    if run.adapter.from_ is not None and start.checkpoint is None:
        folder = find_adapter(run.adapter.from_).folder
        check_sums(folder)
        read_adapter(folder)


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
        prefetcher=DevicePrefetcher(device) if device.type == "cuda" else None,
    )


def first_batches(loader: Loader, device: torch.device, tokens: int) -> list[Batch]:
    """Micro batches on the device until they hold so many tokens: from the first step on, the
    largest of a step first.

    Epochs repeat.
    """
    batches: list[Batch] = []
    for step in itertools.count():
        micro_batches = loader.batch(step).micro
        for batch in sorted(micro_batches, key=lambda batch: -batch.input_ids.numel()):
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
    scale = LOSS_SCALE if run.model.dtype == "fp16" else None
    optimizer = Optimizer(model.trained_parameters(), run.train, loss_scale=scale)
    optimizer.use_fp32_gradients(fp32_gradients(model.model))
    if start.checkpoint and start.progress and is_sharded(start.checkpoint.path):
        read_sharded_optimizer(optimizer, start.checkpoint.path, start.progress, ranks)
    elif start.checkpoint and start.progress:
        saved, where = start.progress, str(start.checkpoint.path)
        with read_optimizer(start.checkpoint.path) as tensors:
            optimizer.load_state_dict(
                tensors, scale=saved.loss_scale, growth_tracker=saved.good_steps, where=where
            )
    return optimizer


def write_identity(session: Session, argv: list[str] | None) -> None:
    """Write env.json, which makes the directory a run's, and config.yaml: what was run, on what,
    from which data; and of rows that were drawn which ones they are.
    """
    run = session.run
    out = Path(run.output_dir)
    write_atomically(out / IDENTITY, json.dumps(_identity(session, argv), indent=1))
    write_atomically(out / RECIPE, dump(run))
    held_out = session.data.validation
    if run.data.hold_out and held_out is not None:
        lines: dict[str, str] = {}
        for i in range(len(held_out)):
            place = held_out.where(i)
            # A long document has several examples.
            if place not in lines:
                beginning = held_out.beginning(i) if len(lines) < QUOTED_ROWS else ""
                lines[place] = f"{place}  {beginning}".rstrip() + "\n"
        write_atomically(out / HELD_OUT, "".join(lines.values()))


def _identity(session: Session, argv: list[str] | None) -> dict[str, Any]:
    """The content of env.json."""
    data = session.data
    validation_examples = 0
    if data.validation is not None:
        validation_examples = len(data.validation)
    env = hardware.describe_machine(argv)
    env["recipe_hash"] = digest(session.run)
    env |= session.hashes
    env["validation_examples"] = validation_examples
    env["template"] = data.template.name
    env["mfu_peak"] = session.peak._asdict()
    env["choices"] = _choices(session.plan)
    env["checks"] = data.describe_checks()
    if session.ranks.world > 1:
        env["mesh"] = session.mesh.shape._asdict()
        env["hosts"] = session.ranks.hosts
    return env


def _choices(plan: RunPlan) -> dict[str, dict[str, str]]:
    """What `auto` came to mean in each part of the run, and why."""
    choices = {}
    for part, choice in plan.choices.items():
        choices[part] = {"taken": choice, "why": plan.why[part]}
    # The number that torch has now; the plan says why.
    threads = str(torch.get_num_threads())
    why = plan.why.get("threads", "only the host's part runs on the CPU")
    choices["threads"] = {"taken": threads, "why": why}
    return choices
