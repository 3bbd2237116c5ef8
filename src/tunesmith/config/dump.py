"""Functions that write a `Run` as YAML, compute the digest of a `Run`, and compare two `Run`s.

Reading the written YAML gives an identical `Run`, with bit for bit equal numbers: floats are
written with `repr`, and text is quoted unless YAML cannot read it as another type.
"""

import hashlib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tunesmith.config.methods import METHOD_FACTS
from tunesmith.config.names import keys
from tunesmith.config.schema import Adapter, Run, run_type
from tunesmith.config.yaml_file import scalar

# Key of the duration of a run. A resumed run may have a longer duration than before.
DURATION = "train.duration"

_TEXT = re.compile(r"[A-Za-z/][\w./-]*(?: [\w./-]+)*|[0-9]+(?:\.[0-9]+)? (?:[a-z]+|%)", re.ASCII)


def to_mapping(run: Run) -> dict[str, Any]:
    """Convert the recipe to plain values (dicts, lists, scalars), including defaults.

    With `adapter.kind: none` the other keys of `adapter` are omitted, because a recipe with them
    is refused.
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
    """Convert the recipe to JSON values: tuples become lists, lengths and sizes become text.

    The section `method` has only the keys that this method reads. A method without keys, such as
    sft, is written as its name (`method: sft`), as in recipes of earlier versions.
    """
    values = run_type().dump_python(run, mode="json", by_alias=True, warnings=False)
    method = values["method"]
    keys_read = METHOD_FACTS[method["name"]].keys
    read = {key: method[key] for key in ("name", *keys_read)}
    return {**values, "method": read if keys_read else method["name"]}


def flatten(run: Run) -> dict[str, str | int | float | bool | None]:
    """Return the recipe as a flat dict of dotted keys. Lists and mappings become JSON text."""
    return {
        key: json.dumps(value) if isinstance(value, list | dict) else value
        for key, value in leaves(to_mapping(run)).items()
    }


def dump(run: Run) -> str:
    """Return the resolved recipe as YAML 1.2 text."""
    return to_yaml(to_mapping(run))


def to_yaml(values: Mapping[str, object], comments: Mapping[str, str] | None = None) -> str:
    """Convert plain values to YAML 1.2 text: sections in block style, lists of scalars on one line.

    Args:
        comments: the comment to write above each dotted key. Keys inside a list cannot have one.
    """
    return "\n".join([*_yaml_lines(values, comments or {}), ""])


def _yaml_lines(
    values: Mapping[str, object], comments: Mapping[str, str], key: str = "", indent: str = ""
) -> Iterator[str]:
    for name, value in values.items():
        path = f"{key}.{name}".lstrip(".")
        for part in textwrap.wrap(comments.get(path, ""), 76 - len(indent)):
            yield f"{indent}# {part}"
        head = f"{indent}{yaml_value(name)}:"
        if isinstance(value, dict) and value:
            yield head
            yield from _yaml_lines(value, comments, path, f"{indent}  ")
        elif isinstance(value, list) and _nested(value):
            yield head
            for item in value:
                lines = [yaml_value(item)]
                if isinstance(item, dict) and item:
                    lines = [*_yaml_lines(item, {}, indent=f"{indent}  ")]
                yield f"{indent}- {lines[0].lstrip()}"
                yield from lines[1:]
        else:
            yield f"{head} {yaml_value(value)}"


def yaml_value(value: object) -> str:
    """Return a value as YAML on one line. Text that YAML could read as another type is quoted."""
    if isinstance(value, dict):
        pairs = [f"{yaml_value(name)}: {yaml_value(item)}" for name, item in value.items()]
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(yaml_value, value))}]"
    if isinstance(value, str) and _TEXT.fullmatch(value) and isinstance(scalar(value), str):
        return value
    # JSON is valid YAML, except that YAML requires escapes for non-printable characters.
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def _nested(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict | list) for item in value)


class Change(NamedTuple):
    """A key that differs between two recipes.

    Attributes:
        allowed: whether a run can resume although this key has changed.
    """

    key: str
    old: object
    new: object
    allowed: bool

    def __str__(self) -> str:
        return f"{self.key}: {json.dumps(self.old)} -> {json.dumps(self.new)}"


def digest(run: Run) -> str:
    """Return the SHA-256 (hex) of all keys that must be equal when a run resumes.

    The duration is not included, because a resumed run may have a longer one.
    """
    values = {
        key: value
        for key, value in leaves(_plain(run)).items()
        if not is_free(key) and key != DURATION
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def differences(old: Run, new: Run) -> list[Change]:
    """Return every key that differs between two recipes, in the order of the schema.

    A duration in another unit, such as epochs instead of steps, is an allowed change: its number of
    steps is not known before the data is read, so the durations cannot be compared.
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
            # Steps, epochs and times cannot be compared before the data is read, so a change from
            # one to another is allowed.
            before = old.train.duration
            after = new.train.duration
            allowed = before.unit != after.unit or after.amount >= before.amount
            if before.seconds is not None and after.seconds is not None:
                allowed = after.seconds >= before.seconds
        changes.append(Change(key, old_value, new_value, allowed))
    return changes


def is_free(key: str) -> bool:
    """Return whether a run can resume with another value of this dotted key.

    This is possible if no training step depends on the key.
    """
    return any(
        spec.metadata["free"] and f"{key}.".startswith(f"{name}.")
        for name, (spec, _) in keys().items()
    )


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Return nested values as a flat dict of dotted keys.

    A list of scalars is one value, so a changed list counts as one change.
    """
    if _nested(value):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {key: value}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= leaves(item, f"{key}.{name}" if key else f"{name}")
    return flat
