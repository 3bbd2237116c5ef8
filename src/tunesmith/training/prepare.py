"""The facts that a start knows before weights are read, in the order in which faults are cheapest
to find.

machine -> model files -> data and token contract -> model on meta -> plan

`tools/plan/on_paper.py` has the same for machines that need not be here.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal as size_text
from transformers import PreTrainedModel

from tunesmith.adapter.peft_files import read_adapter
from tunesmith.build_model import Weights, count_trained, define_model
from tunesmith.checkpoint.manifest import check_sums
from tunesmith.checkpoint.resume import Start, as_it_began, check_unchanged, describe_resume
from tunesmith.checkpoint.start_adapter import adapter_digest, find_adapter
from tunesmith.config.schema import Run
from tunesmith.data.prepare import TrainingData, prepare_data
from tunesmith.data.source.folders import check_local
from tunesmith.data.source.open_source import is_local
from tunesmith.data.tokens.contract import CutAnswers
from tunesmith.distributed.ranks import Ranks
from tunesmith.errors import MachineError
from tunesmith.host import packages
from tunesmith.host.chips import Chip
from tunesmith.host.files import from_here
from tunesmith.host.memory import available_memory
from tunesmith.host.shell import shell_word
from tunesmith.hub import fetch
from tunesmith.hub.fetch import spec_of_folder
from tunesmith.hub.model_files import ModelFiles, read_model_files
from tunesmith.methods import METHODS
from tunesmith.metrics.sink import writes_tensorboard
from tunesmith.metrics.trackers import key_and_fix, trackers_of
from tunesmith.model.safetensors_files import weights_digest
from tunesmith.model.spec import ModelSpec
from tunesmith.model.tokenizer import eos_ids
from tunesmith.planning.forecast import Planner
from tunesmith.planning.machines import cluster_of
from tunesmith.planning.resolve import check_bf16, probe_machine, with_dtype
from tunesmith.planning.run_plan import Machine, RunPlan, fit_to_model, shares_prompts
from tunesmith.planning.workload import measure_work
from tunesmith.quant.replace import eight_bit_shapes
from tunesmith.quant.schemes import DENSE, scheme_of
from tunesmith.run_dir import Phase, read_recipe
from tunesmith.runtime.device import chip_of
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# Of what streamed layers take on the host, what must be available beside it: pages that are locked
# cannot give way to other programs.
SPARE_HOST_SHARE = 0.1


@dataclass(frozen=True)
class Prepared:
    """A run of which all but the weights was read.

    Attributes:
        recipe: as config.yaml keeps it: with what `auto` means in its model section, which a
            resumed run compares with its own.
        run: as it is trained.
        files: of the base model, and its tokenizer.
        hashes: of base and data, by their names in `Progress`.
    """

    recipe: Run
    run: Run
    files: ModelFiles
    data: TrainingData
    hashes: Mapping[str, Any]


def prepare(
    run: Run,
    start: Start,
    device: torch.device,
    ranks: Ranks,
    *,
    why: bool = False,
    weights: Weights = "stored",
    measured: bool = False,
) -> Prepared:
    """Read what a run needs, checking before each slow thing what can be checked without it.

    The arguments are those of `build`.
    """
    chip = common_chip(device, ranks)
    # What one rank of a node downloads and tokenizes, the others read from the cache.
    with ranks.raise_on_all_ranks(), ranks.local_main_process_first():
        model = as_it_began(run.model, start.previous_run)
        if model.dtype != run.model.dtype:
            log.info(f"model.dtype: {model.dtype}, as this run began")
        run = replace(run, model=model)
        check_machine(run, device, chip)
        check_inputs(run, start)
        files, hashes = read_base(run, start, chip, ranks, weights=weights)
        recipe = replace(run, model=files.model)
        for line in files.support.describe():
            log.info(line)
        began = start.checkpoint is not None
        where = f"{files.folder}/config.json"
        run = fit_to_model(recipe, files.spec, files.support, where=where, began=began)
        # Nothing is learned in a measurement, and a run that began keeps the rows that it began
        # with.
        cut_answers: CutAnswers = "warn" if measured or began else "refuse"
        data = read_data(run, start, files, hashes, cut_answers, why=why)
        if measured:
            # No step of a measurement is short.
            data = data.repeated(data.schedule.steps(run.train.duration) or 0)
    return Prepared(recipe, run, files, data, hashes)


def common_chip(device: torch.device, ranks: Ranks) -> Chip:
    """The chip that all ranks choose a dtype for; a collective call.

    That of a rank without units for bf16, if there is one, with the least memory of all.
    """
    chips = ranks.all_gather_object(chip_of(device, ranks.heartbeat.peers.local_processes()))
    chip = min(chips, key=lambda chip: chip.bf16)
    return replace(chip, gib=min(chip.gib for chip in chips))


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
    if writes_tensorboard(run):
        packages.require("tensorboard", where="log.tensorboard", fix="log.tensorboard=false")
    for source in (*run.data.train, *run.data.validation):
        if is_local(source.source):
            check_local(Path(source.source).expanduser(), source.name)
    if run.model.tokenizer is not None and Path(run.model.tokenizer).is_absolute():
        fetch.fetch_without_weights(run.model.tokenizer)
    if run.adapter.from_ is not None and start.checkpoint is None:
        folder = find_adapter(run.adapter.from_)
        check_sums(folder)
        read_adapter(folder)


def read_base(
    run: Run, start: Start, chip: Chip, ranks: Ranks, *, weights: Weights
) -> tuple[ModelFiles, dict[str, Any]]:
    """The files of the base, brought from the Hub where they are missing, and the hash of its
    weights.
    """
    folder = Path(run.model.name)
    most = run.data.image_max_pixels

    def read_sizes() -> ModelSpec:
        # Drawn weights have a folder with less in it than a fetch demands.
        place = fetch.fetch_for_tokens(run.model) if weights == "stored" else folder
        return spec_of_folder(place, run.model)

    model = with_dtype(run.model, run.train, chip, read_sizes)
    if weights == "random":
        return read_model_files(folder, model, image_max_pixels=most), {"model_hash": None}
    # A resumed run's rows were cut to this length when it began.
    seq_len = None if start.checkpoint else run.data.seq_len
    folder = fetch.fetch(model, seq_len=seq_len, bars=ranks.local_rank == 0)
    if ranks.local_rank == 0:
        check_sums(folder)  # the base may be a model that an earlier run wrote
    files = read_model_files(folder, model, image_max_pixels=most)
    return files, {"model_hash": weights_digest(folder)}


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
        pictures=files.pictures,
    )
    hashes |= {"data_hash": data.digest, "validation_hash": data.validation_digest}
    if METHODS[run.method.name].needs_reference and run.adapter.from_ is not None:
        hashes["reference_hash"] = adapter_digest(run.adapter.from_)
    check_unchanged(start, run, hashes)
    log.info(data.describe(why=why))
    if run.adapter.from_ is not None and start.checkpoint is None:
        # The adapter may be from elsewhere than a run.
        folder = find_adapter(run.adapter.from_).parent
        base = read_recipe(folder).value.get("model", {}).get("name")
        if base and base != run.model.name:
            log.warning(
                f"the base of {from_here(folder)} is {base}, and here it is "
                f"{run.model.name}; if they are two: {shell_word(f'model.name={base}')}"
            )
    limit = files.spec.position_limit or files.spec.context
    longest = int(data.train.lengths.max())
    if longest > limit:
        text = f"the longest example has {longest:,} tokens, but the model supports {limit:,}"
        log.warning(f"{text}; fix: data.seq_len={limit}")
    for line in describe_resume(start, run, data.schedule):
        log.info(line)
    return data


def plan_model(
    prepared: Prepared, start: Start, device: torch.device, ranks: Ranks
) -> tuple[PreTrainedModel, RunPlan]:
    """The model on meta, and what each of the ranks will do, on which mesh."""
    run = prepared.run
    files = prepared.files
    data = prepared.data
    with ranks.raise_on_all_ranks():
        model = define_model(run, files)
        shapes = eight_bit_shapes(model)
        processes = ranks.heartbeat.peers.local_processes()
        machine = probe_machine(run, files, device, shapes, processes, ranks.world)
    machines = ranks.all_gather_object(machine)
    # Nodes with unlike numbers of ranks are planned as smaller, equal ones.
    local = math.gcd(*ranks.all_gather_object(ranks.local_world))
    with ranks.raise_on_all_ranks():
        machine = common_machine(machines, ranks)
        cluster = cluster_of(machine.name, ranks.world // local, local)
        work = measure_work(run, files.spec, data.train, schedule=data.schedule)
        trained = count_trained(run, model)
        plan = Planner(run, files.spec, cluster, work, machine, trained, start.micro_batch).choose()
        check_host_memory(run, plan, ranks)
    ranks.heartbeat.phase(Phase.LOADING)
    return model, plan


def check_host_memory(run: Run, plan: RunPlan, ranks: Ranks) -> None:
    """MachineError where the host cannot hold what the ranks of a node offload."""
    # `memory.host` is a rank's share; the ranks of a node have one host.
    needed, there = plan.memory.host * ranks.local_world, available_memory()
    why = f"it has {count_of(ranks.local_world, 'rank')}"
    fixes = ["train.cpu_offload=[]"]
    if plan.streamed_layers:
        needed += int(needed * SPARE_HOST_SHARE)
        why = f"{plan.streamed_layers} of {plan.layers} layers wait there"
        fixes = ["train.recompute=full"] if plan.recomputed_layers < plan.layers else []
        if scheme_of(run.model) is DENSE:
            fixes.append("model.quantize=nf4")
    if needed > there:
        raise MachineError(
            f"the host needs {size_text(needed)} for offloading, "
            f"but only {size_text(there)} are available",
            where="train.cpu_offload",
            why=why,
            fix=" or ".join([*fixes, "more GPUs"]),
        )


def common_machine(machines: Sequence[Machine], ranks: Ranks) -> Machine:
    """The machine that all ranks plan for: as each of them, with the least memory.

    Raises:
        MachineError: they differ in more. Ranks that compute otherwise would not give equal
            numbers.
    """
    first = machines[0]
    expected = vars(first)
    for rank, machine in enumerate(machines):
        found = vars(machine)
        for part in ("attention", "compiles", "scaling", "integrated"):
            if found[part] != expected[part]:
                raise MachineError(
                    f"{ranks.name(rank)} and {ranks.name(0)} differ: "
                    f"{part} {found[part]}, and {expected[part]}",
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
