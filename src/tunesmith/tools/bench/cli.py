"""Measure how fast a recipe trains on this machine, and its MFU.

example:
  tunesmith bench smollm2-135m-lora \\
    data.train.source=rows.jsonl data.train.format=alpaca
  tunesmith bench --shape llama3-8b --data rows.json --json 8b.json \\
    --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct
  tunesmith bench --shape llama3-3b --data rows.json --tokenizer DIR \\
    adapter.kind=none
  tunesmith bench my-recipe.yaml --profile traces
  tunesmith bench my-recipe.yaml --ablation --json ablation.json \\
    --only data.pack,train.recompute

It runs the training steps of `train` on real rows and saves nothing. --shape
uses the dimensions of a real model with random weights, so nothing is
downloaded; any tokenizer that fits the vocabulary works. The recipe of a shape
is LoRA of rank 8 on all linear layers, seq_len 2048, packed, 16,384 tokens per
step; key=value overrides it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.cli.options import check_not_given, typed_again
from tunesmith.config.row_formats import FORMAT_COLUMNS
from tunesmith.distributed.ranks import require_one_process
from tunesmith.errors import RunError, UsageError
from tunesmith.host.shell import shell_path
from tunesmith.model.shapes import SHAPES, find_shape

if TYPE_CHECKING:
    from tunesmith.config.schema import Run
    from tunesmith.tools.bench.measure import BenchReport

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
    add("--steps", type=int, default=20, metavar="N", help="timed steps (default: 20)")
    add("--warmup", type=int, default=5, metavar="N", help="warmup steps before them (default: 5)")
    add("--json", metavar="FILE", help="write the result as JSON to FILE, for scripts")
    add(
        "--profile",
        metavar="DIR",
        help="also profile some steps into DIR, as configured in the recipe's `profile`",
    )
    add(
        "--cold",
        action="store_true",
        help="time the first step with an empty and with a warm compile cache",
    )
    add(
        "--ablation",
        action="store_true",
        help="also measure with one key changed at a time, each in a new process",
    )
    add(
        "--only",
        metavar="NAMES",
        help="with --ablation: only these variants, by name or key, separated by commas",
    )
    add(
        "--rounds",
        type=int,
        default=2,
        metavar="N",
        help="with --ablation: rounds over all variants (default: 2)",
    )
    add("--plain", action="store_true", help="print plain text even on a terminal")


def run(args: argparse.Namespace) -> None:
    check_arguments(args)
    require_one_process("bench")
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        recipe = recipe_of(args, folder / "model")
        if args.ablation:
            ablate(args, recipe)
            return
        if args.cold:
            check_compiles(recipe)
            # Both are read when something is compiled, and this process does nothing after the
            # command.
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{name}/cache"
            os.environ["TRITON_CACHE_DIR"] = f"{name}/cache/triton"
        figures, report, lines = bench(args, recipe, folder)
    print_figures(figures, lines, plain=args.plain)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def check_arguments(args: argparse.Namespace) -> None:
    """UsageError for arguments that contradict each other, before anything heavy is imported."""
    check_source(args)
    # The least number of each option; 0 steps of warmup are allowed.
    for option, least in (("steps", 1), ("warmup", 0), ("rounds", 1)):
        number = vars(args)[option]
        if number < least:
            what = f"--{option} {number} is out of range"
            raise UsageError(what, where=f"--{option}", fix=f"use at least {least}")
    if args.ablation:
        why = "it measures complete runs only"
        check_not_given(args, ("cold", "profile"), "and --ablation cannot be combined", why=why)
    else:
        check_not_given(args, ("only",), "chooses variants of --ablation", fix="add --ablation")
    folder = Path(args.json or ".").parent
    if not folder.is_dir():
        fix = f"mkdir -p {shell_path(folder)}"
        raise UsageError(f"there is no folder {folder}", where="--json", fix=fix)
    traces = Path(args.profile or ".")
    if traces.is_file():
        fix = "use a folder for the traces"
        raise UsageError(f"{traces} is a file", where="--profile", fix=fix)


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


def recipe_of(args: argparse.Namespace, folder: Path) -> "Run":
    """The checked recipe; a shape's model, without weights, is written to `folder` first."""
    overrides = [word for word in args.words if "=" in word]
    if args.shape is None:
        from tunesmith.config.load import load_recipe

        (recipe,) = [word for word in args.words if "=" not in word]
        return load_recipe(recipe, overrides)
    from tunesmith.tools.bench.shape import shape_recipe, write_shape

    folder.mkdir()
    rows = args.format or "alpaca"
    # The recipe first: a wrong key costs no fetch of a tokenizer.
    recipe = shape_recipe(folder, data=args.data, rows=rows, overrides=overrides)
    change = write_shape(folder, find_shape(args.shape).config, args.tokenizer)
    if change:
        print(f"warning: {args.shape} with a {change}", file=sys.stderr, flush=True)
    return recipe


def check_compiles(recipe: "Run") -> None:
    """UsageError for --cold where nothing is compiled.

    The compiler itself is tried later, within what is timed.
    """
    import torch

    mode = recipe.train.compile
    if mode == "off" or (mode != "on" and not torch.cuda.is_available()):
        what = (
            f"--cold measures compilation, and train.compile {mode} does not compile anything here"
        )
        raise UsageError(what, where="--cold", fix="train.compile=on, or remove --cold")


def bench(
    args: argparse.Namespace, recipe: "Run", folder: Path
) -> "tuple[BenchReport, dict[str, object], list[str]]":
    """Measure in `folder`: figures, the report for --json, and the lines that follow the table."""
    from tunesmith.metrics import hardware
    from tunesmith.runtime.device import free_device_memory
    from tunesmith.tools.bench.measure import BenchPlan, measure

    traces = Path(args.profile) if args.profile else None
    plan = BenchPlan(recipe, args.steps, args.warmup, "random" if args.shape else "stored", traces)
    (folder / "run").mkdir()
    measured = measure(plan, folder / "run")
    report: dict[str, object] = {
        "figures": vars(measured.figures),
        "recipe": plain_recipe(args, recipe),
        "machine": hardware.describe_machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    lines: list[str] = []
    if args.profile:
        report["profile"] = {
            "traces": [*map(str, measured.traces)],
            "tables": [*map(str, measured.tables)],
        }
        lines += [table.read_text(encoding="utf-8").rstrip() for table in measured.tables]
        lines += [f"trace: {trace}" for trace in measured.traces]
    if args.cold:
        # The new process would find less free memory, and choose a smaller micro batch.
        free_device_memory()
        cold = first_steps(measured.figures, args, folder / "warm.json")
        report["cold"] = cold
        # The build counts too: on a GPU its trial of memory is what compiles first.
        empty = f"{cold['build_seconds']:.1f} + {cold['first_step_seconds']:.1f} s"
        warm = f"{cold['warm_build_seconds']:.1f} + {cold['warm_first_step_seconds']:.1f} s"
        caches = f"{empty} with an empty compile cache, {warm} with a warm one"
        lines.append(f"build and first step: {caches}")
    return measured.figures, report, lines


def plain_recipe(args: argparse.Namespace, recipe: "Run") -> dict[str, object]:
    """The recipe as plain values; a shape has its name instead of its temporary folder."""
    from tunesmith.config.dump import to_mapping

    values = to_mapping(recipe)
    if args.shape:
        config = json.loads((Path(recipe.model.name) / "config.json").read_text(encoding="utf-8"))
        values["model"] |= {
            "name": f"shape {args.shape} ({find_shape(args.shape).source})",
            "tokenizer": args.tokenizer,
            "vocab_size": config["vocab_size"],
        }
        del values["output_dir"]
    return values


def ablate(args: argparse.Namespace, recipe: "Run") -> None:
    """Measure a recipe and its variants in turns; print the table, and write it to --json."""
    import torch

    from tunesmith.tools.bench import ablation

    variants = dict(ablation.variants(recipe, gpu=torch.cuda.is_available()))
    changes = {ablation.BASELINE: "", **variants}
    if args.only:
        changes = {ablation.BASELINE: "", **choose_variants(variants, args.only)}
    commands = {}
    for name, change in changes.items():
        commands[name] = command_of(args, args.steps, args.warmup, change)
    reports = ablation.run_in_turns(commands, rounds=args.rounds)
    table = ablation.table_of(reports)
    print(*ablation.lines_of(table, changes), sep="\n")
    if args.json:
        report = {"command": sys.argv, "changes": changes, "table": table, "runs": reports}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def choose_variants(variants: dict[str, str], only: str) -> dict[str, str]:
    """Those that --only names, by their name or by the key that they change."""
    words = [word.strip() for word in only.split(",")]
    labels = {name: {name, change.partition("=")[0]} for name, change in variants.items()}
    for word in words:
        if not any(word in names for names in labels.values()):
            what = f"there is no variant {word!r} of this recipe"
            fix = f"use one of: {', '.join(variants)}; or name a key that they change"
            raise UsageError(what, where="--only", fix=fix)
    return {name: change for name, change in variants.items() if labels[name] & {*words}}


def command_of(args: argparse.Namespace, steps: int, warmup: int, change: str = "") -> list[str]:
    """The command that measures the same in a new process, with other steps and with `change`."""
    command = [sys.executable, "-m", "tunesmith", "bench", *args.words]
    if change:
        command.append(change)
    command += typed_again(args, ("shape", *SHAPE_OPTIONS))
    return [*command, "--steps", str(steps), "--warmup", str(warmup)]


def first_steps(figures: "BenchReport", args: argparse.Namespace, file: Path) -> dict[str, float]:
    """Seconds of build and first step here, and in a new process.

    That one finds what this one has compiled.
    """
    # One step after no warmup: its compile cache is the one that this process has filled.
    command = command_of(args, 1, 0)
    process = subprocess.run(
        [*command, "--json", str(file)], stdout=subprocess.DEVNULL, check=False
    )
    if process.returncode:
        ended = f"ended with {process.returncode}; its messages are above"
        what = f"the run with a warm compile cache {ended}"
        fix = "run that command on its own, or remove --cold"
        raise RunError(what, where=" ".join(command), fix=fix)
    warm = json.loads(file.read_text(encoding="utf-8"))["figures"]
    return {
        "first_step_seconds": figures.first_step_seconds,
        "build_seconds": figures.build_seconds,
        "warm_first_step_seconds": warm["first_step_seconds"],
        "warm_build_seconds": warm["build_seconds"],
    }


def print_figures(figures: "BenchReport", lines: Sequence[str], *, plain: bool) -> None:
    """Print the table and the lines after it to stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if plain or not sys.stdout.isatty():
        # A pipe has no width: the table is not broken into lines.
        console = Console(width=160, no_color=True, force_terminal=False)
    base = f"base {figures.quantize}, micro batch {figures.micro_batch}"
    print(f"{figures.device}, {figures.dtype}, {base}, attention {figures.attention}")
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(style="bold", justify="right")
    table.add_column(style="dim")
    for row in figures.rows():
        table.add_row(*row)
    console.print(table)
    for line in lines:
        print(line)
