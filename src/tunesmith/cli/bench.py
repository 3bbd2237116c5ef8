"""`tunesmith bench`: how fast a recipe trains here, and what share of the chip's speed that is.

The steps are those of `train`, on real rows; nothing is kept. --shape takes a model's true shape with random weights
that are drawn on the device, so nothing is downloaded; its tokenizer may be any that fits the vocabulary. A shape comes
with a recipe (LoRA of rank 8 on all linear layers, seq_len 2048, packed, 16,384 tokens per step), and key=value wins.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config.check import COLUMNS
from tunesmith.distributed.ranks import refuse_many_ranks
from tunesmith.errors import RunError, UsageError
from tunesmith.model.shapes import SHAPES, find_shape

if TYPE_CHECKING:
    from tunesmith.bench.measure import BenchReport
    from tunesmith.config.schema import Run

EPILOG = f"""shapes: {", ".join(f"{name} ({shape.source})" for name, shape in SHAPES.items())}

example:
  tunesmith bench smollm2-135m-lora data.train.source=rows.jsonl data.train.format=alpaca
  tunesmith bench --shape llama3-8b --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct --data rows.json --json 8b.json
  tunesmith bench --shape llama3-3b --tokenizer DIR --data rows.json adapter.kind=none --profile traces
  tunesmith bench my-recipe.yaml --ablation --only data.pack,train.recompute --json ablation.json
"""
# Options of a shape -> (key that a recipe has for it, example; empty where the option may be left out)
OF_SHAPE = {
    "tokenizer": ("model.tokenizer", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "data": ("data.train.source", "rows.json"),
    "format": ("data.train.format", ""),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        f"{parser.prog} (RECIPE | --shape NAME --tokenizer T --data FILE) [key=value ...] [options]"
    )
    add = parser.add_argument
    add(
        "words", nargs="*", metavar="RECIPE | key=value", help="a recipe, and keys that win over it"
    )
    add(
        "--shape",
        metavar="NAME",
        help="a model's true shape with random weights, instead of a recipe",
    )
    add(
        "--tokenizer",
        metavar="DIR_OR_ID",
        help="with --shape: any tokenizer that fits its vocabulary",
    )
    add("--data", metavar="FILE", help="with --shape: real rows, a file or a Hub id")
    add("--format", choices=COLUMNS, help="with --shape: format of the rows (default: alpaca)")
    add("--steps", type=int, default=20, metavar="N", help="timed steps (default: 20)")
    add("--warmup", type=int, default=5, metavar="N", help="steps before them (default: 5)")
    add("--json", metavar="FILE", help="write figures, recipe, versions and hardware there")
    add(
        "--profile",
        metavar="DIR",
        help="profile further steps, as the recipe's `profile` says, into DIR",
    )
    add(
        "--cold",
        action="store_true",
        help="time the first step with an empty and with a warm compile cache",
    )
    add(
        "--ablation",
        action="store_true",
        help="measure again with one key changed at a time, each in a new process",
    )
    add(
        "--only",
        metavar="NAMES",
        help="with --ablation: these variants alone, by name or key, separated by commas",
    )
    add(
        "--rounds",
        type=int,
        default=2,
        metavar="N",
        help="with --ablation: rounds, variants in turns (default: 2)",
    )
    add("--plain", action="store_true", help="print plain text on a terminal too")


def run(args: argparse.Namespace) -> None:
    check_arguments(args)
    refuse_many_ranks("bench")
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-", ignore_cleanup_errors=True) as name:
        recipe = recipe_of(args, Path(name) / "model")
        if args.ablation:
            ablate(args, recipe)
            return
        if args.cold:
            refuse_eager(recipe)
            # Both are read when something is compiled, and this process does nothing after the command.
            os.environ |= {
                "TORCHINDUCTOR_CACHE_DIR": f"{name}/cache",
                "TRITON_CACHE_DIR": f"{name}/cache/triton",
            }
        figures, report, lines = bench(args, recipe, Path(name))
    print_figures(figures, lines, plain=args.plain)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other, before anything heavy is imported."""
    recipes = [word for word in args.words if "=" not in word]
    usage = "tunesmith bench my-recipe.yaml, or --shape llama3-8b --tokenizer DIR --data rows.json"
    folder, traces = Path(args.json or ".").parent, Path(args.profile or ".")
    beside = args.ablation and bool(args.cold or args.profile)
    if args.shape is not None:
        find_shape(args.shape)
    problems = [  # (whether, where, what, fix)
        (len(recipes) > 1, "command line", f"several recipes: {', '.join(recipes)}", usage),
        (
            not recipes and args.shape is None,
            "command line",
            "bench needs a recipe or a shape",
            usage,
        ),
        (args.steps < 1, "--steps", f"--steps {args.steps} is out of range", "give at least 1"),
        (args.warmup < 0, "--warmup", f"--warmup {args.warmup} is out of range", "give at least 0"),
        (args.rounds < 1, "--rounds", f"--rounds {args.rounds} is out of range", "give at least 1"),
        (
            bool(args.only) and not args.ablation,
            "--only",
            "--only chooses variants of --ablation",
            "add --ablation",
        ),
        (
            beside,
            "--ablation",
            "--ablation times whole runs only",
            "remove --cold and --profile, or --ablation",
        ),
        (not folder.is_dir(), "--json", f"there is no folder {folder}", f"mkdir -p {folder}"),
        (traces.is_file(), "--profile", f"{traces} is a file", "name a folder for the traces"),
    ]
    if args.shape is not None and recipes:
        what = f"both a recipe ({recipes[0]}) and --shape {args.shape}, which comes with a recipe of its own"
        problems.insert(
            0,
            (
                True,
                "command line",
                what,
                "remove one of the two; give keys of a shape as key=value",
            ),
        )
    for option, (key, example) in OF_SHAPE.items():
        where, given = f"--{option}", vars(args)[option]
        if args.shape is None:
            what = f"{where} goes with --shape: a recipe has a key for it"
            problems.append((given is not None, where, what, f"{key}={given}"))
        else:
            missing = given is None and bool(example)
            problems.append((missing, "--shape", f"--shape needs {where}", f"{where} {example}"))
    for wrong, where, what, fix in problems:
        if wrong:
            raise UsageError(what, where=where, fix=fix)


def recipe_of(args: argparse.Namespace, folder: Path) -> "Run":
    """The checked recipe; a shape's model, without weights, is written to `folder` first."""
    overrides = [word for word in args.words if "=" in word]
    if args.shape is None:
        from tunesmith.config.load import load_recipe

        return load_recipe(next(word for word in args.words if "=" not in word), overrides)
    from tunesmith.bench.shape import shape_recipe, write_shape

    folder.mkdir()
    checked = shape_recipe(
        folder, data=args.data, rows=args.format or "alpaca", overrides=overrides
    )
    if changed := write_shape(folder, find_shape(args.shape).config, args.tokenizer):
        print(f"warning: {args.shape} with a {changed}", file=sys.stderr, flush=True)
    return checked


def refuse_eager(recipe: "Run") -> None:
    """UsageError for --cold where nothing is compiled. The compiler itself is tried later, within what is timed."""
    import torch

    if recipe.train.compile != "on" and (
        recipe.train.compile == "off" or not torch.cuda.is_available()
    ):
        what = f"--cold measures compilation, and train.compile {recipe.train.compile} compiles nothing here"
        raise UsageError(what, where="--cold", fix="train.compile=on, or remove --cold")


def bench(
    args: argparse.Namespace, recipe: "Run", folder: Path
) -> "tuple[BenchReport, dict[str, Any], list[str]]":
    """Measure in `folder`; the figures, the report for --json, and the lines that follow the table."""
    from tunesmith.bench.measure import BenchPlan, measure
    from tunesmith.config.dump import to_mapping
    from tunesmith.metrics import hardware
    from tunesmith.runtime.device import free_device_memory

    traces = Path(args.profile) if args.profile else None
    plan = BenchPlan(recipe, args.steps, args.warmup, "random" if args.shape else "stored", traces)
    (folder / "run").mkdir()
    measured = measure(plan, folder / "run")
    values = to_mapping(recipe)
    if args.shape:  # its name instead of its temporary folder
        name = f"shape {args.shape} ({find_shape(args.shape).source})"
        config = json.loads((Path(recipe.model.name) / "config.json").read_text(encoding="utf-8"))
        values["model"] |= {
            "name": name,
            "tokenizer": args.tokenizer,
            "vocab_size": config["vocab_size"],
        }
        del values["output_dir"]
    report: dict[str, Any] = {"figures": vars(measured.figures), "recipe": values}
    report |= {
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
        free_device_memory()
        report["cold"] = cold = first_steps(report["figures"], args, folder / "warm.json")
        # The build counts too: on a GPU its trial of memory is what compiles first.
        empty = f"{cold['build_seconds']:.1f} + {cold['first_step_seconds']:.1f} s with an empty compile cache"
        warm = f"{cold['warm_build_seconds']:.1f} + {cold['warm_first_step_seconds']:.1f} s with a warm one"
        lines.append(f"build and first step: {empty}, {warm}")
    return measured.figures, report, lines


def ablate(args: argparse.Namespace, recipe: "Run") -> None:
    """Measure a recipe and its variants in turns; print the table, and write it with every report to --json."""
    import torch

    from tunesmith.bench import ablation

    changes = dict(ablation.variants(recipe, gpu=torch.cuda.is_available()))
    words = [word.strip() for word in args.only.split(",")] if args.only else []
    # By name, or by the key
    named = {name: {name, change.partition("=")[0]} for name, change in changes.items()}
    if unknown := [word for word in words if not any(word in names for names in named.values())]:
        what = f"there is no variant {unknown[0]!r} of this recipe"
        fix = f"choose from: {', '.join(changes)}; or name a key that they change"
        raise UsageError(what, where="--only", fix=fix)
    taken = {
        name: change for name, change in changes.items() if not words or named[name] & {*words}
    }
    chosen = {ablation.BASELINE: "", **taken}
    commands = {
        name: command_of(args, args.steps, args.warmup, change) for name, change in chosen.items()
    }
    found = ablation.run_in_turns(commands, rounds=args.rounds, announce=partial(print, flush=True))
    table = ablation.table_of(found)
    print(*ablation.lines_of(table, chosen), sep="\n")
    if args.json:
        report = {"command": sys.argv, "changes": chosen, "table": table, "runs": found}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def command_of(args: argparse.Namespace, steps: int, warmup: int, *changes: str) -> list[str]:
    """The command that measures the same in a new process, with other steps and with `changes` (key=value)."""
    command = [sys.executable, "-m", "tunesmith", "bench", *args.words, *filter(None, changes)]
    for option in ("shape", *OF_SHAPE):
        if vars(args)[option] is not None:
            command += [f"--{option}", vars(args)[option]]
    return [*command, "--steps", str(steps), "--warmup", str(warmup)]


def first_steps(figures: dict[str, Any], args: argparse.Namespace, file: Path) -> dict[str, float]:
    """Seconds of build and first step here, and in a new process that finds what this one has compiled."""
    command = command_of(args, 1, 0)
    done = subprocess.run([*command, "--json", str(file)], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        what = f"the run with a warm compile cache ended with {done.returncode}; its messages are above"
        raise RunError(
            what, where=" ".join(command), fix="run that command by itself, or remove --cold"
        )
    warm = json.loads(file.read_text(encoding="utf-8"))["figures"]
    names = ("first_step_seconds", "build_seconds")
    return {name: figures[name] for name in names} | {f"warm_{name}": warm[name] for name in names}


def print_figures(figures: "BenchReport", lines: Sequence[str], *, plain: bool) -> None:
    """Print the table and the lines after it to stdout."""
    from rich.console import Console
    from rich.table import Table

    plain = plain or not sys.stdout.isatty()
    console = Console(width=160, no_color=True, force_terminal=False) if plain else Console()
    print(
        f"{figures.device}, {figures.dtype}, base {figures.quantize}, micro batch {figures.micro_batch}"
    )
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(style="bold", justify="right")
    table.add_column(style="dim")
    for row in figures.rows():
        table.add_row(*row)
    console.print(table)
    print(*lines, sep="\n", end="\n" if lines else "")
