"""What is made of the schema: the reference of all keys in docs/recipe.md, and recipes/schema.json for editors.

`python -m tunesmith.config.describe --write FILE` writes either, by the ending `.md` or `.json`; of a page it replaces
what follows the mark. `--check FILE` compares instead, and exits 1 if the file has drifted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from tunesmith.config.check import COLUMNS
from tunesmith.config.json_schema import json_schema
from tunesmith.config.names import keys
from tunesmith.config.schema import is_section
from tunesmith.config.typed import default_of, type_in_words

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
