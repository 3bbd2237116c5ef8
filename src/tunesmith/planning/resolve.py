"""Resolve what `auto` means on a machine: dtype, compile, attention, micro batch and recompute.

`calibrate.py` corrects the estimate of memory on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith.config.schema import Dtype, Model, Run, Train
from tunesmith.errors import MachineError
from tunesmith.host.chips import Chip
from tunesmith.hub.fetch import fetch_for_tokens
from tunesmith.loss import card_bytes
from tunesmith.model import attention
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.shipped import AS_SHIPPED, KEEPABLE, resolve_quantize
from tunesmith.model.spec import ModelSpec
from tunesmith.model.stored_form import bytes_aside
from tunesmith.optim.adamw import checkpoint_bytes_per_parameter
from tunesmith.planning.machines import Cluster
from tunesmith.planning.memory import MemoryEstimator, moved_to_host
from tunesmith.planning.micro_batch import choose_micro_batch, layout_of
from tunesmith.planning.run_plan import (
    Machine,
    RunPlan,
    describe_reference,
)
from tunesmith.planning.savings import check_offload
from tunesmith.planning.workload import Workload
from tunesmith.quant.expert_rows import uses_grouped_mm
from tunesmith.quant.schemes import DENSE, scheme_of
from tunesmith.runtime import compilation
from tunesmith.runtime.device import chip_of, free_memory, host_budget, is_integrated
from tunesmith.runtime.host import return_freed_memory
from tunesmith.runtime.stream import host_link
from tunesmith.units import Size

if TYPE_CHECKING:
    # With Transformers, which a plan can do without
    from tunesmith.hub.model_files import ModelFiles

log = logging.getLogger(__name__)

# Of the free memory, what the weights of a model that answers may take; the rest is for its cache.
ANSWERING_SHARE = 0.8
# Of the free memory, which weights in fp32 may take where bf16 has no units.
MAX_FP32_SHARE = 0.5


def resolve_dtype(
    model: Model, train: Train, chip: Chip, read_sizes: Callable[[], ModelSpec]
) -> tuple[Dtype, str]:
    """The dtype that `model.dtype: auto` stands for on a chip, and a line about it for the user.

    Args:
        chip: a GPU, or `cpu`, with the memory that is free.
        read_sizes: of the model; called where the choice depends on them.

    Raises:
        MachineError: as `check_bf16`, where the recipe needs bf16.
    """
    name = "this CPU" if chip.name == "cpu" else chip.name

    def chosen(dtype: Dtype, why: str) -> tuple[Dtype, str]:
        return dtype, f"model.dtype: {dtype}, {why}"

    if chip.bf16:
        return chosen("bf16", f"which {name} has units for")
    if model.quantize == "fp8" or train.master_weights == "stochastic":
        check_bf16("bf16", chip)
        return chosen("bf16", "as model.quantize or train.master_weights needs it")
    # A GPU without units for bf16 has them for fp16; a CPU has them for neither.
    half: Dtype = "bf16" if chip.name == "cpu" else "fp16"
    if half == "fp16" and train.optimizer_in_backward:
        return chosen("fp32", "as train.optimizer_in_backward excludes fp16")
    sizes = read_sizes()
    if scheme_of(resolve_quantize(model, sizes)) is not DENSE:
        return chosen(half, f"as the base is quantized, although {name} has no units for bf16")
    weights = sizes.parameters * torch.float32.itemsize / 2**30
    if weights < MAX_FP32_SHARE * chip.gib:
        why = f"as {name} has no units for bf16, and weights of {weights:.2g} GiB in fp32 fit"
        return chosen("fp32", why)
    why = f"weights of {weights:.2g} GiB in fp32 leave too little of {chip.gib:.2g} GiB"
    return chosen(half, f"although {name} has no units for bf16: {why}")


def with_dtype(
    model: Model, train: Train, chip: Chip, read_sizes: Callable[[], ModelSpec]
) -> Model:
    """The recipe's `model` section with the dtype that `auto` stands for, which is logged; the
    arguments are those of `resolve_dtype`.
    """
    if model.dtype != "auto":
        return model
    dtype, line = resolve_dtype(model, train, chip, read_sizes)
    log.info(line)
    return replace(model, dtype=dtype)


def resolve_dtype_here(model: Model, device: str | torch.device) -> Dtype:
    """The dtype of a base on a device of this machine; a choice other than bf16 is logged."""
    if model.dtype != "auto":
        return model.dtype
    from tunesmith.hub.fetch import spec_of_folder

    # Of a .gguf, which is converted to the dtype that is chosen here, without its weights.
    def read_sizes() -> ModelSpec:
        return spec_of_folder(fetch_for_tokens(model), model)

    dtype, line = resolve_dtype(model, Train(), chip_of(torch.device(device)), read_sizes)
    if dtype != "bf16":
        log.info(line)
    return dtype


def check_bf16(dtype: str, chip: Chip) -> None:
    """MachineError for bf16 on a GPU without units for it; a CPU emulates them."""
    if dtype == "bf16" and not chip.bf16 and chip.name != "cpu":
        raise MachineError(
            f"{chip.name} has no bf16 matmuls",
            where="model.dtype",
            why="GPUs older than Ampere have none",
            fix="model.dtype=fp16 (the loss is scaled), or model.dtype=fp32",
        )


def attention_backend(run: Run, files: ModelFiles, device: torch.device) -> tuple[str, str]:
    """Choose how attention is computed, and say why; `eager`: by Transformers, on padded rows."""
    if run.model.attention == "eager":
        return "eager", "as model.attention says"
    if files.support.state == "padded":
        return "eager", files.support.why
    spec = files.spec
    # Our own kernels take no layers with a window.
    groups = [
        layer.heads // layer.kv_heads
        for layer in spec.layers
        if not layer.window and layer.kv_heads
    ]
    return attention.select_attention_backend(
        device,
        DTYPES[run.model.dtype],
        spec.head_dim,
        group=groups[0] if groups else 1,
        softcap=spec.attention_softcap is not None,
    )


def probe_machine(
    run: Run,
    files: ModelFiles,
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = (),
    processes: Collection[int] = (),
    world: int = 1,
) -> Machine:
    """Find what this machine has for a run, by trying: backends, compiler, memory, fp8 matmuls.

    Args:
        shapes: those of `eight_bit.eight_bit_shapes`, tried with many rows, few and one.
        processes: ids of the run's processes on this host, which share its memory.
        world: ranks of the run.
    """
    # Before the products are tried: torch keeps their memory, for the model to use.
    limit = None
    if device.type == "cpu":
        return_freed_memory()  # of reading the rows and the model's files
        free, size, limit = host_budget(processes)
    else:
        free = free_memory(device)
        size = card_bytes(device)
    scaling = scheme_of(run.model).select_scaling(device, shapes)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    backend = attention_backend(run, files, device)
    machine = Machine(
        str(device),
        free,
        attention=backend,
        kernel=attention.ATTENTION_KERNELS.get(backend[0], ""),
        compiles=compilation.select_compile(run.train.compile, device),
        scaling=scaling,
        card_bytes=size,
        integrated=is_integrated(device),
        grouped_mm=uses_grouped_mm(device, DTYPES[run.model.dtype]),
        name=name,
        limit=limit,
    )
    return replace(machine, host_link=measure_link(run, machine, world))


def measure_link(run: Run, machine: Machine, world: int) -> float:
    """Measure copies from the host, in GB/s, where frozen layers may stream; elsewhere 0."""
    may_stream = world == 1 and not machine.integrated
    if may_stream and "parameters" in moved_to_host(run, machine):
        return host_link(torch.device(machine.device))
    return 0.0


def inference_plan(run: Run, files: ModelFiles, device: torch.device) -> RunPlan:
    """The plan of a model that only answers: nothing compiled or recomputed, no base in 8 bits.

    Frozen layers stream where the run's did and they do not fit; a line says so.
    """
    backend, _ = attention_backend(run, files, device)
    plan = RunPlan(str(device), backend, run.model.dtype, files.spec.depth)
    machine = Machine(str(device), 0, (backend, ""), (False, ""))
    estimator = MemoryEstimator(run, files.spec, machine, trained=0)
    if not estimator.streams or not estimator.trains_adapter or is_integrated(device):
        return plan
    room = int(free_memory(device) * ANSWERING_SHARE) - estimator.fixed.weights
    streamed = estimator.count_streamed(room)
    if streamed:
        log.info(
            f"{streamed} of {plan.layers} layers come from the host's memory for each token, as "
            "the run's train.cpu_offload says"
        )
    return replace(plan, streamed_layers=streamed)


def resolve_plan(
    estimator: MemoryEstimator,
    cluster: Cluster,
    work: Workload,
    previous_micro_batch: Size | None = None,
) -> RunPlan:
    """Resolve every `auto` of a recipe by what the machine has, whether it fits or not.

    Args:
        estimator: of the recipe, the machine of each rank, and the mesh.
        previous_micro_batch: of the start that a resumed run goes on from. `auto` keeps it while it
            fits: dropout and the order of sums depend on it.
    """
    run = estimator.run
    spec = estimator.spec
    machine = estimator.machine
    check_offload(run, machine, estimator.mesh)
    train = run.train
    chosen = choose_micro_batch(estimator, cluster, work, previous_micro_batch)
    memory = chosen.memory
    least = estimator.least_bytes(min(memory.tokens, work.longest), memory.recomputed_layers)
    memory = replace(memory, least=least)
    compiled, compile_reason = machine.compiles
    reference = describe_reference(run)
    why = {
        "attention": machine.attention[1],
        "loss": "head and loss on supervised positions only",
        "base": machine.scaling[1] or "as the recipe says",
        "compile": compile_reason,
        "reference": reference.cost,
        "kernels": "as train.deterministic says",
        "recompute": "as few as fit" if train.recompute == "auto" else "as train.recompute says",
        "weight gradients": "16-bit weights with fp32 masters on one GPU: the products add them "
        "up, unrounded",
        "cpu offload": f"as train.cpu_offload says: {memory.host / 2**30:.1f} GiB of the host's "
        "memory a rank",
        "micro batch": f"{chosen.reason}: about {memory.total / 2**30:.1f} of "
        f"{memory.free / 2**30:.1f} GiB",
    }
    return RunPlan(
        machine.device,
        machine.attention[0],
        kernel=machine.kernel,
        base=estimator.scheme.storage(machine.scaling[0], run.model.dtype),
        layers=spec.depth,
        reference=reference.what,
        compiled=compiled,
        deterministic=train.deterministic,
        recomputed_layers=memory.recomputed_layers,
        streamed_layers=memory.streamed_layers,
        fp32_gradients=estimator.fp32_gradients,
        cpu_offload=estimator.moved,
        warnings=warn_of_dense_experts(estimator),
        layout=layout_of(run, machine, chosen, work.longest),
        memory=memory,
        mesh=estimator.mesh,
        why=why,
    )


def warn_of_dense_experts(estimator: MemoryEstimator) -> tuple[str, ...]:
    """Return a warning if a base in fp8 leaves experts dense that it ships in codes."""
    spec = estimator.spec
    is_dense = estimator.scheme.has_fp8_matmuls and spec.expert_stacks
    if not is_dense or spec.quantized not in KEEPABLE:
        return ()
    return (
        "warning: model.quantize=fp8 leaves experts dense, "
        f"{spec.expert_stacks / spec.parameters:.0%} of the parameters, which ship in "
        f"{spec.quantized.upper()}; fix: model.quantize={AS_SHIPPED}",
    )


def checkpoint_bytes(run: Run, trained: int, base: Path | None) -> tuple[int, int]:
    """Bytes of one checkpoint of `trained` parameters, and how many of them the disk may hold.

    Args:
        base: the folder of the model, of which a vision tower is copied; None: unknown.
    """
    width = 4 if run.adapter.kind == "lora" else DTYPES[run.model.dtype].itemsize
    size = int(trained * (width + checkpoint_bytes_per_parameter(run.train, width)))
    if run.adapter.kind == "none" and base is not None:
        size += bytes_aside(base, trained)
    return size, run.checkpoint.keep + 3  # the one being written, the best one, and final/
