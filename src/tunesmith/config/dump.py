"""A `Run` as YAML again, its digest, and what differs between two of them.

What is written reads back as the same `Run`, to the last bit of every number: floats are written by `repr`, and
text is quoted unless it can only be text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from io import StringIO
from typing import Any, NamedTuple

from tunesmith.config.names import yaml_name
from tunesmith.config.schema import Adapter, Run
from tunesmith.config.tree import scalar
from tunesmith.units import Length, Size

# What may change between a start and its resume, by dotted key or section; train.duration may grow.
FREE = (
    "log", "validate", "checkpoint", "parallel", "profile", "output_dir",
    "train.micro_batch", "train.recompute", "train.compile", "model.attention",
)  # fmt: skip
DURATION = "train.duration"

_TEXT = re.compile(r"[A-Za-z/][\w./-]*(?: [\w./-]+)*|[0-9]+(?:\.[0-9]+)? (?:[a-z]+|%)", re.ASCII)


def to_mapping(run: Run) -> dict[str, Any]:
    """The recipe as plain YAML values under its written names, defaults included.

    With `adapter.kind: none` the adapter's other keys are left out, because a recipe may not give them.
    """
    values = _plain(run)
    for part in ("train", "validation"):
        if len(values["data"][part]) == 1:
            values["data"][part] = values["data"][part][0]
        elif not values["data"][part]:
            del values["data"][part]
    if run.adapter == Adapter(kind="none"):
        values["adapter"] = {"kind": "none"}
    return values


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type | Length | Size):
        return {yaml_name(f.name): _plain(value.__dict__[f.name]) for f in fields(value)}
    if isinstance(value, Length | Size):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def dump(run: Run) -> str:
    """The resolved recipe as YAML 1.2."""
    return to_yaml(to_mapping(run))


def to_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML 1.2 text: sections in block form, lists of scalars on one line."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import SafeRepresenter

    class Representer(SafeRepresenter):
        """Text quoted wherever it could be anything else; floats exact."""

    def text(self: SafeRepresenter, value: str) -> Any:
        safe = _TEXT.fullmatch(value) and isinstance(scalar(value), str)
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=None if safe else '"')

    def number(self: SafeRepresenter, value: float) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:float", repr(value))

    def items(self: SafeRepresenter, value: list[Any]) -> Any:
        flat = not any(isinstance(item, dict | list) for item in value)
        return self.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flat)

    Representer.add_representer(str, text)
    Representer.add_representer(float, number)

    def section(self: SafeRepresenter, value: dict[str, Any]) -> Any:
        # As a list of pairs, which ruamel leaves in their order; a dict it would sort.
        return self.represent_mapping("tag:yaml.org,2002:map", list(value.items()), flow_style=not value)

    Representer.add_representer(list, items)
    Representer.add_representer(dict, section)
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = Representer
    yaml.width = 1 << 20
    out = StringIO()
    yaml.dump(dict(values), out)
    return out.getvalue()


class Change(NamedTuple):
    """One key that differs between two recipes; `allowed` says whether a resumed run may differ there."""

    key: str
    old: Any
    new: Any
    allowed: bool

    def __str__(self) -> str:
        return f"{self.key}: {json.dumps(self.old)} -> {json.dumps(self.new)}"


def digest(run: Run) -> str:
    """SHA-256, in hex, of all that may not change when a run goes on. The duration may grow and is left out."""
    kept = {key: value for key, value in _leaves(_plain(run)).items() if not _free(key) and key != DURATION}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def differences(old: Run, new: Run) -> list[Change]:
    """Every key that differs, in the order of the schema.

    Free are logging, validation, checkpoints, parallelism and what changes only speed and memory; the duration may
    grow. A duration in another unit (epochs for steps) cannot be compared and counts as refused.
    """
    before, after = _leaves(_plain(old)), _leaves(_plain(new))
    changes = []
    for key in [*before, *(key for key in after if key not in before)]:
        left, right = before.get(key), after.get(key)
        if left != right:
            allowed = _grows(old.train.duration, new.train.duration) if key == DURATION else _free(key)
            changes.append(Change(key, left, right, allowed))
    return changes


def _free(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in FREE)


def _grows(old: Length, new: Length) -> bool:
    if old.seconds is not None and new.seconds is not None:
        return new.seconds >= old.seconds
    return old.unit == new.unit and new.amount >= old.amount


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Dotted key -> value; a list of scalars is one leaf, so a changed list of names is one change."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if _nested(value) else None
    if inside is None or not value:
        return {key: value}
    leaves: dict[str, Any] = {}
    for name, item in inside:
        leaves |= _leaves(item, f"{key}.{name}" if key else str(name))
    return leaves


def _nested(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)
