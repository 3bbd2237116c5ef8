"""Choice of values for a machine where the recipe has `auto`: dtype, compile, attention, micro
batch and recomputation.

`calibrate.py` corrects the memory estimate on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith.config.schema import Dtype, Model, Run, Train
from tunesmith.errors import MachineError
from tunesmith.host.chips import Chip
from tunesmith.host.memory import NO_LIMIT
from tunesmith.hub.fetch import fetch_for_tokens
from tunesmith.loss import card_bytes
from tunesmith.model.arch.spec import ModelSpec
from tunesmith.model.known.dtypes import DTYPES
from tunesmith.model.layers import attention
from tunesmith.model.weights.shipped import KEEPABLE, resolve_quantize
from tunesmith.model.weights.stored_form import bytes_of_other_parts
from tunesmith.optim.adamw import checkpoint_bytes_per_parameter
from tunesmith.planning.machines import Cluster
from tunesmith.planning.memory import MemoryEstimator, moved_to_host
from tunesmith.planning.micro_batch import choose_micro_batch, make_layout
from tunesmith.planning.run_plan import DenseExperts, Machine, RunPlan, describe_reference
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
    # Import these types only for type checks, because their modules import Transformers, which is
    # slow and which a plan may not need.
    from tunesmith.hub.model_files import ModelFiles

log = logging.getLogger(__name__)

# Maximum fraction of the free memory for weights during generation. The rest is for the key-value
# cache.
ANSWERING_SHARE = 0.8
# Maximum fraction of the free memory for fp32 weights on a machine without bf16 units.
MAX_FP32_SHARE = 0.5


def resolve_dtype(model: Model, train: Train, chip: Chip, spec: ModelSpec) -> tuple[Dtype, str]:
    """Resolve `model.dtype: auto` on a chip. Return the dtype with the reason. The reason is empty
    if the recipe sets the dtype.

    Args:
        chip: a GPU or `cpu`, with its free memory.

    Raises:
        MachineError: the recipe requires bf16, but the GPU has no bf16 units.
    """
    if model.dtype != "auto":
        return model.dtype, ""
    name = "this CPU" if chip.name == "cpu" else chip.name
    if chip.bf16:
        return "bf16", f"because {name} supports it in hardware"
    if model.quantize == "fp8" or train.master_weights == "stochastic":
        check_bf16("bf16", chip)
        return "bf16", "because model.quantize or train.master_weights needs it"
    # A GPU without bf16 units has fp16 units. A CPU without bf16 units has neither, so it emulates
    # bf16.
    half: Dtype = "bf16" if chip.name == "cpu" else "fp16"
    if half == "fp16" and train.optimizer_in_backward:
        return "fp32", "because train.optimizer_in_backward does not support fp16"
    if scheme_of(resolve_quantize(model, spec.quantized)) is not DENSE:
        return half, f"because the base is quantized, although {name} has no bf16 hardware"
    gib = 4 * spec.parameters / 2**30
    weights = f"fp32 weights ({gib:.2g} GiB)"
    if gib < MAX_FP32_SHARE * chip.gib:
        return "fp32", f"because {name} has no bf16 hardware, and {weights} fit"
    why = f"{weights} leave too little of {chip.gib:.2g} GiB; {name} has no bf16 hardware"
    return half, f"because {why}"


def resolve_dtype_here(model: Model, device: str | torch.device) -> Dtype:
    """Return the dtype of a base on a device of this machine. If it is not bf16, log the choice."""
    from tunesmith.hub.fetch import spec_of_folder

    if model.dtype != "auto":
        return model.dtype
    spec = spec_of_folder(fetch_for_tokens(model), model)
    dtype, reason = resolve_dtype(model, Train(), chip_of(torch.device(device)), spec)
    if dtype != "bf16":
        log.info(f"model.dtype: {dtype}, {reason}")
    return dtype


def check_bf16(dtype: str, chip: Chip) -> None:
    """Raise MachineError if a GPU has no bf16 units. A CPU without bf16 units is accepted, because
    it emulates them.
    """
    if dtype == "bf16" and not chip.bf16 and chip.name != "cpu":
        raise MachineError(
            f"{chip.name} has no bf16 matmuls",
            where="model.dtype",
            why="GPUs older than Ampere do not support bf16",
            fix="set model.dtype=fp16 (the loss is scaled), or model.dtype=fp32",
        )


def attention_backend(run: Run, files: ModelFiles, device: torch.device) -> tuple[str, str]:
    """Choose the attention backend. Return it with the reason. The backend `eager` is Transformers'
    attention on padded rows.
    """
    if run.model.attention == "eager":
        return "eager", "as model.attention says"
    if files.support.state == "padded":
        return "eager", files.support.why
    spec = files.spec
    # Skip layers with a sliding window, because tunesmith's attention kernels do not support it.
    layers = [layer for layer in spec.layers if not layer.window and layer.kv_heads]
    return attention.select_attention_backend(
        device,
        DTYPES[run.model.dtype],
        spec.head_dim,
        group=layers[0].heads // layers[0].kv_heads if layers else 1,
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
    """Test what this machine supports for a run: backends, compiler, memory, fp8 matmuls.

    Args:
        shapes: shapes from `quant.replace.eight_bit_shapes`. Their fp8 matmuls are tested
            with many rows, few rows and one row.
        processes: ids of the run's processes on this host, which share its memory.
        world: number of ranks of the run.
    """
    # Measure the free memory before the trial matmuls, because torch's allocator keeps their memory
    # for the model.
    limit = NO_LIMIT
    if device.type == "cpu":
        return_freed_memory()  # free what the reading of rows and model files has used
        free, size, limit = host_budget(processes)
    else:
        free = free_memory(device)
        size = card_bytes(device)
    scaling = scheme_of(run.model).select_scaling(device, shapes)
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
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        limit=limit,
    )
    return replace(machine, host_link=measure_link(run, machine, world))


def measure_link(run: Run, machine: Machine, world: int) -> float:
    """Measure the host-to-GPU bandwidth in GB/s if frozen layers may be streamed, else return 0."""
    may_stream = world == 1 and not machine.integrated
    if may_stream and "parameters" in moved_to_host(run, machine):
        return host_link(torch.device(machine.device))
    return 0.0


def inference_plan(run: Run, files: ModelFiles, device: torch.device) -> RunPlan:
    """Return the plan of a model that only generates. The plan has no compilation, no recomputation
    and no fp8 matmuls.

    Frozen layers are streamed from the host if the run streamed them and they do not fit. In this
    case a line is logged.
    """
    backend, _ = attention_backend(run, files, device)
    plan = RunPlan(str(device), backend, run.model.dtype, files.spec.depth)
    # The estimator only reads the device and the backend.
    machine = Machine(
        device=str(device), free_bytes=0, attention=(backend, ""), compiles=(False, "")
    )
    estimator = MemoryEstimator(run, files.spec, machine, trained=0)
    if not estimator.streams or not estimator.trains_adapter or is_integrated(device):
        return plan
    room = int(free_memory(device) * ANSWERING_SHARE)
    # `fixed.weights` contains the slots for streamed layers, but not the layers.
    streamed = estimator.count_streamed(room - estimator.fixed.weights)
    if streamed:
        log.info(
            f"{streamed} of {plan.layers} layers are copied from the host's memory for each "
            "token, because the run has train.cpu_offload"
        )
    return replace(plan, streamed_layers=streamed)


def resolve_plan(
    estimator: MemoryEstimator,
    cluster: Cluster,
    work: Workload,
    previous_micro_batch: Size | None = None,
) -> RunPlan:
    """Choose a value for every `auto` of a recipe. Return a plan even if the run does not fit.

    Args:
        estimator: estimator for the recipe, the machine of each rank, and the mesh.
        previous_micro_batch: micro batch of the checkpoint from which a run resumes. If the recipe
            has `auto`, this micro batch is kept if it fits, because dropout and the order of sums
            depend on it.
    """
    run = estimator.run
    spec = estimator.spec
    machine = estimator.machine
    check_offload(run, machine, estimator.mesh)
    train = run.train
    chosen = choose_micro_batch(estimator, cluster, work, previous_micro_batch)
    memory = chosen.memory
    least = estimator.min_step_bytes(min(memory.tokens, work.longest), memory.recomputed_layers)
    memory = replace(memory, least=least)
    compiled, compile_reason = machine.compiles
    reference, reference_cost = describe_reference(run)
    why = {
        "attention": machine.attention[1],
        "loss": "head and loss on supervised positions only",
        "base": machine.scaling[1] or "as the recipe says",
        "compile": compile_reason,
        "reference": reference_cost,
        "kernels": "as train.deterministic says",
        "recompute": "as few as fit" if train.recompute == "auto" else "as train.recompute says",
        "weight gradients": "16-bit weights with fp32 masters on one GPU: the matmuls "
        "accumulate them in fp32",
        "cpu offload": f"as train.cpu_offload says: {memory.host / 2**30:.1f} GiB of the host's "
        "memory per rank",
        "micro batch": f"{chosen.reason}: about {memory.total / 2**30:.1f} of "
        f"{memory.free / 2**30:.1f} GiB",
    }
    warnings: tuple[DenseExperts, ...] = ()
    if estimator.scheme.has_fp8_matmuls and spec.expert_stacks and spec.quantized in KEEPABLE:
        warnings = (DenseExperts(spec.expert_stacks / spec.parameters, spec.quantized),)
    return RunPlan(
        machine.device,
        machine.attention[0],
        kernel=machine.kernel,
        base=estimator.scheme.storage(machine.scaling[0], run.model.dtype),
        layers=spec.depth,
        reference=reference,
        compiled=compiled,
        deterministic=train.deterministic,
        recomputed_layers=memory.recomputed_layers,
        streamed_layers=memory.streamed_layers,
        fp32_gradients=estimator.fp32_gradients,
        cpu_offload=estimator.moved,
        warnings=warnings,
        layout=make_layout(run, machine, chosen, work.longest),
        memory=memory,
        mesh=estimator.mesh,
        why=why,
    )


def checkpoint_bytes(run: Run, trained: int, base: Path | None) -> tuple[int, int]:
    """Return the bytes of one checkpoint, and the maximum number of checkpoints that exist on the
    disk at the same time.

    Args:
        trained: number of trained parameters.
        base: folder of the model, from which the tokenizer and a vision model are copied into
            checkpoints. None if it is unknown.
    """
    width = 4 if run.adapter.kind == "lora" else DTYPES[run.model.dtype].itemsize
    size = int(trained * (width + checkpoint_bytes_per_parameter(run.train, width)))
    if base is not None:
        # The tokenizer is copied into each checkpoint. Its file has tens of megabytes.
        size += sum(file.stat().st_size for file in base.glob("tokenizer*"))
    if run.adapter.kind == "none" and base is not None:
        size += bytes_of_other_parts(base, trained)
    # besides `keep`, three more can exist: the one being written, the best one, and final/
    return size, run.checkpoint.keep + 3
