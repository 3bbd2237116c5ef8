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
DTYPE_FLAGS = {"bf16": "bfloat16", "fp16": "float16"}
# 1 to 5 as numbers
STRATEGIES = (
    "FULL_SHARD",
    "SHARD_GRAD_OP",
    "NO_SHARD",
    "HYBRID_SHARD",
    "HYBRID_SHARD_ZERO2",
)
SIZES = {"DP_REPLICATE_SIZE": "replicate", "DP_SHARD_SIZE": "shard", "TP_SIZE": "tensor"}

# Values that ask for nothing: accelerate sets most variables in every launch.
NOTHING = {"", "false", "no", "none", "default"}
DEFAULTS = {
    "FSDP_MIN_NUM_PARAMS": "100000000", "PARALLELISM_CONFIG_CP_SIZE": "1", "PARALLELISM_CONFIG_CP_BACKEND": "torch",
    "PARALLELISM_CONFIG_SP_SIZE": "1", "PARALLELISM_CONFIG_SP_BACKEND": "deepspeed",
}  # fmt: skip

GROUPS = "each decoder layer is a group, and embedding and head are one"
READING = "each rank always reads only the part of the weights that it holds"
AHEAD = "FSDP2 gathers the next group ahead by itself"
UNCUT = "a sequence is not cut over ranks"
IGNORED = {
    "FSDP_AUTO_WRAP_POLICY": GROUPS,
    "FSDP_TRANSFORMER_CLS_TO_WRAP": GROUPS,
    "FSDP_MIN_NUM_PARAMS": GROUPS,
    "FSDP_IGNORED_MODULES": GROUPS,
    "FSDP_BACKWARD_PREFETCH": AHEAD,
    "FSDP_FORWARD_PREFETCH": AHEAD,
    "FSDP_STATE_DICT_TYPE": "what is written are the files of PEFT or Transformers; checkpoints on the way hold shards",
    "FSDP_USE_ORIG_PARAMS": "FSDP2 always keeps them",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": READING,
    "FSDP_SYNC_MODULE_STATES": READING,
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed is not used; ranks shard where memory needs it",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not used",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "ACCELERATE_USE_FSDP is not true",
    "ACCELERATE_CPU_AFFINITY": "threads are not bound to cores",
    "ACCELERATE_DEBUG_MODE": "TUNESMITH_DEBUG=1 shows tracebacks",
    "PARALLELISM_CONFIG_CP_SIZE": UNCUT,
    "PARALLELISM_CONFIG_SP_SIZE": UNCUT,
}
UNKNOWN = "it has no counterpart here"


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


class _Reader:
    """Takes variables one by one; what nobody took is ignored."""

    def __init__(self, environ: Mapping[str, str], given: Set[str]) -> None:
        self.left = {name: value for name, value in environ.items() if name.startswith(PREFIXES)}
        self.given, self.found = given, LauncherSettings()

    def take(self, name: str) -> str:
        return self.left.pop(name, "")

    def is_true(self, name: str) -> bool:
        return self.take(name).lower() in ("true", "1", "yes")

    def honour(self, name: str, value: str, result: str) -> None:
        self.found.lines.append(f"{name}={value}: {result}")

    def ignore(self, name: str, value: str, why: str) -> None:
        self.found.lines.append(f"{name}={value} is ignored: {why}")

    def set_flag(self, flag: str, wanted: str | int | bool, name: str, value: str) -> None:
        """Set a flag of the script, unless it was given on the command line."""
        if flag in self.given:
            self.ignore(name, value, f"--{flag} is given")
        else:
            self.found.flags[flag] = wanted
            self.honour(name, value, f"--{flag}" if wanted is True else f"--{flag} {wanted}")

    def ignore_the_rest(self, *, fsdp: bool) -> None:
        for name, value in sorted(self.left.items()):
            if value.lower() not in NOTHING and DEFAULTS.get(name) != value:
                unused = not fsdp and name.startswith("FSDP_")
                self.ignore(
                    name,
                    value,
                    "ACCELERATE_USE_FSDP is not true" if unused else IGNORED.get(name, UNKNOWN),
                )


def read_launcher(
    environ: Mapping[str, str], given: Set[str], *, world: int, local_world: int
) -> LauncherSettings:
    """What accelerate's variables in `environ` ask for.

    Args:
        given: flags of the script that were typed, without dashes.
        world, local_world: ranks, and those of this node.
    """
    read = _Reader(environ, given)
    _compute(read)
    if fsdp := read.is_true("ACCELERATE_USE_FSDP"):
        _memory(read)
        _strategy(read, world, local_world)
        _sizes(read, world)
    read.ignore_the_rest(fsdp=fsdp)
    return read.found


def _compute(read: _Reader) -> None:
    name = "ACCELERATE_MIXED_PRECISION"
    if dtype := DTYPE_FLAGS.get(value := read.take(name)):
        read.set_flag("dtype", dtype, name, value)
    elif value not in ("", "no"):
        read.ignore(
            name,
            value,
            "--dtype says what is computed in; a recipe's model.quantize has a base in fp8",
        )
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    if (value := read.take(name)).isdecimal() and int(value) > 1:
        read.set_flag("gradient_accumulation_steps", int(value), name, value)
    name = "ACCELERATE_DYNAMO_BACKEND"
    if (value := read.take(name)).upper() == "INDUCTOR":
        read.set_flag("use_torch_compile", True, name, value)
    elif value.upper() not in ("", "NO"):
        read.ignore(name, value, "torch.compile runs with inductor or not at all")
    if read.is_true(name := "ACCELERATE_USE_CPU"):
        read.found.on_cpu = True
        read.honour(name, "true", "no GPU is used")


def _memory(read: _Reader) -> None:
    if read.is_true(name := "FSDP_ACTIVATION_CHECKPOINTING"):
        read.set_flag("gradient_checkpointing", True, name, "true")
    if read.is_true(name := "FSDP_OFFLOAD_PARAMS"):
        read.found.offload += ("parameters",)
        read.honour(name, "true", "train.cpu_offload parameters")
    if read.is_true(name := "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"):
        read.found.offload += ("activations",)
        read.honour(name, "true", "train.cpu_offload activations")


def _strategy(read: _Reader, world: int, local_world: int) -> None:
    """The mesh of FSDP 1, which has five strategies, or of FSDP 2, which shards over all ranks."""
    version, reshards = (
        read.take("FSDP_VERSION") or "1",
        read.take("FSDP_RESHARD_AFTER_FORWARD").lower(),
    )
    name, value = "FSDP_SHARDING_STRATEGY", read.take("FSDP_SHARDING_STRATEGY")
    number = int(value) - 1 if value in ("1", "2", "3", "4", "5") else -1
    strategy = STRATEGIES[number] if number >= 0 else value.upper()
    gathered = (
        "the layers' weights are always gathered again in the backward, which takes less memory"
    )
    shard = world
    if version == "1":
        shard = {"NO_SHARD": 1, "HYBRID_SHARD": local_world, "HYBRID_SHARD_ZERO2": local_world}.get(
            strategy, world
        )
        read.ignore("FSDP_VERSION", version, "shards are those of FSDP 2")
    elif strategy not in ("", "FULL_SHARD"):
        read.ignore(name, value, "FSDP 2 reads FSDP_RESHARD_AFTER_FORWARD in its place")
    if version != "1" and reshards == "false":
        read.ignore("FSDP_RESHARD_AFTER_FORWARD", reshards, gathered)
    mesh = f"parallel.replicate {world // shard}, parallel.shard {shard}"
    if version == "1" and strategy in ("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2"):
        mesh += f"; {gathered}"
    read.honour(*((name, value) if version == "1" else ("FSDP_VERSION", version)), mesh)
    read.found.parallel = Parallel(replicate=world // shard, shard=shard)


def _sizes(read: _Reader, world: int) -> None:
    """The mesh that a `parallelism_config` names, if its sizes multiply to the ranks that there
    are.
    """
    if not read.is_true("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return
    named = {key: read.take(f"PARALLELISM_CONFIG_{size}") or "1" for size, key in SIZES.items()}
    replicate, shard, tensor = (int(value) if value.isdecimal() else 0 for value in named.values())
    fits = replicate * shard * tensor == world
    for (key, value), size in zip(named.items(), SIZES, strict=True):
        if value != "1" and fits:
            read.honour(f"PARALLELISM_CONFIG_{size}", value, f"parallel.{key} {value}")
        elif value != "1":
            why = f"the sizes multiply to {replicate * shard * tensor}, and the ranks are {world}"
            read.ignore(f"PARALLELISM_CONFIG_{size}", value, why)
    if fits:
        read.found.parallel = Parallel(replicate=replicate, shard=shard, tensor=tensor)
