"""`tunesmith bench`: how fast a recipe trains here, and what that is of what the chip can do.

The steps are those of `train`, on real rows; nothing is kept. --shape takes a model's true shape with random weights
that are drawn on the device, so that nothing is downloaded: its tokenizer may be any that fits the vocabulary. A shape
is a recipe too (LoRA r = 8 on all linear layers, seq_len 2048, packed, 16,384 tokens a step), and key=value wins.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import EXIT_OK, RunError, UsageError
from tunesmith.model.shapes import SHAPES, find_shape

if TYPE_CHECKING:
    from tunesmith.bench.figures import BenchReport
    from tunesmith.bench.measure import Measured
    from tunesmith.config.schema import Run

EPILOG = f"""shapes: {", ".join(f"{name} ({shape.source})" for name, shape in SHAPES.items())}

example:
  tunesmith bench smollm2-135m-lora data.train.source=rows.jsonl data.train.format=alpaca
  tunesmith bench --shape llama3-8b --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct --data rows.json --json 8b.json
  tunesmith bench --shape llama3-3b --tokenizer DIR --data rows.json adapter.kind=none --profile traces
"""
FORMATS = ("alpaca", "messages", "sharegpt", "prompt-completion", "text")
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tunesmith bench`."""
    parser.usage = f"{parser.prog} (RECIPE | --shape NAME --tokenizer T --data FILE) [key=value ...] [options]"
    parser.add_argument("words", nargs="*", metavar="RECIPE | key=value", help="a recipe, and keys that win over it")
    parser.add_argument(
        "--shape", metavar="NAME", help="a model's true shape with random weights, in place of a recipe"
    )
    parser.add_argument("--tokenizer", metavar="DIR_OR_ID", help="of a shape: any that fits its vocabulary")
    parser.add_argument("--data", metavar="FILE", help="of a shape: real rows, a file or a Hub id")
    parser.add_argument("--format", choices=FORMATS, help="of a shape's rows (default: alpaca)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="timed steps (default: 20)")
    parser.add_argument("--warmup", type=int, default=5, metavar="N", help="steps before them (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="write figures, recipe, versions and hardware there")
    parser.add_argument(
        "--profile", metavar="DIR", help="trace further steps, as the recipe's `profile` says, into DIR"
    )
    parser.add_argument(
        "--cold", action="store_true", help="first step with an empty compile cache, and with a warm one"
    )
    parser.add_argument("--against", choices=["trl"], help="the same rows through TRL, in a process of its own")
    parser.add_argument("--plain", action="store_true", help="print plain text on a terminal too")


def run(args: argparse.Namespace) -> int:
    """Measure; errors leave as TunesmithError with their exit code."""
    check(args)
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with caches(folder / "cache" if args.cold else None):  # before torch compiles anything
            report, figures, lines = bench(args, folder)
    show(figures, lines, plain=args.plain)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return EXIT_OK


def check(args: argparse.Namespace) -> None:
    """Refuse words that contradict each other, before anything heavy is imported."""
    recipes = [word for word in args.words if "=" not in word]
    if args.shape is not None and recipes:
        raise UsageError(
            f"both a recipe ({recipes[0]}) and --shape {args.shape}",
            where="command line",
            why="a shape is a recipe of its own",
            fix="leave one of the two away; keys of a shape are given as key=value",
        )
    if args.shape is None and len(recipes) != 1:
        what = f"several recipes: {', '.join(recipes)}" if recipes else "bench needs a recipe or a shape"
        fix = "tunesmith bench my-recipe.yaml, or --shape llama3-8b --tokenizer DIR --data rows.json"
        raise UsageError(what, where="command line", fix=fix)
    if args.shape is not None:
        find_shape(args.shape)
    for option, key in (
        ("tokenizer", "model.tokenizer"),
        ("data", "data.train.source"),
        ("format", "data.train.format"),
    ):
        given = vars(args)[option]
        if args.shape is None and given is not None:
            fix = f"{key}={given}"
            raise UsageError(
                f"--{option} goes with --shape", where=f"--{option}", why="a recipe has a key for it", fix=fix
            )
        if args.shape is not None and given is None and option != "format":
            example = {"tokenizer": "HuggingFaceTB/SmolLM2-135M-Instruct", "data": "rows.json"}[option]
            raise UsageError(f"--shape needs --{option}", where="--shape", fix=f"--{option} {example}")
    for option, least in (("steps", 1), ("warmup", 0)):
        if vars(args)[option] < least:
            raise UsageError(
                f"--{option} {vars(args)[option]} is out of range", where=f"--{option}", fix=f"give at least {least}"
            )
    if args.json and not Path(args.json).absolute().parent.is_dir():
        parent = Path(args.json).parent
        raise UsageError(f"there is no folder {parent}", where="--json", fix=f"mkdir -p {parent}")
    if args.profile and Path(args.profile).exists() and not Path(args.profile).is_dir():
        raise UsageError(f"{args.profile} is a file", where="--profile", fix="name a folder for the traces")


def bench(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], BenchReport, list[str]]:
    """Measure in `folder`; the report for --json, its figures, and the lines that follow their table."""
    recipe = recipe_of(args, folder / "model")
    check_machine(args, recipe)
    from tunesmith.bench.measure import BenchPlan, let_go, measure
    from tunesmith.metrics import hardware

    plan = BenchPlan(
        recipe,
        args.steps,
        args.warmup,
        weights="random" if args.shape else "stored",
        traces=Path(args.profile) if args.profile else None,
    )
    (folder / "run").mkdir()
    measured = measure(plan, folder / "run")
    report: dict[str, Any] = {
        "figures": measured.figures.values(),
        "recipe": described(args, recipe),
        "machine": hardware.describe(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    lines: list[str] = []
    if args.profile:
        from tunesmith.bench.kernels import summarise

        summary = summarise(measured.traces)
        report["profile"] = {"traces": [str(trace) for trace in measured.traces], **summary.values()}
        lines += [*summary.lines(), *(f"trace: {trace}" for trace in measured.traces)]
    if args.cold or args.against:
        let_go()
    if args.cold:
        lines += cold(report, args, folder)
    if args.against:
        lines += against(report, args, recipe, measured, folder)
    return report, measured.figures, lines


def recipe_of(args: argparse.Namespace, folder: Path) -> Run:
    """The checked recipe; a shape's model, without weights, is written to `folder` first."""
    overrides = [word for word in args.words if "=" in word]
    if args.shape is None:
        from tunesmith.config.load import load_recipe

        return load_recipe(next(word for word in args.words if "=" not in word), overrides)
    from tunesmith.bench import shape

    folder.mkdir()
    checked = shape.shape_recipe(folder, data=args.data, rows=args.format or FORMATS[0], overrides=overrides)
    if changed := shape.write_shape(folder, find_shape(args.shape).config, args.tokenizer):
        print(f"warning: {args.shape} with a {changed}", file=sys.stderr, flush=True)
    return checked


def check_machine(args: argparse.Namespace, recipe: Run) -> None:
    """Refuse what this machine cannot measure."""
    from tunesmith.bench import peer
    from tunesmith.runtime.compilation import should_compile
    from tunesmith.training.build import choose_device

    if args.cold and not should_compile(recipe.train.compile, choose_device()):
        raise UsageError(
            "--cold measures compilation, and nothing is compiled here",
            where="--cold",
            why=f"train.compile is {recipe.train.compile}, which compiles nothing on this machine",
            fix="train.compile=on, or leave --cold away",
        )
    if args.against:
        peer.check(recipe)


def described(args: argparse.Namespace, recipe: Run) -> dict[str, Any]:
    """The whole recipe as plain values; a shape's name in the place of its passing folder."""
    from tunesmith.config.dump import to_mapping

    values = to_mapping(recipe)
    if args.shape:
        values["model"] |= {"name": f"shape {args.shape} ({find_shape(args.shape).source})", "tokenizer": args.tokenizer}
        values["model"]["vocab_size"] = json.loads((Path(recipe.model.name) / "config.json").read_text())["vocab_size"]
        del values["output_dir"]
    return values


# ---- a cold compile cache -----------------------------------------------------------------------------------------


@contextmanager
def caches(folder: Path | None) -> Iterator[None]:
    """Have what torch compiles kept in `folder`, this process's children included; None changes nothing."""
    before = {name: os.environ.get(name) for name in CACHES}
    if folder is not None:
        os.environ |= {CACHES[0]: str(folder), CACHES[1]: str(folder / "triton")}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def cold(report: dict[str, Any], args: argparse.Namespace, folder: Path) -> list[str]:
    """One step in a process of its own, which finds what this one has compiled; both first steps into the report."""
    file = folder / "warm.json"
    command = [sys.executable, "-m", "tunesmith", "bench", *args.words, "--steps", "1", "--warmup", "0"]
    for option in ("shape", "tokenizer", "data", "format"):
        if vars(args)[option] is not None:
            command += [f"--{option}", vars(args)[option]]
    done = subprocess.run([*command, "--json", str(file)], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise RunError(
            f"the run with a warm compile cache ended with {done.returncode}",
            where=" ".join(command),
            why="its words are above",
            fix="run that command by itself, or leave --cold away",
        )
    warm = json.loads(file.read_text(encoding="utf-8"))["figures"]
    found = {
        "first_step_seconds": report["figures"]["first_step_seconds"],
        "build_seconds": report["figures"]["build_seconds"],
        "warm_first_step_seconds": warm["first_step_seconds"],
        "warm_build_seconds": warm["build_seconds"],
    }
    report["cold"] = found
    # The build belongs to it: on a GPU its trial of memory is what compiles first.
    text = (
        "build and first step: {build_seconds:.1f} + {first_step_seconds:.1f} s with an empty compile cache, "
        "{warm_build_seconds:.1f} + {warm_first_step_seconds:.1f} s with a warm one"
    )
    return [text.format(**found)]


# ---- the peer -----------------------------------------------------------------------------------------------------


def against(
    report: dict[str, Any], args: argparse.Namespace, recipe: Run, measured: Measured, folder: Path
) -> list[str]:
    """The same rows through TRL, into the report."""
    from tunesmith.bench import peer

    theirs = peer.race(peer.request(recipe, measured, random=args.shape is not None), folder)
    ours = measured.figures
    ratio = ours.tokens_per_second / theirs["tokens_per_second"]
    report["trl"] = {**theirs, "ratio": ratio}
    memory = ours.peak_allocated_gib if ours.peak_allocated_gib is not None else ours.peak_resident_gib
    return [
        f"TRL {theirs['trl']}, its defaults, {theirs['rows']} rows a step: {theirs['tokens_per_second']:,.0f} non-padding tokens/s, "
        f"{theirs['peak_gib']:.1f} GiB; ours {ours.tokens_per_second:,.0f} ({ratio:.2f} x), {memory:.1f} GiB"
    ]


# ---- what is shown ------------------------------------------------------------------------------------------------


def show(figures: BenchReport, lines: Sequence[str], *, plain: bool) -> None:
    """The table and what follows it, on stdout: by rich on a terminal, as aligned text elsewhere."""
    rows = list(figures.rows())
    title = f"{figures.device}, {figures.dtype}, base {figures.quantize}, {figures.micro_batch} a pass"
    if plain or not sys.stdout.isatty():
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        print(title)
        for what, value, remark in rows:
            print(f"{what:<{widths[0]}}  {value:>{widths[1]}}  {remark}".rstrip())
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column()
        table.add_column(style="bold", justify="right")
        table.add_column(style="dim")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    print(*lines, sep="\n", end="\n" if lines else "")
