"""The work of `bench`: one measurement, or those of an ablation, and their tables."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tunesmith.cli.options import typed_again
from tunesmith.config.dump import to_mapping
from tunesmith.config.schema import Run
from tunesmith.errors import RunError, UsageError
from tunesmith.metrics import hardware
from tunesmith.model.shapes import find_shape
from tunesmith.runtime.device import free_device_memory
from tunesmith.tools.bench import ablation
from tunesmith.tools.bench.cli import SHAPE_OPTIONS
from tunesmith.tools.bench.measure import BenchPlan, BenchReport, measure
from tunesmith.tools.bench.shape import shape_recipe, write_shape


def run_bench(args: argparse.Namespace, recipe: Run | None) -> None:
    """Measure a recipe, or without one the shape of the options of `bench`; print the figures."""
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if recipe is None:
            recipe = recipe_of_shape(args, folder / "model")
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


def recipe_of_shape(args: argparse.Namespace, folder: Path) -> Run:
    """The checked recipe of a shape; its model, without weights, is written to `folder`."""
    overrides = [word for word in args.words if "=" in word]
    folder.mkdir()
    rows = args.format or "alpaca"
    # The recipe first: a wrong key costs no fetch of a tokenizer.
    recipe = shape_recipe(folder, data=args.data, rows=rows, overrides=overrides)
    change = write_shape(folder, find_shape(args.shape).config, args.tokenizer)
    if change:
        print(f"warning: {args.shape} with a {change}", file=sys.stderr, flush=True)
    return recipe


def check_compiles(recipe: Run) -> None:
    """UsageError for --cold where nothing is compiled.

    The compiler itself is tried later, within what is timed.
    """
    mode = recipe.train.compile
    if mode == "off" or (mode != "on" and not torch.cuda.is_available()):
        what = (
            f"--cold measures compilation, and train.compile {mode} does not compile anything here"
        )
        raise UsageError(what, where="--cold", fix="train.compile=on, or remove --cold")


def bench(
    args: argparse.Namespace, recipe: Run, folder: Path
) -> tuple[BenchReport, dict[str, object], list[str]]:
    """Measure in `folder`: figures, the report for --json, and the lines that follow the table."""
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


def plain_recipe(args: argparse.Namespace, recipe: Run) -> dict[str, object]:
    """The recipe as plain values; a shape has its name instead of its temporary folder."""
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


def ablate(args: argparse.Namespace, recipe: Run) -> None:
    """Measure a recipe and its variants in turns; print the table, and write it to --json."""
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


def first_steps(figures: BenchReport, args: argparse.Namespace, file: Path) -> dict[str, float]:
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


def print_figures(figures: BenchReport, lines: Sequence[str], *, plain: bool) -> None:
    """Print the table and the lines after it to stdout."""
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
