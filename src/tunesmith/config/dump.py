"""A `Run` as YAML again, its digest, and what differs between two of them.

What is written reads back as the same `Run`, to the last bit of every number: floats are written by
`repr`, and text is quoted unless it can only be text.
"""

import hashlib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

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
    return to_yaml(to_mapping(run))


def to_yaml(values: Mapping[str, object], comments: Mapping[str, str] | None = None) -> str:
    """Plain values as YAML 1.2 text: sections in block form, lists of scalars on one line.

    `comments` are written above their dotted key; keys below a list have none.
    """
    return "\n".join([*_yaml_lines(values, comments or {}), ""])


def _yaml_lines(
    values: Mapping[str, object], comments: Mapping[str, str], key: str = "", indent: str = ""
) -> Iterator[str]:
    for name, value in values.items():
        path = f"{key}.{name}".lstrip(".")
        for part in textwrap.wrap(comments.get(path, ""), 76 - len(indent)):
            yield f"{indent}# {part}"
        head = f"{indent}{_yaml_value(name)}:"
        if isinstance(value, dict) and value:
            yield head
            yield from _yaml_lines(value, comments, path, f"{indent}  ")
        elif isinstance(value, list) and _nested(value):
            yield head
            for item in value:
                lines = [_yaml_value(item)]
                if isinstance(item, dict) and item:
                    lines = [*_yaml_lines(item, {}, indent=f"{indent}  ")]
                yield f"{indent}- {lines[0].lstrip()}"
                yield from lines[1:]
        else:
            yield f"{head} {_yaml_value(value)}"


def _yaml_value(value: object) -> str:
    """A value on one line. Text is in double quotes wherever it could be anything but text."""
    if isinstance(value, dict):
        pairs = [f"{_yaml_value(name)}: {_yaml_value(item)}" for name, item in value.items()]
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml_value, value))}]"
    if isinstance(value, str) and _TEXT.fullmatch(value) and isinstance(scalar(value), str):
        return value
    # JSON is YAML, but for characters that YAML allows only as escapes.
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def _nested(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict | list) for item in value)


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
            # It is not known to be shorter.
            before = old.train.duration
            after = new.train.duration
            allowed = before.unit != after.unit or after.amount >= before.amount
            if before.seconds is not None and after.seconds is not None:
                allowed = after.seconds >= before.seconds
        changes.append(Change(key, old_value, new_value, allowed))
    return changes


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
