"""How every causal model type of Transformers trains here, in model_types.json.

`benchmarks/parity/families.py --write` measures them all; a test measures one of each kind again.
Of a model with a config.json at hand `support.find_support` says it for that very config.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config.names import nearest
from tunesmith.errors import UsageError

FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class ModelType:
    """One type, on the config that Transformers gives it.

    Attributes:
        state, why, recurrent, dead_targets: as in `support.Support`.
        logits, gradients: the largest differences from each document alone, relative to the
            largest value; None where nothing was measured.
        text: the type of its text model, where it is a composite; else empty.
    """

    model_type: str
    state: str
    why: str
    recurrent: tuple[str, ...] = ()
    dead_targets: tuple[str, ...] = ()
    logits: float | None = None
    gradients: float | None = None
    text: str = ""


def read_model_types(file: Path = FILE) -> dict[str, ModelType]:
    """The table, by the name of the type."""
    types = {}
    for name, values in json.loads(file.read_text(encoding="utf-8"))["types"].items():
        for key in ("recurrent", "dead_targets"):
            values[key] = tuple(values.get(key, ()))
        types[name] = ModelType(name, **values)
    return types


def find_model_type(name: str) -> ModelType:
    """One type; UsageError with the nearest one if there is none of that name."""
    types = read_model_types()
    if name in types:
        return types[name]
    near = nearest(name, types)
    raise UsageError(
        f"Transformers has no causal model type {name!r} that was measured",
        where="command line",
        fix=f"did you mean {near}?" if near else "tunesmith models",
    )


def measured_with() -> dict[str, Any]:
    """The versions that the table was measured with."""
    versions: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))["versions"]
    return versions
