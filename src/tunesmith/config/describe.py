"""The reference page of the recipe, written from the schema: `python -m tunesmith.config.describe --write docs/recipe.md`.

`--check FILE` compares instead and exits 1 when the page has drifted.
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from tunesmith.config.check import COLUMNS
from tunesmith.config.dump import to_yaml
from tunesmith.config.forms import form
from tunesmith.config.names import yaml_name
from tunesmith.config.schema import Run, Source
from tunesmith.config.shipped import shipped
from tunesmith.units import LENGTH_UNITS, SIZE_UNITS, Length, Size

EXAMPLE = "llama3.1-8b-lora"

_HEAD = """# The recipe

<!-- Written from the schema by `python -m tunesmith.config.describe --write docs/recipe.md`: change the schema. -->

One YAML 1.2 file says all that a run is. `tunesmith train recipe.yaml` reads it; `key.sub=value` after it wins over the
file: `tunesmith train recipe.yaml train.learning_rate=2e-4 data.train.split='train[:1000]'`.

- `extends: NAME` at the top goes on from a recipe that ships (`tunesmith recipes`) or from a file, relative to this one.
  Mappings are merged, lists and single values replaced. `adapter: {{kind: none}}` drops the other adapter keys below it.
  A new `source` keeps the `split` and `format` that the layer below gave: give these with it.
- Relative paths start from the recipe's folder; on the command line and for `output_dir` from the working directory.
- Nothing is coerced: `pack: "true"` is refused, and so are duplicate keys, unknown keys and a second document. A whole
  number may stand where a number is asked for.
- In YAML 1.2 `3e-4` is a number, and `on`, `yes` and `no` are text; truth values are `true` and `false`.
- `tunesmith recipes show RECIPE [key=value ...]` prints what a recipe comes to, every default written out.

## A whole recipe

`tunesmith recipes copy {example}` writes this one to edit:

```yaml
{text}```

## The two grammars

| | units | examples |
|---|---|---|
| length | {lengths} | `200 steps`, `1.5 epochs`, `10 min`, `3 %` |
| size | {sizes} | `64 examples`, `32768 tokens` |

## The keys

A key without a default must be given.
"""


def reference() -> str:
    """The page, in Markdown."""
    head = _HEAD.format(
        example=EXAMPLE,
        text=shipped()[EXAMPLE].read_text(encoding="utf-8"),
        lengths=", ".join(f"`{unit}`" for unit in LENGTH_UNITS),
        sizes=", ".join(f"`{unit}`" for unit in SIZE_UNITS),
    )
    hints = get_type_hints(Run)
    loose = [f for f in fields(Run) if not _is_section(hints[f.name])]
    parts = [head, "### Top level\n\n" + _table(loose, hints)]
    for part in fields(Run):
        hint = hints[part.name]
        if _is_section(hint):
            table = _table(list(fields(hint)), get_type_hints(hint))
            parts.append(f"### `{part.name}`\n\n{_sentence(part)}\n\n{table}")
        if part.name == "data":
            parts.append(_sources())
    return "\n".join(parts)


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint) and hint not in (Length, Size)


def _sources() -> str:
    columns = "\n".join(f"| `{name}` | {', '.join(f'`{c}`' for c in known)} |" for name, known in COLUMNS.items())
    return (
        "### `data.train` and `data.validation`\n\nEach is one source, or a list of sources.\n\n"
        + _table(list(fields(Source)), get_type_hints(Source))
        + f"\n`columns` maps these names of a format to those of the file:\n\n| format | columns |\n|---|---|\n{columns}\n"
    )


def _sentence(part: Field[Any]) -> str:
    doc = part.metadata["doc"]
    return f"{doc[0].upper()}{doc[1:]}."


def _table(listed: list[Field[Any]], hints: dict[str, Any]) -> str:
    rows = [f"| `{yaml_name(f.name)}` | {form(hints[f.name])} | {_default(f)} | {f.metadata['doc']} |" for f in listed]
    return "\n".join(["| key | form | default | what it is |", "|---|---|---|---|", *rows]) + "\n"


def _default(spec: Field[Any]) -> str:
    if spec.default_factory is not MISSING:
        return f"`{_written(spec.default_factory())}`"
    return "" if spec.default is MISSING else f"`{_written(spec.default)}`"


def _written(value: Any) -> str:
    if isinstance(value, Length | Size):
        return str(value)
    if value in ({}, ()):
        return "{}" if value == {} else "[]"
    plain = list(value) if isinstance(value, tuple) else value
    return to_yaml({"x": plain}).removeprefix("x:").strip() or "null"


def main(arguments: list[str]) -> int:
    """`--write FILE` or `--check FILE`; the exit status of a command."""
    if len(arguments) != 2 or arguments[0] not in ("--write", "--check"):
        print("usage: python -m tunesmith.config.describe --write|--check docs/recipe.md", file=sys.stderr)
        return 2
    path, page = Path(arguments[1]), reference()
    if arguments[0] == "--write":
        path.write_text(page, encoding="utf-8")
        return 0
    if path.is_file() and path.read_text(encoding="utf-8") == page:
        print(f"{path}: {len(page.splitlines())} lines agree with the schema")
        return 0
    print(f"{path} differs from the schema; run: python -m tunesmith.config.describe --write {path}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
