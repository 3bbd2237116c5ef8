"""A `Run` as YAML again, its digest, and what differs between two of them.

What is written reads back as the same `Run`, to the last bit of every number: floats are written by
`repr`, and text is quoted unless it can only be text.
"""

import hashlib
import json
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache
from io import StringIO
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter

from tunesmith.config.names import keys
from tunesmith.config.schema import METHOD_KEYS, Adapter, MethodConfig, Run, yaml_name
from tunesmith.config.tree import scalar
from tunesmith.units import Length, Share, Size

# It may grow when a run resumes.
DURATION = "train.duration"

_TEXT = re.compile(r"[A-Za-z/][\w./-]*(?: [\w./-]+)*|[0-9]+(?:\.[0-9]+)? (?:[a-z]+|%)", re.ASCII)


def to_mapping(run: Run) -> dict[str, Any]:
    """The recipe as plain YAML values under its written names, defaults included.

    With `adapter.kind: none` the adapter's other keys are left out, because a recipe may not give
    them.
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


def _plain(run: Run) -> dict[str, Any]:
    """The keys and values of a recipe as JSON has them: tuples become lists, lengths and sizes
    text.

    A method has its own keys alone; one without any is its name, as recipes had it before there
    were others.
    """

    def default(value: object) -> object:
        if isinstance(value, Length | Size | Share):
            return str(value)
        if isinstance(value, MethodConfig):
            keys = METHOD_KEYS[value.name]
            values = asdict(value)
            return {key: values[key] for key in ("name", *keys)} if keys else value.name
        return {yaml_name(k): v for k, v in vars(value).items()}

    return json.loads(json.dumps(run, default=default))


def flatten(run: Run) -> dict[str, str | int | float | bool | None]:
    """Dotted key -> value, for what takes no nested ones; lists as JSON text."""
    values = leaves(to_mapping(run))
    for key, value in values.items():
        if isinstance(value, list | dict):
            values[key] = json.dumps(value)
    return values


def dump(run: Run) -> str:
    """The resolved recipe as YAML 1.2."""
    return _yaml_of(json.dumps(to_mapping(run)))


@lru_cache(maxsize=8)
def _yaml_of(values: str) -> str:
    """Values in JSON as YAML: a run writes its recipe at its start and into each model card."""
    return to_yaml(json.loads(values))


_TAG = "tag:yaml.org,2002:"


def _represent_text(yaml: SafeRepresenter, text: str) -> ScalarNode:
    """Quoted wherever it could be anything but text."""
    is_plain = _TEXT.fullmatch(text) and isinstance(scalar(text), str)
    return yaml.represent_scalar(f"{_TAG}str", text, style=None if is_plain else '"')


def _represent_number(yaml: SafeRepresenter, number: float) -> ScalarNode:
    """Exact to the last bit."""
    return yaml.represent_scalar(f"{_TAG}float", repr(number))


def _represent_list(yaml: SafeRepresenter, items: list[object]) -> SequenceNode:
    """Flat lists on one line."""
    return yaml.represent_sequence(f"{_TAG}seq", items, flow_style=not _nested(items))


def _represent_mapping(yaml: SafeRepresenter, mapping: dict[str, object]) -> MappingNode:
    # As a list of pairs, whose order ruamel keeps: it would sort a dict.
    return yaml.represent_mapping(f"{_TAG}map", list(mapping.items()), flow_style=not mapping)


_REPRESENT: dict[type, Callable[..., object]] = {
    str: _represent_text,
    float: _represent_number,
    list: _represent_list,
    dict: _represent_mapping,
}


def _nested(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict | list) for item in value)


def to_yaml(values: Mapping[str, object], comments: Mapping[str, str] | None = None) -> str:
    """Plain values as YAML 1.2 text: sections in block form, lists of scalars on one line.

    `comments` are written above their dotted key; keys below a list have none.
    """
    yaml = YAML(typ="safe", pure=True)
    out = StringIO()
    # A class of its own, because representers are added to the class.
    yaml.Representer = type("Representer", (SafeRepresenter,), {})
    yaml.width = 1 << 20
    for kind, represent in _REPRESENT.items():
        yaml.Representer.add_representer(kind, represent)
    yaml.dump(dict(values), out)
    lines: list[str] = []
    # The keys that lead to the current line, the outermost first.
    path: list[str] = []
    for line in out.getvalue().splitlines():
        indent = len(line) - len(line.lstrip())
        path = [*path[: indent // 2], line.strip().partition(":")[0]]
        comment = (comments or {}).get(".".join(path), "")
        for part in textwrap.wrap(comment, 76 - indent):
            lines.append(f"{line[:indent]}# {part}")
        lines.append(line)
    return "\n".join(lines) + "\n"


class Change(NamedTuple):
    """One key that differs between two recipes; `allowed` says whether a resumed run may differ
    there.
    """

    key: str
    old: object
    new: object
    allowed: bool

    def __str__(self) -> str:
        return f"{self.key}: {json.dumps(self.old)} -> {json.dumps(self.new)}"


def digest(run: Run) -> str:
    """SHA-256, in hex, of all that may not change when a run resumes. The duration may grow and is
    left out.
    """
    values = {}
    for key, value in leaves(_plain(run)).items():
        if not is_free(key) and key != DURATION:
            values[key] = value
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def differences(old: Run, new: Run) -> list[Change]:
    """Every key that differs, in the order of the schema.

    A duration in another unit (epochs for steps) is allowed: its steps are fixed once the data is
    read.
    """
    old_values = leaves(_plain(old))
    new_values = leaves(_plain(new))
    changes = []
    for key in {**old_values, **new_values}:
        old_value = old_values.get(key)
        new_value = new_values.get(key)
        if old_value == new_value:
            continue
        allowed = is_free(key)
        if key == DURATION:
            allowed = _may_follow(old.train.duration, new.train.duration)
        changes.append(Change(key, old_value, new_value, allowed))
    return changes


def _may_follow(old: Length, new: Length) -> bool:
    """Tell whether a resumed run may have the new duration: it is not known to be shorter."""
    if old.seconds is not None and new.seconds is not None:
        return new.seconds >= old.seconds
    return old.unit != new.unit or new.amount >= old.amount


def is_free(key: str) -> bool:
    """Tell whether a dotted key may change when a run resumes: it changes no step."""
    return any(
        spec.metadata["free"] and f"{key}.".startswith(f"{name}.")
        for name, (spec, _) in keys().items()
    )


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Dotted key -> value; a list of scalars is one leaf, so a changed list is one change."""
    if _nested(value):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {key: value}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= leaves(item, f"{key}.{name}".lstrip("."))
    return flat
