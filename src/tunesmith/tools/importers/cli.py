"""Convert another tool's configuration to a recipe.

example:
  # writes qlora-recipe.yaml; the run used 2 GPUs
  tunesmith import qlora.yml --world 2
  # recipe keys override the file
  tunesmith import sft.yaml data.train.source=rows.jsonl
  # an accelerate config names no model and no data
  tunesmith import fsdp.yaml --extends llama3.1-8b-lora

It reads files of torchtune, Axolotl, LLaMA-Factory, TRL and accelerate, and
lists each key that has no equivalent. Commands and Python are not read.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from tunesmith.cli.options import notify, require_folder, whole_number
from tunesmith.config.layers import merge_layers, override_layer
from tunesmith.config.load import checked, load_recipe
from tunesmith.config.shipped import schema_line, shipped
from tunesmith.errors import UsageError, mask_words
from tunesmith.host.files import from_here, write_atomically
from tunesmith.host.shell import shell_path
from tunesmith.host.streams import visible
from tunesmith.tools.importers.source_config import IMPORTED_TOOLS, read_config
from tunesmith.tools.importers.tools import translate
from tunesmith.tools.importers.translation import Note
from tunesmith.units import count_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="FILE [key=value ...]", help="what to import")
    parser.add_argument(
        "--from",
        dest="tool",
        choices=IMPORTED_TOOLS,
        help="the tool (default: detected from its keys)",
    )
    parser.add_argument(
        "--world",
        type=whole_number,
        metavar="N",
        help="number of processes (GPUs) on all nodes that the configuration is for",
    )
    parser.add_argument(
        "--extends", metavar="RECIPE", help="a shipped recipe or recipe file to start from"
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
        fix = "tunesmith import --help"
        raise UsageError("nothing to import: give a file", where="command line", fix=fix)
    name, *words = args.words
    source = read_config(Path(name), args.tool)
    extends = args.extends
    # A recipe that ships with the package is extended by name, another by its path.
    if extends not in (None, *shipped()):
        extends = str(Path(extends).resolve())
    layer = override_layer(words)
    # Settings that the command line gives win over what the file says.
    pairs = (word.partition("=") for word in words)
    overrides = {key.strip(): value.strip() for key, _, value in pairs}
    recipe = translate(source, overrides, args.world, extends)
    path = args.output or Path(f"{Path(name).stem}-recipe.yaml")
    if path.exists() and not args.force:
        fix = "choose another name with --output RECIPE, or use --force"
        raise UsageError("this file already exists", where=str(path), fix=fix)
    require_folder(path.parent, "--output")
    tree = merge_layers(recipe.tree(), layer)
    # Only the whole recipe can be checked: what it extends, and what it changes.
    if extends:
        values = tree.plain()
        values.pop("extends", None)
        load_recipe(extends, values)
    else:
        checked(tree)
    # Quoted as JSON, a line break of the command stays within the comment.
    origin = json.dumps(shlex.join(mask_words(args.words)))
    head = f"{schema_line()}\n# from {source.tool}: {origin}"
    write_atomically(path, recipe.text(tree, head, path.resolve().parent))
    print(f"{path}: {count_of(len(recipe.values), 'value')} from {source.tool}")
    print_notes("differs:", [note for note in recipe.notes if note.differs])
    print_notes("needs nothing in the recipe:", [n for n in recipe.notes if not n.differs])
    here = shell_path(from_here(path))
    notify(f"\ncheck the tokens: tunesmith data {here}; then: tunesmith train {here}")


def print_notes(title: str, notes: Sequence[Note]) -> None:
    """Print what was not carried over key by key, and why."""
    print(f"\n{title}")
    for note in notes:
        text = f"  {note.key}: {note.value}  ({note.origin})\n      {note.why}"
        print(visible(text))
    if not notes:
        print("  nothing")
