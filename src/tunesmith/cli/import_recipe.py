"""Turn the configuration of another tool into a recipe, and name each key that it cannot carry.

Reads a torchtune, Axolotl or LLaMA-Factory YAML, an accelerate config, and a TRL command line or the file that holds it.

examples:
  tunesmith import qlora.yml --world 2                      # writes qlora-recipe.yaml; 2 GPUs trained it
  tunesmith import sft.yaml data.train.source=rows.jsonl data.train.format=alpaca   # keys of the recipe win over the file
  tunesmith import fsdp.yaml --extends llama3.1-8b-lora     # an accelerate config names no model and no data
  tunesmith import --world 1 -- trl sft --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from tunesmith.cli.options import whole_number
from tunesmith.config.layers import merge_layers, override_layer
from tunesmith.config.load import checked, load_recipe
from tunesmith.config.shipped import schema_line, shipped
from tunesmith.errors import UsageError, mask_words
from tunesmith.host.files import from_here, write_atomically
from tunesmith.host.shell import shell_path
from tunesmith.importers.source_config import TOOLS, read_command, read_config
from tunesmith.importers.tools import translate

TAKES_COMMAND = True  # words after `--` are not ours to parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="*", metavar="FILE [key=value ...] | -- COMMAND", help="what to import"
    )
    parser.add_argument(
        "--from",
        dest="tool",
        choices=TOOLS,
        help="the tool it is for; told by its keys if left out",
    )
    parser.add_argument(
        "--world",
        type=whole_number,
        metavar="N",
        help="how many processes (GPUs) trained, on all nodes",
    )
    parser.add_argument(
        "--extends", metavar="RECIPE", help="a recipe, shipped or a file, that the new one changes"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="RECIPE",
        help="the file to write; NAME-recipe.yaml if left out",
    )
    parser.add_argument("--force", action="store_true", help="write over a file that is there")


def run(args: argparse.Namespace) -> None:
    name, *given = [*args.command[:1], *args.words] or [""]
    if not name:
        what = "there is no file and no command to import"
        raise UsageError(what, where="command line", fix="tunesmith import --help")
    if args.command:
        source = read_command(
            [(word, "command line") for word in args.command], "command line", Path.cwd()
        )
    else:
        source = read_config(Path(name), args.tool)
    extends = (
        args.extends if args.extends in (None, *shipped()) else str(Path(args.extends).resolve())
    )
    layer = override_layer(given)
    overrides = {
        key.strip(): value.strip() for key, _, value in (text.partition("=") for text in given)
    }
    recipe = translate(source, overrides, args.world, extends)
    path = args.output or Path(f"{Path(name).stem}-recipe.yaml")
    if path.exists() and not args.force:
        raise UsageError(
            "this file is there already",
            where=str(path),
            fix="name another: --output RECIPE; or --force",
        )
    tree = merge_layers(recipe.tree(), layer, None)
    if extends:
        load_recipe(
            extends, {key: value for key, value in tree.plain().items() if key != "extends"}
        )
    else:
        checked(tree)
    head = f"{schema_line()}\n# from {source.tool}: {json.dumps(shlex.join(mask_words([*args.words, *args.command])))}"
    write_atomically(path, recipe.text(tree, head, path.resolve().parent))
    print(f"{path}: {len(recipe.values)} values from {source.tool}")
    for differs, title in ((True, "differs:"), (False, "needs nothing in the recipe:")):
        rows = [
            f"  {r.key}: {r.value}  ({r.origin})\n      {r.why}"
            for r in recipe.notes
            if r.differs is differs
        ]
        print("\n".join(["", title, *(rows or ["  nothing"])]))
    here = shell_path(from_here(path))
    print(
        f"\nsee what it learns from: tunesmith data {here}; then: tunesmith train {here}",
        file=sys.stderr,
    )
