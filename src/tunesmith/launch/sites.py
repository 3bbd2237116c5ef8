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

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Predicate
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from tunesmith.config.names import nearest
from tunesmith.config.tree import read_file
from tunesmith.errors import RecipeError, UsageError

# Passed on to sbatch
DIRECTIVES = (
    "partition",
    "account",
    "qos",
    "time",
    "constraint",
    "mem",
    "cpus_per_task",
)
WANTED = {
    "setup": "a list of lines",
    "sbatch": "a list of options",
    "environment": "NAME: value",
    "exclusive": "true",
}
Word = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
Name = Annotated[str, Predicate(str.isidentifier), Predicate(str.isascii)]
Text = Annotated[str, BeforeValidator(str)]


@dataclass(frozen=True)
class Site:
    """What a job asks of Slurm, from a profile and from flags; None is not asked for."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    time: Word | None = None
    constraint: Word | None = None
    mem: Word | None = None
    cpus_per_task: Word | None = None
    gpus_per_node: Word | None = None
    container: Word | None = None
    exclusive: bool = False
    setup: tuple[str, ...] = ()
    environment: dict[Name, Text] = field(default_factory=dict)
    sbatch: tuple[str, ...] = ()


def read_site(name: str | None) -> Site:
    """The profile of that name, or an empty one without a name; RecipeError with the line of what is wrong in the file."""
    if name is None:
        return Site()
    file = sites_file()
    if not file.is_file():
        fix = f"write it: {name}: {{partition: gpu, account: my-project}}"
        raise UsageError(
            f"there is no site {name!r}: the file of sites is missing", where=str(file), fix=fix
        )
    sites = dict(read_file(file).children())
    if name not in sites:
        near = nearest(name, sites)
        fix = f"did you mean {near}?" if near else f"one of {', '.join(sites)}"
        raise UsageError(f"there is no site {name!r}", where=str(file), fix=fix)
    given = dict(sites[name].children())
    try:  # in JSON a list is a tuple
        return TypeAdapter(Site).validate_json(
            json.dumps({key: node.plain() for key, node in given.items()})
        )
    except ValidationError as error:
        key, known = str(error.errors()[0]["loc"][0]), [spec.name for spec in fields(Site)]
        what, fix = (
            f"{key} takes {WANTED.get(key, 'one word or number')}",
            f"see {key} in docs/slurm.md",
        )
        if key not in known:
            what, near = f"there is no key {key!r} in a site", nearest(key, known)
            fix = f"did you mean {near}?" if near else f"a site has {', '.join(known)}"
        raise RecipeError(what, where=given[key].where, fix=fix) from None


def sites_file() -> Path:
    """`$XDG_CONFIG_HOME/tunesmith/sites.yaml`, else below `~/.config`."""
    return (
        Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
        / "tunesmith"
        / "sites.yaml"
    )
