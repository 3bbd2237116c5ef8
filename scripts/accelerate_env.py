"""Conversion of the settings of `accelerate launch` into flags of the scripts and keys of a recipe.

accelerate passes its config file and its own flags to a script in environment variables:
ACCELERATE_*, FSDP_*, PARALLELISM_CONFIG_* and MEGATRON_LM_*. For each variable that requests
something, one line says which flag or key the variable sets, or why the variable is ignored. A flag
of the script overrides a variable.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Literal

from tunesmith.config.schema import Parallel

PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")
TRUE = ("true", "1", "yes")
# Values that request nothing. accelerate sets most of the variables at every launch.
NOTHING = {"", "false", "no", "none", "default"}
# Default values of accelerate. They request nothing either.
DEFAULTS = {
    "FSDP_MIN_NUM_PARAMS": "100000000", "PARALLELISM_CONFIG_CP_SIZE": "1", "PARALLELISM_CONFIG_CP_BACKEND": "torch",
    "PARALLELISM_CONFIG_SP_SIZE": "1", "PARALLELISM_CONFIG_SP_BACKEND": "deepspeed",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
}  # fmt: skip
# For each variable: the flag that the variable sets, and the flag's value for each value of the
# variable.
FLAGS: dict[str, tuple[str, dict[str, str | bool]]] = {
    "ACCELERATE_MIXED_PRECISION": ("dtype", {"bf16": "bfloat16", "fp16": "float16"}),
    "ACCELERATE_DYNAMO_BACKEND": ("use_torch_compile", {"inductor": True}),
    "FSDP_ACTIVATION_CHECKPOINTING": ("gradient_checkpointing", dict.fromkeys(TRUE, True)),
}
# For each variable: the value that the variable adds to `train.cpu_offload`.
OFFLOADS: dict[str, Literal["parameters", "activations"]] = {
    "FSDP_OFFLOAD_PARAMS": "parameters",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "activations",
}
# For each size of accelerate's mesh: the key of the recipe's section `parallel`.
SIZES = {"DP_REPLICATE_SIZE": "replicate", "DP_SHARD_SIZE": "shard", "TP_SIZE": "tensor"}
# Sharding strategies of FSDP1. Their position in the tuple is their number, from 1 to 5.
STRATEGIES = (
    "FULL_SHARD",
    "SHARD_GRAD_OP",
    "NO_SHARD",
    "HYBRID_SHARD",
    "HYBRID_SHARD_ZERO2",
)
WITHOUT_FSDP = "ACCELERATE_USE_FSDP is not true"
GATHERED = "the weights of a layer are always gathered again in the backward pass, to save memory"
# Reasons why a variable is ignored, by the prefix of its name. The first matching prefix is used.
# The empty prefix matches every name.
IGNORED = {
    "FSDP_VERSION": "tunesmith always shards with FSDP2",
    "FSDP_SHARDING_STRATEGY": "FSDP2 uses FSDP_RESHARD_AFTER_FORWARD instead",
    "FSDP_STATE_DICT_TYPE": "the result is saved in the file format of PEFT or Transformers",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "each rank reads its own shard of the weights",
    "FSDP_SYNC_MODULE_STATES": "each rank reads its own shard of the weights",
    "FSDP_": "each decoder layer is one FSDP2 group, and FSDP2 prefetches the next group",
    "ACCELERATE_MIXED_PRECISION": "use --dtype to select the dtype",
    "ACCELERATE_DYNAMO_BACKEND": "torch.compile is supported only with the backend inductor",
    "ACCELERATE_DEBUG_MODE": "use TUNESMITH_DEBUG=1 to show tracebacks",
    "PARALLELISM_CONFIG_": "sequences are not split across ranks",
    "": "tunesmith has no equivalent setting",
}


@dataclass
class LauncherSettings:
    """Settings that the launcher's variables request.

    Attributes:
        flags: the script's flags that the variables set, by name without dashes.
        parallel: the mesh. The default if no variable requests a mesh.
        offload: the values of `train.cpu_offload`.
        on_cpu: whether GPUs must not be used.
        lines: one message for each variable that requests something.
    """

    flags: dict[str, str | int | bool] = field(default_factory=dict)
    parallel: Parallel = field(default_factory=Parallel)
    offload: tuple[Literal["parameters", "activations"], ...] = ()
    on_cpu: bool = False
    lines: list[str] = field(default_factory=list)


def read_launcher(
    environ: Mapping[str, str], given: Set[str], *, world: int, local_world: int
) -> LauncherSettings:
    """Return the settings that accelerate's variables in `environ` request.

    Args:
        given: the script's flags that the user typed, without dashes.
        world: number of ranks.
        local_world: number of ranks on this node.
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
            found.lines.append(f"{name}={value} is ignored: --{flag} overrides it")
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
    """Set `found.parallel` from the variables of FSDP.

    FSDP1 has five sharding strategies. FSDP2 shards over all ranks.
    """
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
    """Set `found.parallel` from the sizes of a `parallelism_config`.

    The sizes are ignored if their product is not the number of ranks.
    """
    named = {size: left.pop(f"PARALLELISM_CONFIG_{size}", "1") for size in SIZES}
    replicate, shard, tensor = (int(text) if text.isdecimal() else 0 for text in named.values())
    product = replicate * shard * tensor
    for size, text in named.items():
        line = f"PARALLELISM_CONFIG_{size}={text}"
        if product != world:
            line += (
                f" is ignored: the product of the sizes is {product}, but there are {world} ranks"
            )
        else:
            line += f": parallel.{SIZES[size]} {text}"
        if text != "1":
            found.lines.append(line)
    if product == world:
        found.parallel = Parallel(replicate=replicate, shard=shard, tensor=tensor)
