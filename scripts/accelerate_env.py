"""What `accelerate launch` tells a script through its environment, in the words of the scripts'
flags and of a recipe.

accelerate writes its config file and its own flags into variables: ACCELERATE_*, FSDP_*,
PARALLELISM_CONFIG_*, MEGATRON_LM_*. Each that asks for something is either honoured or named as
ignored, with the reason, in one line. A flag of the script wins over a variable.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Literal

from tunesmith.config.schema import Parallel

PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")
TRUE = ("true", "1", "yes")
# Values that ask for nothing: accelerate sets most variables in every launch.
NOTHING = {"", "false", "no", "none", "default"}
DEFAULTS = {
    "FSDP_MIN_NUM_PARAMS": "100000000", "PARALLELISM_CONFIG_CP_SIZE": "1", "PARALLELISM_CONFIG_CP_BACKEND": "torch",
    "PARALLELISM_CONFIG_SP_SIZE": "1", "PARALLELISM_CONFIG_SP_BACKEND": "deepspeed",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
}  # fmt: skip
# Variable -> the flag that it sets, and the flag's value for each of its own
FLAGS: dict[str, tuple[str, dict[str, str | bool]]] = {
    "ACCELERATE_MIXED_PRECISION": ("dtype", {"bf16": "bfloat16", "fp16": "float16"}),
    "ACCELERATE_DYNAMO_BACKEND": ("use_torch_compile", {"inductor": True}),
    "FSDP_ACTIVATION_CHECKPOINTING": ("gradient_checkpointing", dict.fromkeys(TRUE, True)),
}
OFFLOADS: dict[str, Literal["parameters", "activations"]] = {
    "FSDP_OFFLOAD_PARAMS": "parameters",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "activations",
}
SIZES = {"DP_REPLICATE_SIZE": "replicate", "DP_SHARD_SIZE": "shard", "TP_SIZE": "tensor"}
# 1 to 5 as numbers
STRATEGIES = (
    "FULL_SHARD",
    "SHARD_GRAD_OP",
    "NO_SHARD",
    "HYBRID_SHARD",
    "HYBRID_SHARD_ZERO2",
)
WITHOUT_FSDP = "ACCELERATE_USE_FSDP is not true"
GATHERED = "the layers' weights are always gathered again in the backward, which takes less memory"
# Why a variable is ignored, by the beginning of its name; the last one has any name
IGNORED = {
    "FSDP_VERSION": "shards are those of FSDP 2",
    "FSDP_SHARDING_STRATEGY": "FSDP 2 reads FSDP_RESHARD_AFTER_FORWARD in its place",
    "FSDP_STATE_DICT_TYPE": "the result is in files of PEFT or Transformers",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "each rank reads its own part of the weights",
    "FSDP_SYNC_MODULE_STATES": "each rank reads its own part of the weights",
    "FSDP_": "each decoder layer is a group of FSDP2, which gathers the next one ahead",
    "ACCELERATE_MIXED_PRECISION": "--dtype says what is computed in",
    "ACCELERATE_DYNAMO_BACKEND": "torch.compile runs with inductor or not at all",
    "ACCELERATE_DEBUG_MODE": "TUNESMITH_DEBUG=1 shows tracebacks",
    "PARALLELISM_CONFIG_": "a sequence is not cut over ranks",
    "": "it has no counterpart here",
}


@dataclass
class LauncherSettings:
    """What the variables ask for.

    Attributes:
        flags: flags of the script that they set, by name without dashes.
        parallel: the mesh; auto where nothing asks for one.
        offload: values of `train.cpu_offload`.
        on_cpu: no GPU may be used.
        lines: what is said about each variable.
    """

    flags: dict[str, str | int | bool] = field(default_factory=dict)
    parallel: Parallel = field(default_factory=Parallel)
    offload: tuple[Literal["parameters", "activations"], ...] = ()
    on_cpu: bool = False
    lines: list[str] = field(default_factory=list)


def read_launcher(
    environ: Mapping[str, str], given: Set[str], *, world: int, local_world: int
) -> LauncherSettings:
    """What accelerate's variables in `environ` ask for.

    Args:
        given: flags of the script that were typed, without dashes.
        world, local_world: ranks, and those of this node.
    """
    left = {name: value for name, value in environ.items() if name.startswith(PREFIXES)}
    found = LauncherSettings()
    uses_fsdp = left.pop("ACCELERATE_USE_FSDP", "").lower() in TRUE
    uses_sizes = left.pop("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() in TRUE
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    wanted: dict[str, tuple[str, str | int | bool]] = {}
    if left.get(name, "1") != "1" and left[name].isdecimal():
        wanted[name] = ("gradient_accumulation_steps", int(left[name]))
    for name, (flag, values) in FLAGS.items():
        if left.get(name, "").lower() in values and (uses_fsdp or not name.startswith("FSDP_")):
            wanted[name] = (flag, values[left[name].lower()])
    for name, (flag, setting) in wanted.items():
        value = left.pop(name)
        if flag in given:
            found.lines.append(f"{name}={value} is ignored: --{flag} is given")
        else:
            found.flags[flag] = setting
            found.lines.append(
                f"{name}={value}: --{flag}" + ("" if setting is True else f" {setting}")
            )
    if left.get("ACCELERATE_USE_CPU", "").lower() in TRUE:
        found.on_cpu = True
        found.lines.append(f"ACCELERATE_USE_CPU={left.pop('ACCELERATE_USE_CPU')}: no GPU is used")
    if uses_fsdp:
        for name, kind in OFFLOADS.items():
            if left.get(name, "").lower() in TRUE:
                found.offload += (kind,)
                found.lines.append(f"{name}={left.pop(name)}: train.cpu_offload {kind}")
        _read_strategy(left, found, world, local_world)
        if uses_sizes:
            _read_sizes(left, found, world)
    for name, value in sorted(left.items()):
        asks = value.lower() not in NOTHING and DEFAULTS.get(name) != value
        if asks:
            why = next(why for begin, why in IGNORED.items() if name.startswith(begin))
            if name.startswith("FSDP_") and not uses_fsdp:
                why = WITHOUT_FSDP
            found.lines.append(f"{name}={value} is ignored: {why}")
    return found


def _read_strategy(
    left: dict[str, str], found: LauncherSettings, world: int, local_world: int
) -> None:
    """The mesh of FSDP 1, which has five strategies, or of FSDP 2, which shards over all ranks."""
    name, shard, more = "FSDP_VERSION", world, ""
    reshards = left.pop("FSDP_RESHARD_AFTER_FORWARD", "")
    if left.get(name, "1") == "1":
        name = "FSDP_SHARDING_STRATEGY"
        value = left.get(name, "")
        strategy = STRATEGIES[int(value) - 1] if value in "12345" and value else value.upper()
        if strategy == "NO_SHARD":
            shard = 1
        elif strategy.startswith("HYBRID"):
            shard = local_world
        if strategy in ("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2"):
            more = f"; {GATHERED}"
    elif reshards.lower() == "false":
        found.lines.append(f"FSDP_RESHARD_AFTER_FORWARD={reshards} is ignored: {GATHERED}")
    value = left.pop(name, "")
    mesh = f"parallel.replicate {world // shard}, parallel.shard {shard}"
    found.lines.append(f"{name}={value}: {mesh}{more}")
    found.parallel = Parallel(replicate=world // shard, shard=shard)


def _read_sizes(left: dict[str, str], found: LauncherSettings, world: int) -> None:
    """The mesh that a `parallelism_config` names, if its sizes multiply to the ranks."""
    named = {size: left.pop(f"PARALLELISM_CONFIG_{size}", "1") for size in SIZES}
    replicate, shard, tensor = (int(text) if text.isdecimal() else 0 for text in named.values())
    product = replicate * shard * tensor
    for size, text in named.items():
        line = f"PARALLELISM_CONFIG_{size}={text}"
        if product != world:
            line += f" is ignored: the sizes multiply to {product}, and the ranks are {world}"
        else:
            line += f": parallel.{SIZES[size]} {text}"
        if text != "1":
            found.lines.append(line)
    if product == world:
        found.parallel = Parallel(replicate=replicate, shard=shard, tensor=tensor)
