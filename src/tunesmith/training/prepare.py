"""Preparation of a run before the weights are loaded. Fast checks come before slow steps.

Order of the steps: machine -> model files -> data and token contract -> model on meta -> plan

`tools/plan/on_paper.py` does the same for a machine that is not available.
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
from tunesmith.checkpoint.resume import (
    Start,
    check_unchanged,
    find_resumed,
    restore_resolved_values,
)
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
from tunesmith.host.memory import available_memory
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
from tunesmith.presentation.data import start_data_lines
from tunesmith.presentation.start import model_files_lines, resume_lines
from tunesmith.quant.replace import eight_bit_shapes
from tunesmith.quant.schemes import DENSE, scheme_of
from tunesmith.run_dir import Phase
from tunesmith.runtime.device import chip_of
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# Memory that must stay free on the host, as a fraction of the memory for streamed layers. Their
# pages are locked, so other programs cannot use them.
SPARE_HOST_SHARE = 0.1


@dataclass(frozen=True)
class Prepared:
    """The inputs of a run after everything except the weights was read.

    Attributes:
        recipe: the recipe that config.yaml stores. `auto` values in its model section are replaced
            by the chosen values, so that a resumed run can compare them.
        run: the recipe for training, with all values adapted to the model.
        files: the files of the base model, and its tokenizer.
        hashes: hashes of base and data, named as in `Progress`.
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
    """Read the inputs of a run. Each input is checked before slower work begins.

    The arguments are those of `build`.
    """
    chip = common_chip(device, ranks)
    # One rank of each node downloads and tokenizes. The other ranks of the node then read the
    # results from the cache.
    with ranks.raise_on_all_ranks(), ranks.local_main_process_first():
        model = restore_resolved_values(run.model, start.previous_run)
        if model.dtype != run.model.dtype:
            log.info(f"model.dtype is {model.dtype}, because this run was started with it")
        run = replace(run, model=model)
        check_machine(run, device, chip)
        check_inputs(run, start)
        files, hashes = read_base(run, start, chip, ranks, weights=weights)
        recipe = replace(run, model=files.model)
        for line in model_files_lines(files):
            log.info(line)
        began = start.checkpoint is not None
        run = fit_to_model(
            recipe, files.spec, files.support, where=f"{files.folder}/config.json", began=began
        )
        # Truncated answers are only a warning for a measurement, because it trains nothing, and for
        # a resumed run, because it must keep its rows.
        cut_answers: CutAnswers = "warn" if measured or began else "refuse"
        data = read_data(run, start, files, hashes, cut_answers, why=why)
        if measured:
            # Repeat the rows, because all steps of a measurement must be full.
            steps = data.schedule.steps(run.train.duration)
            data = data.repeated(steps or 0)
    return Prepared(recipe, run, files, data, hashes)


def common_chip(device: torch.device, ranks: Ranks) -> Chip:
    """Return the chip for which all ranks choose a dtype. This is a collective call.

    If any rank has a chip without bf16 units, return this chip. The memory of the result is the
    minimum over all ranks.
    """
    chips = ranks.all_gather_object(chip_of(device, ranks.heartbeat.peers.local_processes()))
    chip = min(chips, key=lambda chip: chip.bf16)
    return replace(chip, gib=min(chip.gib for chip in chips))


def check_machine(run: Run, device: torch.device, chip: Chip) -> None:
    """Check that the device supports the recipe's dtype and that required packages are installed.

    Call this before anything is downloaded. Log a warning if a CPU only emulates bf16 matmuls.
    """
    dtype = run.model.dtype
    check_bf16(dtype, chip)
    if dtype == "bf16" and not chip.bf16:
        log.warning(
            "this CPU has no bf16 hardware, so bf16 matmuls take up to 200 times as long as fp32;"
            " fix: set model.dtype=fp32"
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
            why="CPUs emulate fp16 matmuls, which is hundreds of times slower than bf16",
            fix="set model.dtype=bf16, or model.dtype=fp32",
        )


def check_inputs(run: Run, start: Start) -> None:
    """Check that packages, data files, tokenizer and adapter exist, before the Hub is accessed."""
    for name in trackers_of(run):
        packages.require(name, **key_and_fix(run, name))
    if writes_tensorboard(run):
        packages.require("tensorboard", where="log.tensorboard", fix="set log.tensorboard=false")
    for source in (*run.data.train, *run.data.validation):
        if is_local(source.source):
            place = Path(source.source).expanduser()
            check_local(place, source.name)
    tokenizer = run.model.tokenizer
    if tokenizer is not None and Path(tokenizer).is_absolute():
        fetch.fetch_without_weights(tokenizer)
    adapter = run.adapter.from_
    if adapter is not None and start.checkpoint is None:
        folder = find_adapter(adapter)
        check_sums(folder)
        read_adapter(folder)


def read_base(
    run: Run, start: Start, chip: Chip, ranks: Ranks, *, weights: Weights
) -> tuple[ModelFiles, dict[str, Any]]:
    """Return the files of the base model and the hash of its weights. Download missing files."""
    folder = Path(run.model.name)
    max_pixels = run.data.image_max_pixels

    def read_sizes() -> ModelSpec:
        # If the weights are random, read the folder directly, because it lacks files that
        # `fetch_for_tokens` requires.
        place = fetch.fetch_for_tokens(run.model) if weights == "stored" else folder
        return spec_of_folder(place, run.model)

    model = with_dtype(run.model, run.train, chip, read_sizes)
    if weights == "random":
        return read_model_files(folder, model, image_max_pixels=max_pixels), {"model_hash": None}
    # Do not check seq_len for a resumed run, because its rows were already truncated to a length
    # that the model supports.
    seq_len = None if start.checkpoint else run.data.seq_len
    folder = fetch.fetch(model, seq_len=seq_len, bars=ranks.local_rank == 0)
    if ranks.local_rank == 0:
        check_sums(folder)  # an earlier run may have written this model with checksums
    files = read_model_files(folder, model, image_max_pixels=max_pixels)
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
    """Prepare the data and log a summary. Raise an error if the hashes of data or base differ from
    the checkpoint.

    The hashes of the data are added to `hashes`. If `why` is True, the summary includes the checks
    of the data.
    """
    check_unchanged(start, run, hashes)
    shares = shares_prompts(run, files.support.recurrent)
    if start.progress is not None:
        # A resumed run must share prompts only if it did so before, because sharing changes the
        # rounding of sums.
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
    adapter = run.adapter.from_
    if METHODS[run.method.name].needs_reference and adapter is not None:
        hashes["reference_hash"] = adapter_digest(adapter)
    check_unchanged(start, run, hashes)
    log.info("\n".join(start_data_lines(data, why=why)))
    for line in resume_lines(find_resumed(start, run, data.schedule), run):
        log.info(line)
    return data


def plan_model(
    prepared: Prepared, start: Start, device: torch.device, ranks: Ranks
) -> tuple[PreTrainedModel, RunPlan]:
    """Build the model on the meta device. Choose the plan, which includes the mesh of the ranks."""
    run = prepared.run
    files = prepared.files
    data = prepared.data
    with ranks.raise_on_all_ranks():
        model = define_model(run, files)
        shapes = eight_bit_shapes(model)
        processes = ranks.heartbeat.peers.local_processes()
        machine = probe_machine(run, files, device, shapes, processes, ranks.world)
    machines = ranks.all_gather_object(machine)
    ranks_by_node = ranks.all_gather_object(ranks.local_world)
    # The plan assumes nodes with equal numbers of ranks. If the numbers differ, treat each node as
    # several smaller nodes of equal size.
    per_node = math.gcd(*ranks_by_node)
    with ranks.raise_on_all_ranks():
        machine = common_machine(machines, ranks)
        cluster = cluster_of(machine.name, ranks.world // per_node, per_node)
        work = measure_work(run, files.spec, data.train, schedule=data.schedule)
        trained = count_trained(run, model)
        planner = Planner(run, files.spec, cluster, work, machine, trained, start.micro_batch)
        plan = planner.choose()
        check_host_memory(run, plan, ranks)
    ranks.heartbeat.phase(Phase.LOADING)
    return model, plan


def check_host_memory(run: Run, plan: RunPlan, ranks: Ranks) -> None:
    """Raise MachineError if a host has too little memory for the tensors that its ranks offload."""
    # `memory.host` is for one rank. All ranks of a node use the memory of the same host.
    needed = plan.memory.host * ranks.local_world
    available = available_memory()
    why = f"the host has {count_of(ranks.local_world, 'rank')}"
    fixes = ["set train.cpu_offload=[]"]
    if plan.streamed_layers:
        needed += int(needed * SPARE_HOST_SHARE)
        why = f"{plan.streamed_layers} of {plan.layers} layers are stored in the host's memory"
        fixes = []
        if plan.recomputed_layers < plan.layers:
            fixes.append("set train.recompute=full")
        if scheme_of(run.model) is DENSE:
            fixes.append("set model.quantize=nf4")
    if needed > available:
        raise MachineError(
            f"the host needs {size_text(needed)} for offloading, "
            f"but only {size_text(available)} are available",
            where="train.cpu_offload",
            why=why,
            fix=", or ".join([*fixes, "use more GPUs"]),
        )


def common_machine(machines: Sequence[Machine], ranks: Ranks) -> Machine:
    """Return the machine for which all ranks make the plan. Its memory is the minimum over all
    ranks.

    Raises:
        MachineError: another property differs, so that the ranks would compute different values.
    """
    first = machines[0]
    expected = vars(first)
    for rank, machine in enumerate(machines):
        found = vars(machine)
        for part in ("attention", "compiles", "scaling", "integrated"):
            if found[part] != expected[part]:
                raise MachineError(
                    f"{part} is {found[part]} on {ranks.name(rank)}, but {expected[part]} on "
                    f"{ranks.name(0)}",
                    why="all ranks must compute in the same way",
                    fix="use nodes with the same hardware and software, or set the value in the "
                    "recipe, such as train.compile=off",
                )
    have_same_name = len({machine.name for machine in machines}) == 1
    tightest = min(machines, key=lambda machine: machine.card_bytes)
    return replace(
        first,
        free_bytes=min(machine.free_bytes for machine in machines),
        card_bytes=tightest.card_bytes,
        limit=tightest.limit,
        # Each rank keeps its own device, because the index of the GPU differs.
        device=machines[ranks.rank].device,
        name=first.name if have_same_name else "",
    )
