"""Measure how fast a recipe trains on this machine, and its MFU.

example:
  tunesmith bench smollm2-135m-lora \\
    data.train.source=rows.jsonl data.train.format=alpaca
  tunesmith bench --shape llama3-8b --data rows.json --json 8b.json \\
    --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct
  tunesmith bench --shape llama3-3b --data rows.json --tokenizer DIR \\
    adapter.kind=none
  tunesmith bench my-recipe.yaml --profile traces

The command runs the training steps of `train` on real rows and saves nothing.
--shape uses the dimensions of a real model with random weights, so no weights
are downloaded. Any tokenizer that fits the vocabulary works. The recipe of a
shape is LoRA of rank 8 on all linear layers, seq_len 2048, packed, 16,384
tokens per step. key=value overrides a key of this recipe.
"""

import argparse
from pathlib import Path

from tunesmith.cli.options import add_trust, require_folder, whole_number
from tunesmith.config.load import load_recipe
from tunesmith.config.row_formats import FORMAT_COLUMNS
from tunesmith.config.schema import Run
from tunesmith.distributed.ranks import require_one_process
from tunesmith.errors import UsageError
from tunesmith.model.arch.shapes import SHAPES, find_shape

LOADS_TORCH = "here"

EPILOG = "\n".join(["shapes:", *(f"  {name:<16}{shape.source}" for name, shape in SHAPES.items())])
# Options that --shape uses -> (recipe key with the same meaning, example value for error messages).
# The example is "" if the option is not required.
SHAPE_OPTIONS = {
    "tokenizer": ("model.tokenizer", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "data": ("data.train.source", "rows.json"),
    "format": ("data.train.format", ""),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} (RECIPE | --shape NAME) [key=value ...] [options]"
    add_trust(parser)
    add = parser.add_argument
    add(
        "words",
        nargs="*",
        metavar="RECIPE | key=value",
        help="a recipe, and keys that override its values",
    )
    add(
        "--shape",
        metavar="NAME",
        help="model with the dimensions of a real model and random weights, instead of a recipe",
    )
    add(
        "--tokenizer",
        metavar="DIR_OR_ID",
        help="with --shape: folder or Hub id of the tokenizer",
    )
    add("--data", metavar="FILE", help="with --shape: file or Hub id of the rows")
    add(
        "--format",
        choices=FORMAT_COLUMNS,
        metavar="FORMAT",
        help=f"with --shape: row format, one of {', '.join(FORMAT_COLUMNS)} (default: alpaca)",
    )
    add(
        "--steps",
        type=whole_number,
        default=20,
        metavar="N",
        help="number of timed steps (default: 20)",
    )
    add(
        "--warmup",
        type=int,
        default=5,
        metavar="N",
        help="number of steps before the timed steps (default: 5)",
    )
    add("--json", metavar="FILE", help="write the result as JSON to FILE, for scripts")
    add(
        "--profile",
        metavar="DIR",
        help="also profile some steps into DIR, as configured in the recipe's `profile`",
    )


def run(args: argparse.Namespace) -> None:
    check_arguments(args)
    require_one_process("bench")
    recipe = stated_recipe(args)
    from tunesmith.tools.bench.run_bench import run_bench

    run_bench(args, recipe)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError for contradictory arguments, before slow modules are imported."""
    # Words with "=" set recipe keys. A word without "=" is the recipe.
    sources = [word for word in args.words if "=" not in word]
    if args.shape is not None:
        find_shape(args.shape)
        sources.append(f"--shape {args.shape}")
    if len(sources) != 1:
        what = "bench requires one recipe or one shape"
        raise UsageError(
            what,
            where="command line",
            why=f"the command line has {', '.join(sources) or 'neither a recipe nor --shape'}",
            fix="run `tunesmith bench my-recipe.yaml`, or use --shape llama3-8b --tokenizer DIR "
            "--data rows.json",
        )
    # These options are only allowed with --shape, and those with an example are required. With a
    # recipe, the user must set the recipe keys instead.
    for option, (key, example) in SHAPE_OPTIONS.items():
        flag = f"--{option}"
        value = vars(args)[option]
        if args.shape is None and value is not None:
            what = f"{flag} requires --shape, because a recipe has a key with this meaning"
            raise UsageError(what, where=flag, fix=f"replace the option by {key}={value}")
        if args.shape is not None and value is None and example:
            raise UsageError(f"--shape needs {flag}", where="--shape", fix=f"add {flag} {example}")
    if args.warmup < 0:
        what = f"--warmup {args.warmup} is negative"
        raise UsageError(what, where="--warmup", fix="use 0 or more")
    require_folder(Path(args.json or ".").parent, "--json")
    if Path(args.profile or ".").is_file():
        what = f"{args.profile} is a file, not a folder"
        raise UsageError(what, where="--profile", fix="give a folder for the traces")


def stated_recipe(args: argparse.Namespace) -> Run | None:
    """Load the recipe that the command line names.

    Return None if --shape is given: the recipe of a shape is created later.
    """
    if args.shape is not None:
        return None
    overrides = [word for word in args.words if "=" in word]
    (recipe,) = [word for word in args.words if "=" not in word]
    return load_recipe(recipe, overrides)
