"""Convert another tool's configuration to a recipe.

example:
  # writes qlora-recipe.yaml; the run used 2 GPUs
  tunesmith import qlora.yml --world 2
  # recipe keys override the file
  tunesmith import sft.yaml data.train.source=rows.jsonl train.seed=7

It reads files of torchtune, Axolotl, LLaMA-Factory and TRL, and lists each key
that has no equivalent. Commands and Python are not read.
"""

import argparse
import json
import shlex
from pathlib import Path

from tunesmith.cli.options import notify, require_folder, whole_number
from tunesmith.config.dump import leaves
from tunesmith.config.layers import merge_layers, override_layer
from tunesmith.config.load import checked
from tunesmith.config.shipped import schema_line
from tunesmith.errors import UsageError, mask_words
from tunesmith.host.files import relative_to_cwd, write_atomically
from tunesmith.host.shell import shell_path
from tunesmith.host.streams import visible
from tunesmith.tools.importers.source_config import IMPORTED_TOOLS, read_config
from tunesmith.tools.importers.translate import translate
from tunesmith.units import count_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="FILE [key=value ...]",
        help="the file to import, and recipe keys that replace its values",
    )
    parser.add_argument(
        "--from",
        dest="tool",
        choices=IMPORTED_TOOLS,
        help="tool that the file belongs to (default: detected from the keys of the file)",
    )
    parser.add_argument(
        "--world",
        type=whole_number,
        metavar="N",
        help="total number of processes (GPUs) of the original run, on all nodes",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="RECIPE",
        help="file to write (default: NAME-recipe.yaml)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")


def run(args: argparse.Namespace) -> None:
    if not args.words:
        fix = "run `tunesmith import FILE`; `tunesmith import --help` lists the options"
        raise UsageError("no file to import was given", where="command line", fix=fix)

    name, *words = args.words
    source = read_config(Path(name), args.tool)
    layer = override_layer(words)
    path = args.output or Path(f"{Path(name).stem}-recipe.yaml")
    recipe = translate(source, leaves(layer.values), args.world)
    if path.exists() and not args.force:
        fix = "choose another file with --output RECIPE, or overwrite this one with --force"
        raise UsageError("this file already exists", where=path, fix=fix)
    require_folder(path.parent, "--output")

    layer = merge_layers(recipe.layer(), layer)
    checked(layer)
    # Write the command as JSON, which escapes line breaks, because the comment must stay on one
    # line.
    origin = json.dumps(shlex.join(mask_words(args.words)))
    head = f"{schema_line()}\n# from {source.tool}: {origin}"
    write_atomically(path, recipe.text(layer, head, path.resolve().parent))
    print(f"{path}: {count_of(len(recipe.values), 'value')} from {source.tool}")
    for title, differs in (
        ("keys that may change the training:", True),
        ("keys that need nothing in the recipe:", False),
    ):
        print(f"\n{title}")
        notes = [note for note in recipe.notes.values() if note.differs is differs]
        for note in notes:
            print(visible(f"  {note.key}: {note.value}  ({note.origin})\n      {note.why}"))
        if not notes:
            print("  none")
    here = shell_path(relative_to_cwd(path))
    notify(f"\nto check the tokens: tunesmith data {here}; then, to train: tunesmith train {here}")
