"""What is made of the schema: the reference of all keys in docs/recipe.md, and recipes/schema.json for editors.

`python -m tunesmith.config.describe --write FILE` writes either, by the ending `.md` or `.json`; of a page it replaces
what follows the mark. `--check FILE` compares instead, and exits 1 if the file has drifted.
"""

import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import Field
from pathlib import Path
from typing import Any, get_args

from tunesmith.config.check import COLUMNS
from tunesmith.config.names import keys
from tunesmith.config.schema import Run, Source, is_section
from tunesmith.config.typed import default_of, run_type, type_in_words

MARK = "<!-- Written from the schema from here on: python -m tunesmith.config.describe --write docs/recipe.md -->\n"


def reference() -> str:
    """One table for each section of the recipe, in Markdown."""
    sections: dict[str, list[tuple[str, ...]]] = {}
    for key, (spec, hint) in keys().items():
        section, _, name = key.rpartition(".")
        if not is_section(hint):
            default = default_of(spec)
            row = (f"`{name}`", type_in_words(hint), f"`{default}`" if default else "", spec.metadata["doc"])
            sections.setdefault(section, []).append(row)
    parts = ["\n## The keys\n\nA key without a default must be given.\n"]
    for section, rows in sections.items():
        table = _table(("key", "form", "default", "what it is"), rows)
        if section == "data.train":
            columns = [(f"`{kind}`", ", ".join(f"`{name}`" for name in names)) for kind, names in COLUMNS.items()]
            head = "### `data.train` and `data.validation`\n\nEach is one source, or a list of sources."
            names = f"`columns` maps these names to those of the file:\n\n{_table(('format', 'columns'), columns)}"
            parts += [f"{head}\n\n{table}", names]
        elif section != "data.validation":
            doc = keys()[section][0].metadata["doc"] if section else ""
            head = f"### `{section}`\n\n{doc[0].upper()}{doc[1:]}." if section else "### Top level"
            parts.append(f"{head}\n\n{table}")
    return "\n".join(parts)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ("---",) * len(head), *rows))


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file as plain values, of draft 7, which editors know best.

    A recipe that extends another may leave any key out.
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
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "a recipe of tunesmith", "type": "object"}
    cases = {"then": {"$ref": "#/$defs/ChildRun"}, "else": {"$ref": "#/$defs/Run"}}
    given = {"properties": {"extends": extends}, "if": {"required": ["extends"]}}
    return head | given | cases | {"$defs": {**sections, **children}}


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
    """A section in which nothing is required."""
    section.pop("required", None)
    return section


def write_or_check(arguments: list[str]) -> int:
    """`--write FILE` or `--check FILE`; the exit status of a command."""
    if len(arguments) != 2 or arguments[0] not in ("--write", "--check"):
        print("usage: python -m tunesmith.config.describe --write|--check FILE.md|FILE.json", file=sys.stderr)
        return 2
    path = Path(arguments[1])
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    page = old.partition(MARK)[0] + MARK + reference()
    if path.suffix == ".json":
        page = json.dumps(json_schema(), indent=1) + "\n"
    if arguments[0] == "--write":
        path.write_text(page, encoding="utf-8")
    elif page != old:
        command = f"python -m tunesmith.config.describe --write {path}"
        print(f"{path} differs from the schema; run: {command}", file=sys.stderr)
        return 1
    else:
        print(f"{path}: {len(page.splitlines())} lines agree with the schema")
    return 0


if __name__ == "__main__":
    sys.exit(write_or_check(sys.argv[1:]))
