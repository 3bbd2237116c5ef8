"""Estimate memory, time and cost of a recipe on any hardware.

example:
  tunesmith plan my-recipe.yaml  # on this machine
  # your rows, if they are elsewhere: how many, and tokens in each
  tunesmith plan llama3.3-70b-lora --rows 50000 --length 400 \\
    --on 2x8xh100 --price 2.5  # USD per GPU-hour
  # what `train` with the same options would take; nothing is written
  tunesmith plan --model Qwen/Qwen3-8B --data faq.csv --on h100
  tunesmith plan my-recipe.yaml parallel.tensor=8 --on 8xh100 --json

Needs the model's config.json (the models of shipped recipes need nothing) and
no GPU. Lengths come from the token cache, which `tunesmith data` fills. The
exit code is 2 if it does not fit.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal as size_text

from tunesmith.cli.options import add_json, add_recipe, chosen_recipe, whole_number
from tunesmith.errors import EXIT_OK, UsageError
from tunesmith.host.shell import shell_word
from tunesmith.host.streams import show
from tunesmith.planning.machines import MEASURED_HERE, TRIAL_RANGE
from tunesmith.quant.schemes import scheme_of
from tunesmith.units import count_of, format_seconds

if TYPE_CHECKING:
    from tunesmith.config.schema import Run
    from tunesmith.planning.forecast import Forecast, Planner
    from tunesmith.planning.machines import Cluster
    from tunesmith.tools.plan.on_paper import StatedRows

LOADS_TORCH = "here"

log = logging.getLogger(__name__)

GIB = 2**30
# The keys of a new recipe that are shown.
CHOSEN_KEYS = (
    "adapter.rank",
    "data.seq_len",
    "data.hold_out",
    "train.duration",
    "train.global_batch",
    "train.learning_rate",
)
ROWS_FIX = "give their number: --rows N"
# Below the table of several GPUs.
MESH_TEXT = (
    "(a way to divide the GPUs is a mesh: copies of the model x shards of its layers x parts of "
    "each matrix; of those within 5 % of the fastest the simplest comes first; idle: the share of "
    "GPUs that a step has too few examples for)"
)
# Meshes that are shown without --all.
SHOWN_MESHES = 3
# Parts of a step that take a smaller share of it are not shown.
MIN_SHOWN_SHARE = 0.01
# What the phases of memory and the parts of a step are called here; --json has the short names.
PHASES = {"load": "while it loads", "step": "in a step", "save": "while it saves"}
STEP_PART_NAMES = {
    "products": "matrix products",
    "recompute": "recomputing layers",
    "fixed cost of passes": "reading weights",
    "update": "optimizer",
    "shard copies": "copying other ranks' weights",
    "copies for experts": "sorting tokens by expert",
    "tensor parallel": "exchanging activations",
    "shards": "reading other ranks' weights",
    "host copies": "waiting for layers from the host",
    "gradients": "summing gradients",
}


# What the keys of the bytes that a GPU sends are called here.
LINKS = {"link": "within its node", "network": "to other nodes"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    machines = "2x8xh100, 4xa100-80gb, h200, 2x-dgx-spark, ... (default: this machine)"
    parser.add_argument("--on", action="append", metavar="MACHINES", help=machines)
    names = "gib, tflops (of whole steps in bf16), bandwidth, link, network (GB/s)"
    figures = f"a property of the GPUs: {names}"
    parser.add_argument(
        "--assume", action="append", default=[], metavar="NAME=NUMBER", help=figures
    )
    parser.add_argument(
        "--length",
        type=whole_number,
        metavar="TOKENS",
        help="tokens per example, if none are cached",
    )
    parser.add_argument(
        "--rows",
        type=whole_number,
        metavar="N",
        help="rows of data.train, if they are not on this machine",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help=f"show every mesh (default: the best {SHOWN_MESHES} that fit)",
    )
    parser.add_argument("--price", type=_price, metavar="USD", help="USD per GPU-hour")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    cluster = _cluster(args)
    recipe, rows = _recipe(args, cluster.world)
    from tunesmith.planning.savings import check_memory_fits
    from tunesmith.tools.plan.on_paper import prepare_on_paper

    planner, folder = prepare_on_paper(recipe, cluster, rows)
    forecasts = planner.ranked()
    best = forecasts[0]
    if args.json:
        print(json.dumps(_report(planner, forecasts, args.price, folder), indent=1, default=vars))
    else:
        fitting = [forecast for forecast in forecasts if forecast.fits][:SHOWN_MESHES]
        lines = _table(planner, forecasts, forecasts if args.all else fitting or [best])
        if best.fits:
            lines += _details(planner, best, args.price, folder)
        show("\n".join(lines), sys.stdout)
    check_memory_fits(best.plan, planner.machine, where=cluster.describe())
    return EXIT_OK


def _cluster(args: argparse.Namespace) -> "Cluster":
    """The machines of --on, with the figures of --assume."""
    from tunesmith.planning.machines import read_cluster

    machines = args.on or ["here"]
    if len(machines) > 1:
        raise UsageError(
            f"--on was given {len(machines)} times",
            where="command line: --on",
            why="a plan is for one machine",
            fix="tunesmith plan once for each machine; --json has the figures to compare",
        )
    return read_cluster(machines[0], args.assume)


def _recipe(args: argparse.Namespace, ranks: int) -> "tuple[Run, StatedRows]":
    """The recipe, and what is said of its rows, which a new recipe was chosen by."""
    from tunesmith.config.dump import flatten

    recipe, new_recipe = chosen_recipe(args, on_paper=True, row_count=args.rows, ranks=ranks)
    # It loads torch, and a wrong word has been refused by now.
    from tunesmith.tools.plan.on_paper import StatedRows

    rows = StatedRows(args.rows, args.length)
    if new_recipe is None:
        return recipe, rows
    values = flatten(recipe)
    pairs = [f"{key}={shell_word(values[key])}" for key in CHOSEN_KEYS if values.get(key)]
    log.info(f"chosen, as `train` with the same options does: {' '.join(pairs)}")
    return recipe, replace(
        rows, looked_at=new_recipe.mean_length, is_estimated=new_recipe.is_estimated
    )


def _price(text: str) -> float:
    """A finite number above 0."""
    with suppress(ValueError):
        if 0 < (price := float(text)) < math.inf:
            return price
    raise argparse.ArgumentTypeError(f"{text} is not a number above 0")


def _report(
    planner: "Planner", forecasts: "Sequence[Forecast]", price: float | None, base: Path | None
) -> dict[str, object]:
    """Return what --json prints; `base` is the folder of the model."""
    from tunesmith.planning.resolve import checkpoint_bytes

    meshes = []
    for forecast in forecasts:
        mesh = forecast.plan.mesh._asdict()
        plan = vars(forecast.plan) | {"mesh": mesh, "savings": None}
        meshes.append(vars(forecast) | {"plan": plan})
    size, _ = checkpoint_bytes(planner.run, planner.trained, base)
    report = {
        "machines": vars(planner.cluster),
        "work": planner.work._asdict(),
        "checkpoint_bytes": size,
    }
    hours = forecasts[0].hours
    if price:
        report["cost_usd"] = hours * price * planner.cluster.world if hours else None
    if hours and _measured_here(planner):
        report["hours_range"] = [hours * factor for factor in TRIAL_RANGE]
    return report | {"meshes": meshes}


def _table(planner: "Planner", forecasts: "list[Forecast]", shown: "list[Forecast]") -> list[str]:
    """The machines, the examples, and a row for each mesh that is shown."""
    from tunesmith.data.batches.schedule import describe_long_warmup

    chip = planner.cluster.chip
    work = planner.work
    speed = "for times --assume tflops=NUMBER"
    if chip.tflops:
        rounded = f"{chip.tflops:.0f}" if chip.tflops >= 10 else f"{chip.tflops:.2g}"
        speed = f"{rounded} TFLOP/s in whole steps"
    machines = planner.cluster.describe()
    steps = f", {count_of(work.steps, 'step')}" if work.steps else ""
    lines = [
        f"{machines}: {chip.gib:.0f} GiB, {speed}",
        f"  ({chip.source})",
        f"examples: {work.source}; {work.step.mean:,.0f} tokens a step{steps}",
        # At most 80 columns, as the rows.
        "replicate, shard, tensor    micro batch recompute    GiB  step s  tokens/s idle",
    ]
    lines += [_row(planner, forecast) for forecast in shown]
    if planner.cluster.world > 1:
        lines.append(MESH_TEXT)
    if len(forecasts) > len(shown):
        lines.append(f"({len(forecasts) - len(shown)} more meshes: --all shows every one)")
    best = forecasts[0].plan
    if scheme_of(planner.run.model).has_fp8_matmuls and best.base != "fp8":
        what = f"the base stays in {best.base}: {best.why['base']}"
        lines.append(f"warning: {what}; to save memory: model.quantize=nf4")
    lines += best.warnings
    long_warmup = describe_long_warmup(planner.run.train, work.steps)
    lines += [f"warning: {text}" for text in long_warmup]
    return lines


def _largest_phase(planner: "Planner", forecast: "Forecast") -> tuple[str, int]:
    """The phase that needs the most bytes, of those that decide whether the run fits.

    A checkpoint of an adapter for which there is no room beside a step waits for it.
    """
    from tunesmith.planning.savings import memory_needs

    if not forecast.fits:
        return "step", memory_needs(forecast.plan, planner.machine)[0]
    phases = forecast.phases
    if _waits_to_save(forecast):
        phases = {name: size for name, size in phases.items() if name != "save"}
    return max(phases.items(), key=lambda phase: phase[1])


def _waits_to_save(forecast: "Forecast") -> bool:
    return bool(forecast.plan.memory.copies) and forecast.phases["save"] > forecast.room


def _step_text(seconds: float) -> str:
    """Seconds of a step: `2.67`, and `0.0038` of a short one."""
    return f"{seconds:.2f}" if seconds >= 0.1 else f"{seconds:.4f}"


def _row(planner: "Planner", forecast: "Forecast") -> str:
    """The line of one mesh."""
    plan = forecast.plan
    recompute = f"{plan.recomputed_layers} of {plan.layers}"
    figures = f"{'-':>7} {'-':>9}"
    if forecast.step_seconds and forecast.tokens_per_second:
        about = "~" if _measured_here(planner) else ""
        seconds = about + _step_text(forecast.step_seconds)
        speed = f"{about}{forecast.tokens_per_second:,.0f}"
        figures = f"{seconds:>7} {speed:>9}"
    figures += f" {forecast.idle_share:4.0%}"
    if not forecast.fits:
        figures = " does not fit"
    micro_batch = plan.choices["micro batch"]
    needed = _largest_phase(planner, forecast)[1] / GIB
    return f"{plan.mesh.sizes():<24} {micro_batch:>14} {recompute:>9} {needed:6.1f} {figures}"


def _optimizer_lines(run: "Run") -> list[str]:
    """The settings that the memory of full fine-tuning depends on most; empty for LoRA."""
    if run.adapter.kind != "none":
        return []
    settings = f"train.optimizer={run.train.optimizer}"
    if run.model.dtype == "bf16":
        settings += f" train.master_weights={run.train.master_weights}"
    return [f"  of full fine-tuning with {settings}"]


def _details(
    planner: "Planner", best: "Forecast", price: float | None, base: Path | None
) -> list[str]:
    """Describe what the best mesh does: memory, seconds of a step, what is sent, disk, hours."""
    from tunesmith.planning.resolve import checkpoint_bytes

    step_seconds = best.step_seconds or 0
    is_gpu = planner.machine.device == "cuda"
    device = "a GPU" if is_gpu else "the process, without 0.5 GiB of Python and its libraries"
    phase, largest = _largest_phase(planner, best)
    needed = f"{largest / GIB:.1f} of {best.room / GIB:.1f} usable GiB {PHASES[phase]}"
    if phase != "step":
        needed += f"; {best.phases['step'] / GIB:.1f} {PHASES['step']}"
    lines = [f"memory of {device}: {needed}: {best.plan.memory.describe()}"]
    lines += _optimizer_lines(planner.run)
    if _waits_to_save(best):
        lines.append("  a checkpoint has no room beside a step: training waits until it is written")
    if step_seconds:
        lines += _describe_step(best, step_seconds)
    amounts = [f"{size_text(int(sent))} {LINKS[link]}" for link, sent in best.sent.items() if sent]
    if amounts:
        lines.append(f"a GPU sends per step: {', '.join(amounts)}")
    size, copies = checkpoint_bytes(planner.run, planner.trained, base)
    most = f"at most {copies} at once, {size_text(copies * size)}"
    lines.append(f"disk: {size_text(size)} per checkpoint, {most}")
    warning = planner.warn_of_exposed_gathers(best)
    if warning:
        lines.append(warning)
    lines += _hours(planner, best, price, checkpoint_size=size)
    if planner.cluster.world > 1:
        lines.append(f"`train` takes the first by itself; a recipe fixes it with {best.keys}")
    return lines


def _describe_step(forecast: "Forecast", step_seconds: float) -> list[str]:
    """The parts of a step, and the communication that they hide."""
    unit, scale = ("seconds", 1) if step_seconds >= 1 else ("milliseconds", 1000)
    parts = [
        f"{STEP_PART_NAMES.get(part, part)} {scale * value:.2f}"
        for part, value in forecast.seconds.items()
        if value >= MIN_SHOWN_SHARE * step_seconds
    ]
    lines = [f"{unit} of a step: {', '.join(parts)}"]
    if forecast.hidden_seconds:
        hidden = f"{scale * forecast.hidden_seconds:.2f} {unit}"
        lines.append(f"  communication that overlaps with compute: {hidden}")
    return lines


def _time_text(hours: float) -> str:
    """`2:05 h`, `5:04 min`, `42 s`, `under 1 s`."""
    seconds = 3600 * hours
    return format_seconds(seconds) if seconds >= 1 else "under 1 s"


def _measured_here(planner: "Planner") -> bool:
    """Tell whether a trial on this CPU gave the speed, which holds for a range alone."""
    return planner.cluster.chip.source == MEASURED_HERE


def _hours(
    planner: "Planner", best: "Forecast", price: float | None, *, checkpoint_size: int
) -> list[str]:
    """Say how long the run takes and what it costs, or a part of it if the whole is not known."""
    hourly = (price or 0) * planner.cluster.world
    if best.hours:
        duration = _time_text(best.hours)
        if _measured_here(planner):
            least, most = (_time_text(best.hours * factor) for factor in TRIAL_RANGE)
            duration = f"about {least} to {most}, as {planner.cluster.chip.source}"
        cost = f", {best.hours * hourly:,.2f} USD" if price else ""
        return [
            f"the run's steps: {duration}{cost}; loading, compilation, validation and checkpoints "
            f"of {size_text(checkpoint_size)} come on top"
        ]
    if best.tokens_per_second:
        hours = 1e6 / best.tokens_per_second / 3600
        cost = f" and {hours * hourly:,.2f} USD" if price else ""
        return [
            f"per million tokens: {_time_text(hours)}{cost}; the number of rows is "
            f"unknown, and so are the hours of the run: {ROWS_FIX}, or set "
            "train.duration='500 steps'"
        ]
    if price:
        why = "because the speed of this machine is unknown"
        return [f"hours and price: unknown, {why}; --assume tflops=100 gives them"]
    return []
