"""The stages of a start that need a machine: choose the dtype, fetch the weights, and make the
plan.

`tools/plan/on_paper.py` does the same for a machine that is not available.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal as size_text
from transformers import PreTrainedModel

from tunesmith.adapter.peft_files import read_adapter
from tunesmith.batches.training_data import TrainingData
from tunesmith.build_model import count_trained, define_model
from tunesmith.checkpoint.manifest import check_sums
from tunesmith.checkpoint.resume import Start, check_unchanged
from tunesmith.checkpoint.start_adapter import find_adapter
from tunesmith.config.schema import Dtype, Run
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import MachineError, ModelError
from tunesmith.formats.nf4 import check_nf4
from tunesmith.host import packages
from tunesmith.host.chips import Chip
from tunesmith.host.files import cache_folder, existing_folder, require_disk_space
from tunesmith.host.memory import available_memory
from tunesmith.host.shell import shell_path
from tunesmith.hub import fetch
from tunesmith.hub.model_files import ModelFiles, read_model_files
from tunesmith.model.weights.safetensors_files import weights_digest
from tunesmith.planning.forecast import Planner
from tunesmith.planning.machines import cluster_of
from tunesmith.planning.resolve import check_bf16, checkpoint_bytes, probe_machine, resolve_dtype
from tunesmith.planning.run_plan import Machine, RunPlan
from tunesmith.planning.workload import measure_work
from tunesmith.quant.replace import eight_bit_shapes
from tunesmith.quant.schemes import DENSE, NF4, scheme_of
from tunesmith.run_dir import Phase
from tunesmith.runtime.device import chip_of, choose_device, free_device_memory
from tunesmith.start.agree import check_same_inputs
from tunesmith.start.request import Request
from tunesmith.start.tokens import TokenFacts
from tunesmith.tokens.text.template import tokenizer_hash
from tunesmith.units import Size, count_of

# Memory that must stay free on the host, as a fraction of the memory for streamed layers. Their
# pages are locked, so other programs cannot use them.
SPARE_HOST_SHARE = 0.1


@dataclass(frozen=True)
class MachineFacts:
    """The machine of a run, and the dtype that was chosen for it.

    Attributes:
        device: the device of this rank.
        chip: the chip for which all ranks choose the dtype.
        dtype_reason: why the dtype was chosen. Empty if the recipe sets it, or if a resumed run was
            started with it.
    """

    tokens: TokenFacts
    device: torch.device
    chip: Chip
    dtype: Dtype
    dtype_reason: str

    @property
    def request(self) -> Request:
        return self.tokens.model.rows.request

    @property
    def recipe(self) -> Run:
        """The recipe that config.yaml stores, with all values of its model section chosen."""
        recipe = self.tokens.model.recipe
        return replace(recipe, model=replace(recipe.model, dtype=self.dtype))

    @property
    def run(self) -> Run:
        """The recipe for training, with all values adapted to the model and the machine."""
        run = self.tokens.run
        return replace(run, model=replace(run.model, dtype=self.dtype))


@dataclass(frozen=True)
class PlanFacts:
    """Everything that is known about a run before its weights are loaded.

    Attributes:
        files: the folder with the weights, and its config and tokenizer.
        model: the model on the meta device.
        trained: number of trained parameters.
        plan: the choices for the machine, with the reason of each.
        hashes: hashes of base and data, named as in `Progress`.
    """

    machine: MachineFacts
    files: ModelFiles
    model: PreTrainedModel
    trained: int
    plan: RunPlan
    hashes: Mapping[str, Any]

    @property
    def run(self) -> Run:
        return self.machine.run

    @property
    def data(self) -> TrainingData:
        return self.machine.tokens.data

    @property
    def start(self) -> Start:
        return self.machine.tokens.start


def find_machine(tokens: TokenFacts, ranks: Ranks = ONE_PROCESS) -> MachineFacts:
    """Choose the device and the dtype. This is a collective call.

    Raise MachineError if the device does not support the recipe or a required package is missing.
    """
    if torch.cuda.is_initialized():
        free_device_memory()  # an earlier run in this process may hold memory
    run = tokens.run
    device = choose_device()
    chip = common_chip(device, ranks)
    with ranks.raise_on_all_ranks():
        dtype, reason = resolve_dtype(run.model, run.train, chip, tokens.model.spec)
        machine = MachineFacts(tokens, device, chip, dtype, reason)
        # Check the device and the packages before weights are downloaded.
        check_bf16(dtype, chip)
        if machine.run.train.optimizer == "adamw-8bit":
            packages.bnb_functional("8-bit moments", "train.optimizer")
        if scheme_of(machine.run.model) is NF4:
            check_nf4(device)
        if dtype == "fp16" and device.type == "cpu":
            raise MachineError(
                "fp16 cannot be trained on a CPU",
                where="model.dtype",
                why="CPUs emulate fp16 matmuls, which is hundreds of times slower than bf16",
                fix="set model.dtype=bf16, or model.dtype=fp32",
            )
    return machine


def common_chip(device: torch.device, ranks: Ranks) -> Chip:
    """Return the chip for which all ranks choose a dtype. This is a collective call.

    If any rank has a chip without bf16 units, return this chip. The memory of the result is the
    minimum over all ranks.
    """
    chips = ranks.all_gather_object(chip_of(device, ranks.heartbeat.peers.local_processes()))
    chip = min(chips, key=lambda chip: chip.bf16)
    return replace(chip, gib=min(chip.gib for chip in chips))


def make_plan(machine: MachineFacts, ranks: Ranks = ONE_PROCESS) -> PlanFacts:
    """Fetch the weights, build the model on the meta device, and choose the plan, which includes
    the mesh of the ranks. This is a collective call.

    Raises:
        ModelError: the model cannot be downloaded or read, or it differs from the checkpoint's.
        MachineError: the run does not fit on the machine, or the disk is too small.
    """
    run = machine.run
    request = machine.request
    data = machine.tokens.data
    files, hashes = fetch_base(machine, ranks)
    check_same_inputs(machine.tokens, files, ranks)
    torch.manual_seed(run.train.seed)
    previous = request.start.micro_batch
    model, trained, plan = choose_plan(run, files, data, previous, machine.device, ranks)
    if request.purpose == "train":
        with ranks.raise_on_all_ranks():
            check_disk(run, trained, files.folder, ranks)
    ranks.heartbeat.phase(Phase.LOADING)
    return PlanFacts(machine, files, model, trained, plan, hashes)


def choose_plan(
    run: Run,
    files: ModelFiles,
    data: TrainingData,
    previous_micro_batch: Size | None,
    device: torch.device,
    ranks: Ranks,
) -> tuple[PreTrainedModel, int, RunPlan]:
    """Build the model on the meta device, and choose the plan. This is a collective call.

    Return the model, the number of trained parameters, and the plan.
    """
    with ranks.raise_on_all_ranks():
        model = define_model(run, files)
        shapes = eight_bit_shapes(model)
        processes = ranks.heartbeat.peers.local_processes()
        probed = probe_machine(run, files, device, shapes, processes, ranks.world)
    machines = ranks.all_gather_object(probed)
    # The plan assumes nodes with equal numbers of ranks. If the numbers differ, treat each node as
    # several smaller nodes of equal size.
    per_node = math.gcd(*ranks.all_gather_object(ranks.local_world))
    with ranks.raise_on_all_ranks():
        machine = common_machine(machines, ranks)
        cluster = cluster_of(machine.name, ranks.world // per_node, per_node)
        work = measure_work(run, files.spec, data.train, schedule=data.schedule)
        trained = count_trained(run, model)
        planner = Planner(run, files.spec, cluster, work, machine, trained, previous_micro_batch)
        plan = planner.choose()
        check_host_memory(run, plan, ranks)
    return model, trained, plan


def fetch_base(machine: MachineFacts, ranks: Ranks) -> tuple[ModelFiles, Mapping[str, Any]]:
    """Return the files of the base model, and the hashes of base and data. Download missing files,
    and check them.

    Raise ModelError if a file is damaged, if the weights differ from the checkpoint's, or if the
    tokenizer differs from its copy, with which the rows were tokenized.
    """
    run = machine.run
    tokens = machine.tokens
    start = tokens.start
    folder = Path(run.model.name)
    digest = None
    # One rank of each node downloads. The other ranks of the node then find the files.
    with ranks.raise_on_all_ranks(), ranks.local_main_process_first():
        adapter = run.adapter.from_
        if adapter is not None and start.checkpoint is None:
            read_adapter(find_adapter(adapter))  # only a check, before the download
        if machine.request.weights == "stored":
            # Do not check seq_len for a resumed run, see `read_model`.
            seq_len = None if start.checkpoint else run.data.seq_len
            folder = fetch.fetch(run.model, seq_len=seq_len, bars=ranks.local_rank == 0)
            if ranks.local_rank == 0:
                check_sums(folder)  # an earlier run may have written this model with checksums
            digest = weights_digest(folder)
        check_unchanged(start, run, {"model_hash": digest})
        files = read_model_files(folder, run.model, image_max_pixels=run.data.image_max_pixels)
        if tokenizer_hash(files.tokenizer) != tokens.data.template.tokenizer_hash:
            copies = cache_folder("tokenizers")
            raise ModelError(
                "the tokenizer differs from its copy in the cache",
                where=copies,
                why="the rows were tokenized with the copy",
                fix=f"delete the copies with `rm -r {shell_path(copies)}`",
            )
    return files, {"model_hash": digest, **tokens.hashes}


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


def check_disk(run: Run, trained: int, base: Path, ranks: Ranks) -> None:
    """Raise MachineError if the disk has too little free space for the checkpoints.

    In full fine-tuning without a shared disk, each node stores only the parts of its own ranks.

    Args:
        trained: number of trained parameters.
        base: folder of the base model.
    """
    size, copies = checkpoint_bytes(run, trained, base)
    if run.adapter.kind != "lora":
        size //= len(set(ranks.run_dir_writers))
    out = Path(run.output_dir)
    disk = shutil.disk_usage(existing_folder(out))
    # Subtract 3, because besides the `keep` checkpoints, the disk may hold three more: the one
    # being written, the best one, and final/.
    keep = disk.free // max(size, 1) - 3
    fix = "set output_dir to a folder on a larger disk (`df -h` lists the disks)"
    if keep >= 1:
        fix = f"set checkpoint.keep={keep}, or {fix}"
    require_disk_space(
        out,
        size * copies,
        what="the checkpoints",
        why=f"one checkpoint takes {size_text(size)}, and {copies} may exist at the same time",
        fix=fix,
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
                    f"{part} must be the same on all ranks, but it is {found[part]} on "
                    f"{ranks.name(rank)} and {expected[part]} on {ranks.name(0)}",
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
