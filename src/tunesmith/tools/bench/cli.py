"""Measure how fast a recipe trains on this machine, and its MFU.

example:
  tunesmith bench smollm2-135m-lora \\
    data.train.source=rows.jsonl data.train.format=alpaca
  tunesmith bench --shape llama3-8b --data rows.json --json 8b.json \\
    --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct
  tunesmith bench --shape llama3-3b --data rows.json --tokenizer DIR \\
    adapter.kind=none
  tunesmith bench my-recipe.yaml --profile traces
  tunesmith bench qwen3.5-9b-vision-lora --picture 1024x768

It runs the training steps of `train` on real rows and saves nothing. --picture
takes rows with a drawn picture of about the given size each instead. --shape
uses the dimensions of a real model with random weights, so nothing is
downloaded; any tokenizer that fits the vocabulary works. The recipe of a shape
is LoRA of rank 8 on all linear layers, seq_len 2048, packed, 16,384 tokens per
step; key=value overrides it.
"""

import argparse
import re
from pathlib import Path

from tunesmith.cli.options import require_folder
from tunesmith.config.load import load_recipe
from tunesmith.config.row_formats import FORMAT_COLUMNS
from tunesmith.config.schema import Run
from tunesmith.distributed.ranks import require_one_process
from tunesmith.errors import UsageError
from tunesmith.model.shapes import SHAPES, find_shape

LOADS_TORCH = "here"

EPILOG = "\n".join(["shapes:", *(f"  {name:<16}{shape.source}" for name, shape in SHAPES.items())])
# Options of a shape -> (key that a recipe has for it, example; empty if it may be left out).
SHAPE_OPTIONS = {
    "tokenizer": ("model.tokenizer", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "data": ("data.train.source", "rows.json"),
    "format": ("data.train.format", ""),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} (RECIPE | --shape NAME) [key=value ...] [options]"
    add = parser.add_argument
    add(
        "words", nargs="*", metavar="RECIPE | key=value", help="a recipe, and keys that override it"
    )
    add(
        "--shape",
        metavar="NAME",
        help="dimensions of a real model with random weights, instead of a recipe",
    )
    add(
        "--tokenizer",
        metavar="DIR_OR_ID",
        help="with --shape: any tokenizer that fits its vocabulary",
    )
    add("--data", metavar="FILE", help="with --shape: real rows, a file or a Hub id")
    add(
        "--format",
        choices=FORMAT_COLUMNS,
        metavar="FORMAT",
        help=f"with --shape, row format: one of {', '.join(FORMAT_COLUMNS)} (default: alpaca)",
    )
    add(
        "--picture",
        metavar="WIDTHxHEIGHT",
        help="with a recipe of model.vision: rows with a drawn picture of about this size, "
        "a short question and an answer each, in place of the recipe's rows",
    )
    add("--steps", type=int, default=20, metavar="N", help="timed steps (default: 20)")
    add("--warmup", type=int, default=5, metavar="N", help="warmup steps before them (default: 5)")
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
    """UsageError for arguments that contradict each other, before anything heavy is imported."""
    check_source(args)
    if args.picture is not None:
        check_picture(args)
    # The least number of each option; 0 steps of warmup are allowed.
    for option, least in (("steps", 1), ("warmup", 0)):
        number = vars(args)[option]
        if number < least:
            what = f"--{option} {number} is out of range"
            raise UsageError(what, where=f"--{option}", fix=f"use at least {least}")
    require_folder(Path(args.json or ".").parent, "--json")
    traces = Path(args.profile or ".")
    if traces.is_file():
        fix = "use a folder for the traces"
        raise UsageError(f"{traces} is a file", where="--profile", fix=fix)


def check_picture(args: argparse.Namespace) -> None:
    """UsageError for `--picture` with a shape, or with a size that no picture has."""
    if args.shape is not None:
        what = "--picture requires a recipe: a shape is a text model alone"
        fix = "tunesmith bench qwen3.5-9b-vision-lora --picture 1024x768"
        raise UsageError(what, where="--picture", fix=fix)
    read_size(args.picture)


def read_size(text: str) -> tuple[int, int]:
    """Width and height of `--picture`; UsageError where no picture has such a size."""
    # With numpy, which the help does without.
    from tunesmith.data.rows.pictures import MAX_PICTURE_PIXELS, MAX_PICTURE_RATIO

    what = f"no picture is {text!r} large"
    fix = "such as --picture 1024x768"
    found = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text)
    if found is None:
        why = "it takes width x height in pixels"
        raise UsageError(what, where="--picture", why=why, fix=fix)
    width, height = int(found[1]), int(found[2])
    is_too_long = max(width, height) > MAX_PICTURE_RATIO * min(width, height)
    if is_too_long or width * height > MAX_PICTURE_PIXELS:
        why = (
            f"a picture of a row may have {MAX_PICTURE_PIXELS:,} pixels, and one side may be "
            f"{MAX_PICTURE_RATIO} times the other"
        )
        raise UsageError(what, where="--picture", why=why, fix=fix)
    return width, height


def check_source(args: argparse.Namespace) -> None:
    """UsageError unless the words name one recipe, or one shape with what it needs."""
    if args.shape is not None:
        find_shape(args.shape)
    # A word without = can only be a recipe.
    recipes = [word for word in args.words if "=" not in word]
    where = "command line"
    usage = "tunesmith bench my-recipe.yaml, or --shape llama3-8b --tokenizer DIR --data rows.json"
    if args.shape is not None and recipes:
        shape = f"--shape {args.shape}, which has its own recipe"
        fix = "remove one of the two; set keys of a shape with key=value"
        raise UsageError(f"both a recipe ({recipes[0]}) and {shape}", where=where, fix=fix)
    if len(recipes) > 1:
        raise UsageError(f"several recipes: {', '.join(recipes)}", where=where, fix=usage)
    if not recipes and args.shape is None:
        raise UsageError("bench requires a recipe or a shape", where=where, fix=usage)
    # What a recipe has as a key is an option of a shape, and the other way round.
    for option, (key, example) in SHAPE_OPTIONS.items():
        flag = f"--{option}"
        value = vars(args)[option]
        if args.shape is None and value is not None:
            what = f"{flag} requires --shape: a recipe has a key for it"
            raise UsageError(what, where=flag, fix=f"{key}={value}")
        if args.shape is not None and value is None and example:
            raise UsageError(f"--shape needs {flag}", where="--shape", fix=f"{flag} {example}")


def stated_recipe(args: argparse.Namespace) -> Run | None:
    """The checked recipe; None for a shape, whose own is made of its model."""
    if args.shape is not None:
        return None
    overrides = [word for word in args.words if "=" in word]
    (recipe,) = [word for word in args.words if "=" not in word]
    return load_recipe(recipe, overrides)
