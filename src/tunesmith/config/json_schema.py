"""The JSON Schema of a recipe file, from the types: what an editor completes and checks while a recipe is written."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import Field
from typing import Any, get_args

from tunesmith.config.names import keys
from tunesmith.config.schema import Run, Source, is_section
from tunesmith.config.typed import default_of, run_type


def json_schema() -> dict[str, Any]:
    """The schema as plain values, of draft 7, which editors know best.

    A recipe that extends another may leave any key out, and clear by null what has a default.
    """
    whole = run_type().json_schema()
    sections = {**whole.pop("$defs"), Run.__name__: whole}
    for key, (spec, hint) in keys().items():
        if not key.startswith("data.validation."):  # a source is written out once
            above, _, name = key.rpartition(".")
            owner = keys()[above][1] if above else Run
            values = sections[(get_args(owner) or (owner,))[0].__name__]["properties"]
            values[name] = _of_key(spec, hint, values[name])
    child = json.dumps(sections).replace('"#/$defs/', '"#/$defs/Child')
    child = child.replace('"items": {"$ref": "#/$defs/Child', '"items": {"$ref": "#/$defs/')  # lists are not merged
    children = {f"Child{name}": _without_duties(section) for name, section in json.loads(child).items()}
    extends = {"type": "string", "description": "a recipe that ships, or a file: its values stand below these"}
    children["ChildRun"]["properties"]["extends"] = extends
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "a recipe of tunesmith",
        "type": "object",
        "properties": {"extends": extends},
        "if": {"required": ["extends"]},
        "then": {"$ref": "#/$defs/ChildRun"},
        "else": {"$ref": "#/$defs/Run"},
        "$defs": {**sections, **children},
    }


def _of_key(spec: Field[Any], hint: Any, found: dict[str, Any]) -> dict[str, Any]:
    """What pydantic says of a key's value, with documentation, the default as it is written, and in draft 7."""
    if is_section(hint):
        return {"$ref": f"#/$defs/{hint.__name__}"}
    value = {name: part for name, part in found.items() if name not in ("title", "default")}
    if "prefixItems" in value:
        value["items"] = value.pop("prefixItems")
    if Source in get_args(hint):
        value = {"anyOf": [value["items"], value, *([{"type": "null"}] if default_of(spec) else [])]}
    default: Any = default_of(spec)
    with suppress(ValueError):  # a word or a length stands for itself
        default = json.loads(default)
    return {**value, "description": spec.metadata["doc"]} | ({} if default == "" else {"default": default})


def _without_duties(section: dict[str, Any]) -> dict[str, Any]:
    """A section in which nothing is required, and what was not may be null."""
    required = section.pop("required", [])
    for name, value in section["properties"].items():
        if name not in required:
            about = {part: value.pop(part) for part in ("description", "default") if part in value}
            section["properties"][name] = {"anyOf": [value, {"type": "null"}], **about}
    return section
