"""Site profiles: what a cluster wants of each job, in `~/.config/tunesmith/sites.yaml`.

    alps:
      partition: gpu
      account: my-project
      gpus_per_node: 4
      cpus_per_task: 64
      setup: [module load cuda]               # lines of the job's script, as they are
      environment: {NCCL_IB_HCA: mlx5}
      sbatch: [--reservation=tuesday]         # directives, as they are

The flags of `tunesmith launch slurm` win over a profile. `setup` and `sbatch` are the user's own
lines and stand in the script unchanged; every other value is quoted there.
"""

import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Predicate
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from tunesmith.config.names import nearest
from tunesmith.config.tree import read_file
from tunesmith.errors import RecipeError, UsageError

# Passed on to sbatch
DIRECTIVES = ("partition", "account", "qos", "time", "constraint", "mem", "cpus_per_task")
# What a key takes that is not one word or number
EXPECTED = {
    "setup": "a list of lines",
    "sbatch": "a list of options",
    "environment": "NAME: value",
    "exclusive": "true",
}
# YAML reads `account: 4711` as a number.
Word = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
Name = Annotated[str, Predicate(str.isidentifier), Predicate(str.isascii)]
Text = Annotated[str, BeforeValidator(str)]


@dataclass(frozen=True)
class Site:
    """What a job requests from Slurm, from a profile and from flags; None: no request."""

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
    """The profile of that name, or an empty one without a name.

    RecipeError with the line of what is wrong in the file; UsageError where it has no such site.
    """
    if name is None:
        return Site()
    file = sites_file()
    if not file.is_file():
        raise UsageError(
            f"there is no site {name!r}: the file of sites is missing",
            where=str(file),
            fix=f"write it: {name}: {{partition: gpu, account: my-project}}",
        )
    sites = dict(read_file(file).children())
    if name not in sites:
        what = f"there is no site {name!r}"
        raise UsageError(what, where=str(file), fix=_suggest(name, sites, "one of"))
    nodes = dict(sites[name].children())
    values = {key: node.plain() for key, node in nodes.items()}
    try:
        # The file was read by our own reader for the lines of its keys; values go on as JSON.
        # Strict mode takes no list for a tuple; in JSON there is no other form of one.
        return TypeAdapter(Site).validate_json(json.dumps(values))
    except ValidationError as error:
        # pydantic names the path of the value; its first part is the key.
        key = str(error.errors()[0]["loc"][0])
        keys = [spec.name for spec in fields(Site)]
        if key in keys:
            what = f"{key} takes {EXPECTED.get(key, 'a single word or number')}"
            fix = f"see {key} in docs/slurm.md"
        else:
            what = f"there is no key {key!r} in a site"
            fix = _suggest(key, keys, "a site has")
        raise RecipeError(what, where=nodes[key].where, fix=fix) from None


def _suggest(word: str, words: Collection[str], otherwise: str) -> str:
    """The fix for a word that is none of `words`."""
    near = nearest(word, words)
    return f"did you mean {near}?" if near else f"{otherwise} {', '.join(words)}"


def sites_file() -> Path:
    """`$XDG_CONFIG_HOME/tunesmith/sites.yaml`, else below `~/.config`."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return config / "tunesmith" / "sites.yaml"
