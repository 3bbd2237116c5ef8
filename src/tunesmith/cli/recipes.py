"""List, show and copy the recipes that ship.

examples:
  tunesmith recipes                                                     # a table of them
  tunesmith recipes show smollm2-135m-lora train.learning_rate=5e-4     # one, every default written out
  tunesmith recipes copy smollm2-135m-lora mine.yaml                    # one to edit; a file or a folder
"""

import argparse
import json
import sys
from pathlib import Path

from tunesmith.config.dump import dump, to_mapping
from tunesmith.config.load import load_recipe
from tunesmith.config.names import nearest
from tunesmith.config.schema import Run
from tunesmith.config.shipped import copy_of, purpose, shipped
from tunesmith.errors import MachineError, UsageError
from tunesmith.host.shell import shell_command, shell_path, shell_word
from tunesmith.quant.schemes import NF4, scheme_of

WIDE = 130  # columns of a terminal that leave 60 for what a recipe is for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        nargs="?",
        choices=("list", "show", "copy"),
        default="list",
        help="list if left out",
    )
    parser.add_argument(
        "name", nargs="?", help="show: a shipped recipe or a file; copy: a shipped recipe"
    )
    parser.add_argument(
        "rest", nargs="*", metavar="key=value | DEST", help="overrides to show, or where to copy to"
    )
    parser.add_argument("--json", action="store_true", help="list and show: JSON for scripts")
    parser.add_argument(
        "--force", action="store_true", help="copy: write over a file that is there"
    )


def run(args: argparse.Namespace) -> None:
    if args.action == "list":
        _list(as_json=args.json)
    elif args.name is None:
        example = f"tunesmith recipes {args.action} smollm2-135m-lora"
        raise UsageError(
            f"recipes {args.action} needs a recipe's name", where="command line", fix=example
        )
    elif args.action == "show":
        recipe = load_recipe(args.name, args.rest)
        sys.stdout.write(
            json.dumps(to_mapping(recipe), indent=2) + "\n" if args.json else dump(recipe)
        )
    elif len(args.rest) > 1:
        what, fix = (
            f"recipes copy takes one destination, not {len(args.rest)}",
            ["copy", args.name, args.rest[0]],
        )
        raise UsageError(what, where="command line", fix=f"tunesmith recipes {shell_command(fix)}")
    else:
        _copy(args.name, Path(args.rest[0] if args.rest else "."), force=args.force)


def describe_adapter(run: Run) -> str:
    """How a recipe trains: `full`, `LoRA r=8`, `QLoRA r=8`."""
    if run.adapter.kind == "none":
        return "full"
    return f"{'QLoRA' if scheme_of(run.model) is NF4 else 'LoRA'} r={run.adapter.rank}"


def _list(*, as_json: bool) -> None:
    rows = []
    for name, path in shipped().items():
        recipe = load_recipe(path)
        about = {"method": describe_adapter(recipe), "purpose": purpose(path), "file": str(path)}
        rows.append({"name": name, "model": recipe.model.name, **about})
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if not sys.stdout.isatty():
        widths = {
            column: max(len(row[column]) for row in rows) for column in ("name", "model", "method")
        }
        for row in rows:
            print(
                "  ".join(
                    [
                        *(row[column].ljust(width) for column, width in widths.items()),
                        row["purpose"],
                    ]
                )
            )
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    # The purpose names model and method in words, and stands for them where the line is short.
    more = {"model": "model", "method": "method"} if console.width >= WIDE else {}
    columns = {"recipe": "name", **more, "what for": "purpose"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in columns:
        table.add_column(heading, overflow="fold", no_wrap=heading != "what for")
    for row in rows:
        table.add_row(*(row[column] for column in columns.values()))
    console.print(table)
    print("\ntunesmith recipes copy NAME    writes one to edit", file=sys.stderr)


def _copy(name: str, destination: Path, *, force: bool) -> None:
    known = shipped()
    if name not in known:
        near = nearest(name, known)
        fix = f"did you mean {near}?" if near else "tunesmith recipes"
        raise UsageError(f"no recipe {name!r} ships with tunesmith", where="command line", fix=fix)
    path = destination / f"{name}.yaml" if destination.is_dir() else destination
    text = copy_of(known[name])
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        fix = f"name another file, or: tunesmith recipes copy {shell_word(name)} {shell_path(destination)} --force"
        raise UsageError("this file is there already", where=str(path), fix=fix) from error
    except OSError as error:
        there, folder = path.parent.exists(), shell_path(path.parent)
        fix = "name a place that you may write to" if there else f"mkdir -p {folder}"
        raise MachineError(f"cannot write: {error.strerror}", where=str(path), fix=fix) from error
    print(path)
    print(f"edit it, then: tunesmith train {path}", file=sys.stderr)
