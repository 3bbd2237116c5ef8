"""Generator of the two files that are derived from the schema: the key reference in docs/recipe.md,
and recipes/schema.json for editors.

`python -m tunesmith.config.describe --write FILE` writes Markdown to a `.md` file and JSON Schema
to a `.json` file. In a `.md` file only the text below `GENERATED_MARK` is replaced. `--check FILE`
compares the file with the schema and exits with 1 if they differ.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from tunesmith.config.methods import MethodName
from tunesmith.config.names import default_of, keys
from tunesmith.config.row_formats import FORMAT_COLUMNS
from tunesmith.config.schema import (
    MethodConfig,
    Run,
    is_section,
    run_type,
)
from tunesmith.config.typed import type_in_words

GENERATED_MARK = (
    "<!-- Written from the schema from here on:"
    " python -m tunesmith.config.describe --write docs/recipe.md -->\n"
)


def reference() -> str:
    """Return the reference of all recipe keys in Markdown, with one table for each section of the
    recipe.
    """
    sections: dict[str, list[tuple[str, ...]]] = {}
    for key, (spec, hint) in keys().items():
        section, _, name = key.rpartition(".")
        # data.validation has the same keys as data.train.
        if is_section(hint) or section == "data.validation":
            continue
        default = default_of(spec)
        row = (
            f"`{name}`",
            type_in_words(hint),
            f"`{default}`" if default else "",
            spec.metadata["description"],
        )
        sections.setdefault(section, []).append(row)
    parts = ["\n## The keys\n\nA key without a default is required.\n"]
    for section, rows in sections.items():
        head = "### Top level"
        if section == "data.train":
            head = (
                "### `data.train` and `data.validation`\n\n"
                "Each is one source, or a list of sources."
            )
        elif section:
            doc = keys()[section][0].metadata["description"]
            head = f"### `{section}`\n\n{doc[0].upper()}{doc[1:]}."
        table = _table(("key", "form", "default", "what it is"), rows)
        parts.append(f"{head}\n\n{table}")
        if section == "data.train":
            listed = [
                (f"`{name}`", ", ".join(f"`{column}`" for column in columns))
                for name, columns in FORMAT_COLUMNS.items()
            ]
            table = _table(("format", "columns"), listed)
            parts.append(f"`columns` maps these names to those of the file:\n\n{table}")
    return "\n".join(parts)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    rule = ("---",) * len(head)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


def json_schema() -> dict[str, object]:
    """Return the JSON Schema of a recipe file as plain values.

    The schema uses draft 7, because editors support this version best.
    """
    run_schema = run_type().json_schema()
    sections = {**run_schema.pop("$defs"), Run.__name__: run_schema}
    for section in sections.values():
        # A recipe that extends another recipe may omit any key, so no key is required.
        section.pop("required", None)
        properties = section["properties"]
        for name, schema in properties.items():
            properties[name] = _property(schema)
    sections[Run.__name__]["properties"]["extends"] = {
        "type": "string",
        "description": "a shipped recipe or a file whose values this recipe overrides",
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "a recipe of tunesmith",
        "$ref": f"#/$defs/{Run.__name__}",
        "$defs": sections,
    }


def _property(schema: dict[str, Any]) -> dict[str, Any]:
    """Convert pydantic's schema of one key to draft 7. Its documentation and default come last."""
    section = schema.get("$ref", "")
    if section.endswith(MethodConfig.__name__):
        name = {"enum": list(get_args(MethodName)), "type": "string"}
        return {"anyOf": [name, {"$ref": section}], "description": schema["description"]}
    if section:
        return {"$ref": section}
    del schema["title"]
    texts = {name: schema.pop(name) for name in ("description", "default") if name in schema}
    if "prefixItems" in schema:
        schema["items"] = schema.pop("prefixItems")
    if "$ref" in schema.get("items", {}):
        # A recipe can have one source instead of a list. Only validation rows are optional.
        optional = [{"type": "null"}] if "default" in texts else []
        schema = {"anyOf": [schema["items"], schema, *optional]}
    return schema | texts


def write_or_check(arguments: list[str]) -> int:
    """Run the command `--write FILE` or `--check FILE`, and return its exit status."""
    option, name = arguments
    path = Path(name)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    # Keep the text above the mark, because it is written by hand.
    page = old.partition(GENERATED_MARK)[0] + GENERATED_MARK + reference()
    if path.suffix == ".json":
        page = json.dumps(json_schema(), indent=1) + "\n"
    if option == "--write":
        path.write_text(page, encoding="utf-8")
    elif page != old:
        command = f"python -m tunesmith.config.describe --write {path}"
        print(f"{path} differs from the schema; run: {command}", file=sys.stderr)
        return 1
    else:
        print(f"{path} agrees with the schema ({len(page.splitlines())} lines)")
    return 0


if __name__ == "__main__":
    sys.exit(write_or_check(sys.argv[1:]))
