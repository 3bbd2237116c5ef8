"""Check of a plan against the memory of its machine, and settings that need less memory."""

from dataclasses import replace

from tunesmith.config.check import find_problems
from tunesmith.config.dump import differences, yaml_value
from tunesmith.config.schema import Run
from tunesmith.config.yaml_file import RecipeLayer
from tunesmith.errors import MachineError, RecipeError
from tunesmith.host.shell import shell_word
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning.memory import USABLE_CPU_SHARE, moved_to_host
from tunesmith.planning.run_plan import Machine, Overrun, RunPlan
from tunesmith.tokens.tokenize import too_long_of

# Maximum fraction of the memory that a plan may need. A plan that needs more is rejected. The
# estimate of weights, gradients and moments is exact. The estimate of activations was 1.5 % too
# small in the one comparison with a GPU. Memory that the allocator cannot use takes a few percent
# (not measured).
ALLOCATABLE_SHARE = 0.97
MIN_SEQ_LEN = 128  # minimum data.seq_len that is proposed; a shorter one truncates most answers

Keys = dict[str, object]  # recipe keys in dotted form, with new values
FULL_SETTINGS: tuple[Keys, ...] = (
    {"train.optimizer": "adamw-8bit"},
    {"train.master_weights": "stochastic"},
    {"train.optimizer_in_backward": True, "train.clip_norm": None},
)
ADAPTER_KEYS: Keys = {
    "adapter.kind": "lora",
    "train.master_weights": "fp32",
    "train.optimizer_in_backward": False,
}


def find_savings(run: Run, plan: RunPlan) -> dict[str, bool]:
    """Return settings with which a run needs less memory, in the order in which to try them.

    The keys are the settings as arguments of the command line. A value is True if a run can resume
    with the setting. A setting is left out if the recipe has it already, or if the recipe's rules
    refuse it.
    """
    savings = {}
    for keys in _smaller_settings(run, plan):
        changed = run
        for key, value in keys.items():
            section, name = key.split(".")
            values = replace(getattr(changed, section), **{name: value})
            changed = replace(changed, **{section: values})
        changes = differences(run, changed)
        if changes and not find_problems(changed, RecipeLayer({}, {"": ""})):
            words = [f"{change.key}={shell_word(yaml_value(change.new))}" for change in changes]
            savings[" ".join(words)] = all(change.allowed for change in changes)
    return savings


def _smaller_settings(run: Run, plan: RunPlan) -> list[Keys]:
    """Return the keys of all settings that may save memory."""
    batch = run.train.global_batch
    # An update in the backward has only one micro batch per step.
    smaller_batch: Keys = {"train.micro_batch": "auto"}
    if run.train.optimizer_in_backward:
        smaller_batch = {"train.global_batch": replace(batch, amount=max(1, batch.amount // 2))}
    shorter: Keys = {"data.seq_len": max(MIN_SEQ_LEN, run.data.seq_len // 2)}
    is_split = all(too_long_of(source, run.data) == "split" for source in run.data.train)
    if not run.data.allow_cut_answers and not is_split:
        shorter["data.too_long"] = "drop"  # a run refuses truncated answers

    settings: list[Keys] = []
    if plan.mesh.world > 1:
        settings.append({"parallel.tensor": "auto"})
    # Fewer activations are not enough if the weights alone do not fit.
    may_fit = plan.memory.static < plan.memory.free
    if may_fit:
        settings.append(smaller_batch)
    if may_fit and plan.recomputed_layers < plan.layers:
        settings.append({"train.recompute": "full"})
    if run.adapter.kind == "none":
        settings += FULL_SETTINGS
    elif run.model.quantize in ("auto", "none", "fp8"):
        settings.append({"model.quantize": "nf4"})
    if may_fit:
        settings.append(shorter)
    if run.adapter.kind == "none":
        settings.append(ADAPTER_KEYS)
    elif plan.mesh.world == 1 and plan.device != "cpu":
        # Streaming is last, because it takes time. Several ranks can shard the model instead.
        offloaded = dict.fromkeys((*run.train.cpu_offload, "parameters"))
        settings.append({"train.cpu_offload": tuple(offloaded)})
    return settings


def less_memory(run: Run, plan: RunPlan, *, resumed: bool = False) -> str:
    """Return advice for a run that does not fit. `resumed`: whether the run has a checkpoint."""
    savings = find_savings(run, plan)
    if not savings:
        return "use a smaller model, more GPUs, or a device with more memory"
    resumable = [words for words, resumes in savings.items() if resumes]
    chosen = resumable if resumed and resumable else list(savings)
    # Separate the choices with "; or ", so that a long fix is printed with one choice per line.
    advice = f"set {'; or '.join(chosen)}"
    if len(chosen) > 1:
        advice += "; or several of these"
    return f"{advice} with --fresh" if resumed and not resumable else advice


def check_memory_fits(
    run: Run,
    plan: RunPlan,
    machine: Machine,
    *,
    resumed: bool = False,
    where: str = "",
) -> None:
    """Raise MachineError if a plan needs more memory than the machine has.

    Args:
        resumed: whether the run is resumed, so that its micro batch can no longer be changed.
        where: name of the machine for the error, if the plan is not for this machine. If empty, the
            error names the plan's device.
    """
    if not _exceeds(plan, machine):
        return
    needed, available = memory_needs(plan, machine)
    layout = f"micro batch of {plan.choices['micro batch']}, recompute {plan.choices['recompute']}"
    if plan.mesh.world > 1:
        layout = f"{plan.mesh.describe()}, {layout}"
    if not where:
        where = ", ".join(filter(None, [plan.device, machine.limit.describe()]))
    why = f"{plan.memory.describe()}; {layout}"
    recipe, reason = machine.scaling
    # A reason without a scaling recipe: fp8 was requested, but the machine does not support it.
    if reason and recipe is None:
        why += f"; the base stays in {plan.base}: {reason}"
    raise MachineError(
        f"the run does not fit: it needs about {needed / 2**30:.1f} GiB, and "
        f"{available / 2**30:.1f} GiB can be used",
        where=where,
        why=why,
        fix=_ways_to_fit(run, plan, machine, resumed=resumed),
    )


def find_overrun(
    run: Run, plan: RunPlan, machine: Machine, *, resumed: bool = False
) -> Overrun | None:
    """Return a warning if a run on a CPU may need more memory than is available."""
    if not _may_overrun(plan, machine):
        return None
    return Overrun(machine.limit, _ways_to_fit(run, plan, machine, resumed=resumed))


def _exceeds(plan: RunPlan, machine: Machine) -> bool:
    needed, available = memory_needs(plan, machine)
    # `available` is 0 if the memory of the machine is unknown.
    return bool(available) and needed > available


def _may_overrun(plan: RunPlan, machine: Machine) -> bool:
    """Return whether a run on a CPU may need more memory than is available now."""
    if machine.device != "cpu" or not machine.card_bytes:
        return False
    return plan.memory.step > machine.free_bytes * USABLE_CPU_SHARE


def _ways_to_fit(run: Run, plan: RunPlan, machine: Machine, *, resumed: bool) -> str:
    """Return advice for the user: keys with which the run needs less memory, and how to raise the
    memory limit of the process.
    """
    keys = less_memory(run, plan, resumed=resumed)
    # The limit must be higher than the estimate, because a plan uses only USABLE_CPU_SHARE of it.
    missing = int(plan.memory.total / USABLE_CPU_SHARE) - machine.free_bytes
    larger = machine.limit.fix(max(0, missing))
    return f"{keys}; or {larger}" if larger else keys


def memory_needs(plan: RunPlan, machine: Machine) -> tuple[int, int]:
    """Return the bytes that a plan needs at least, and the available bytes (0 if unknown).

    On a CPU, free memory can grow when other programs end, and micro batches may be smaller than
    planned. Therefore the minimum need is compared with all memory that the process could ever use.
    The minimum need is the static part, or a step on only the longest example if that is more.
    """
    memory = plan.memory
    if plan.device.startswith("cuda"):
        needed = max(memory.step, memory.rollouts)
        return needed, int(machine.free_bytes * ALLOCATABLE_SHARE)
    return max(memory.static - memory.copies, memory.least, memory.rollouts), machine.card_bytes


def check_offload(run: Run, machine: Machine, mesh: MeshShape) -> None:
    """Raise RecipeError if the GPU or the mesh does not support `train.cpu_offload`.

    On a CPU the key has no effect.
    """
    moved = moved_to_host(run, machine)
    if moved and machine.integrated:
        raise RecipeError(
            "offloading saves no memory, because this GPU shares the host's memory",
            where="train.cpu_offload",
            fix="set train.cpu_offload=[]",
        )
    if "parameters" not in moved or mesh.world > 1:
        return
    if run.adapter.kind == "none":
        raise RecipeError(
            "a single process can offload only frozen parameters",
            where="train.cpu_offload",
            why="full fine-tuning would have to offload gradients and moments too, which FSDP2 "
            "supports only with several ranks",
            fix="set train.cpu_offload=[] and train.optimizer=adamw-8bit, or use several ranks, or "
            "set adapter.kind=lora",
        )
