"""Site profiles: what a cluster wants of each job, written once in `~/.config/tunesmith/sites.yaml`.

    alps:
      partition: gpu
      account: my-project
      gpus_per_node: 4
      cpus_per_task: 64
      setup: [module load cuda]               # lines of the job's script, as they are
      environment: {NCCL_IB_HCA: mlx5}
      sbatch: [--reservation=tuesday]         # directives, as they are

The flags of `tunesmith launch slurm` win over a profile. `setup` and `sbatch` are the user's own lines and stand in the script
unchanged; every other value is quoted there.
"""

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tunesmith.config.names import nearest
from tunesmith.config.tree import Node, read_file
from tunesmith.errors import RecipeError, UsageError

DIRECTIVES = ("partition", "account", "qos", "time", "constraint", "mem", "cpus_per_task")  # passed on to sbatch
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class Site:
    """What a job asks of Slurm, from a profile and from flags; None is not asked for."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    constraint: str | None = None
    mem: str | None = None
    cpus_per_task: str | None = None
    gpus_per_node: str | None = None
    container: str | None = None
    exclusive: bool = False
    setup: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    sbatch: tuple[str, ...] = ()


def read_site(name: str | None) -> Site:
    """The profile of that name, or an empty one without a name; RecipeError with the line of what is wrong in the file."""
    if name is None:
        return Site()
    file = sites_file()
    if not file.is_file():
        fix = f"write it: {name}: {{partition: gpu, account: my-project}}"
        raise UsageError(f"there is no site {name!r}: the file of sites is missing", where=str(file), fix=fix)
    sites = dict(read_file(file).children())
    if name not in sites:
        near = nearest(name, sites)
        fix = f"did you mean {near}?" if near else f"one of {', '.join(sites)}"
        raise UsageError(f"there is no site {name!r}", where=str(file), fix=fix)
    return Site(**{key: _value(key, node) for key, node in sites[name].children()})


def sites_file() -> Path:
    """`$XDG_CONFIG_HOME/tunesmith/sites.yaml`, else below `~/.config`."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "tunesmith" / "sites.yaml"


def _value(key: str, node: Node) -> Any:
    """The value of a profile's key in the type that Site has for it."""
    known, value = {spec.name: spec for spec in fields(Site)}, node.plain()
    if key not in known:
        near = nearest(key, known)
        fix = f"did you mean {near}?" if near else f"a site has {', '.join(known)}"
        raise RecipeError(f"there is no key {key!r} in a site", where=node.where, fix=fix)
    kind, scalar = known[key].type, isinstance(value, str | int) and not isinstance(value, bool)
    if kind is bool and isinstance(value, bool):
        return value
    if kind == str | None and scalar:
        return str(value)
    if key in ("setup", "sbatch") and isinstance(value, list) and all(isinstance(line, str) for line in value):
        return tuple(value)
    if key == "environment" and isinstance(value, dict) and all(map(_NAME.fullmatch, value)):
        return {name: str(text) for name, text in value.items()}
    wanted = {
        "setup": "a list of lines",
        "sbatch": "a list of options",
        "environment": "NAME: value",
        "exclusive": "true",
    }
    raise RecipeError(
        f"{key} takes {wanted.get(key, 'one word or number')}", where=node.where, fix=f"see {key} in docs/slurm.md"
    )
