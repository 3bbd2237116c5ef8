"""Show a plan: the table of meshes, the details of the best one, hours and cost."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal as size_text

from tunesmith.config.schema import Run
from tunesmith.data.batches.schedule import describe_long_warmup
from tunesmith.host.streams import show
from tunesmith.model.gguf_writers import describe_gguf_export, gguf_writer
from tunesmith.planning.forecast import Forecast, Planner
from tunesmith.planning.machines import MEASURED_HERE, TRIAL_RANGE, Cluster
from tunesmith.planning.resolve import checkpoint_bytes
from tunesmith.planning.savings import check_memory_fits, memory_needs
from tunesmith.quant.schemes import scheme_of
from tunesmith.tools.plan.cli import SHOWN_MESHES
from tunesmith.tools.plan.on_paper import PaperModel, StatedRows, prepare_on_paper
from tunesmith.units import count_of, format_seconds

if TYPE_CHECKING:
    # With Transformers, which a plan can do without.
    from tunesmith.training.make_recipe import NewRecipe

GIB = 2**30
ROWS_FIX = "give their number: --rows N"
# Below the table of several GPUs.
MESH_TEXT = (
    "(a way to divide the GPUs is a mesh: copies of the model x shards of its layers x parts of "
    "each matrix; of those within 5 % of the fastest the simplest comes first; idle: the share of "
    "GPUs that a step has too few examples for)"
)
# Parts of a step that take a smaller share of it are not shown.
MIN_SHOWN_SHARE = 0.01
# What the parts of a step are called here; --json has the short names.
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


def show_plan(
    args: argparse.Namespace, cluster: Cluster, recipe: Run, new_recipe: "NewRecipe | None"
) -> None:
    """Print the plan of a recipe, as the options of `plan` say; MachineError where it does not fit.

    new_recipe: what the recipe was chosen by, of one that has no file.
    """
    rows = StatedRows(args.rows, args.length)
    if new_recipe is not None:
        is_estimated = new_recipe.is_estimated
        rows = replace(rows, looked_at=new_recipe.mean_length, is_estimated=is_estimated)
    planner, model = prepare_on_paper(recipe, cluster, rows)
    forecasts = planner.ranked()
    best = forecasts[0]
    if args.json:
        print(json.dumps(_report(planner, forecasts, args.price, model), indent=1, default=vars))
    else:
        fitting = [forecast for forecast in forecasts if forecast.fits][:SHOWN_MESHES]
        lines = _table(planner, forecasts, forecasts if args.all else fitting or [best])
        if best.fits:
            lines += _details(planner, best, args.price, model.folder)
            lines.append(f"GGUF: {describe_gguf_export(*model.types)}")
        show("\n".join(lines), sys.stdout)
    check_memory_fits(best.plan, planner.machine, where=cluster.describe())


def _report(
    planner: Planner, forecasts: Sequence[Forecast], price: float | None, model: PaperModel
) -> dict[str, object]:
    """Return what --json prints."""
    meshes = []
    for forecast in forecasts:
        mesh = forecast.plan.mesh._asdict()
        plan = vars(forecast.plan) | {"mesh": mesh, "savings": None}
        meshes.append(vars(forecast) | {"plan": plan})
    size, _ = checkpoint_bytes(planner.run, planner.trained, model.folder)
    report = {
        "machines": vars(planner.cluster),
        "work": planner.work._asdict(),
        "checkpoint_bytes": size,
        "gguf": {
            "writer": gguf_writer(*model.types),
            "needs": describe_gguf_export(*model.types),
        },
    }
    hours = forecasts[0].hours
    if price:
        report["cost_usd"] = hours * price * planner.cluster.world if hours else None
    if hours and _measured_here(planner):
        report["hours_range"] = [hours * factor for factor in TRIAL_RANGE]
    return report | {"meshes": meshes}


def _table(planner: Planner, forecasts: list[Forecast], shown: list[Forecast]) -> list[str]:
    """The machines, the examples, and a row for each mesh that is shown."""
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
        lines.append(f"({len(shown)} of {len(forecasts)} meshes: --all shows every one)")
    best = forecasts[0].plan
    if scheme_of(planner.run.model).has_fp8_matmuls and best.base != "fp8":
        what = f"the base stays in {best.base}: {best.why['base']}"
        lines.append(f"warning: {what}; to save memory: model.quantize=nf4")
    lines += best.warnings
    long_warmup = describe_long_warmup(planner.run.train, work.steps)
    lines += [f"warning: {text}" for text in long_warmup]
    return lines


def _needed_gib(planner: Planner, forecast: Forecast) -> float:
    """Compute what a step needs; of a run that does not fit, what it cannot do without."""
    needed = forecast.phases["step"]
    if not forecast.fits:
        needed, _ = memory_needs(forecast.plan, planner.machine)
    return needed / GIB


def _step_text(seconds: float) -> str:
    """Seconds of a step: `2.67`, and `0.0038` of a short one."""
    return f"{seconds:.2f}" if seconds >= 0.1 else f"{seconds:.4f}"


def _row(planner: Planner, forecast: Forecast) -> str:
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
    needed = _needed_gib(planner, forecast)
    return f"{plan.mesh.sizes():<24} {micro_batch:>14} {recompute:>9} {needed:6.1f} {figures}"


def _details(planner: Planner, best: Forecast, price: float | None, base: Path | None) -> list[str]:
    """Describe what the best mesh does: memory, seconds of a step, what is sent, disk, hours."""
    step_seconds = best.step_seconds or 0
    is_gpu = planner.machine.device == "cuda"
    device = "a GPU" if is_gpu else "the process, without 0.5 GiB of Python and its libraries"
    needed = f"{_needed_gib(planner, best):.1f} of {best.room / GIB:.1f} usable GiB in a step"
    lines = [f"memory of {device}: {needed}: {best.plan.memory.describe()}"]
    if best.plan.memory.copies and best.phases["save"] > best.room:
        lines.append("  a checkpoint has no room beside a step: training waits until it is written")
    if step_seconds:
        lines += _describe_step(best, step_seconds)
        lines += _describe_uncounted(planner, best)
    amounts = [f"{size_text(int(sent))} {LINKS[link]}" for link, sent in best.sent.items() if sent]
    if amounts:
        lines.append(f"a GPU sends per step: {', '.join(amounts)}")
    size, copies = checkpoint_bytes(planner.run, planner.trained, base)
    most = f"at most {copies} at once, {size_text(copies * size)}"
    lines.append(f"disk: {size_text(size)} per checkpoint, {most}")
    warning = planner.warn_of_waits(best)
    if warning:
        lines.append(warning)
    lines += _hours(planner, best, price, checkpoint_size=size)
    if planner.cluster.world > 1:
        lines.append(f"`train` takes the first by itself; a recipe fixes it with {best.keys}")
    return lines


def _describe_step(forecast: Forecast, step_seconds: float) -> list[str]:
    """The parts of a step, and the communication that they hide."""
    parts = [
        f"{STEP_PART_NAMES.get(part, part)} {_step_text(value)}"
        for part, value in forecast.seconds.items()
        if value >= MIN_SHOWN_SHARE * step_seconds
    ]
    lines = [f"seconds of a step: {', '.join(parts)}"]
    if forecast.hidden_seconds:
        hidden = f"{_step_text(forecast.hidden_seconds)} seconds"
        lines.append(f"  communication that overlaps with compute: {hidden}")
    return lines


def _describe_uncounted(planner: Planner, forecast: Forecast) -> list[str]:
    """Say that the figures lack the time of the vision part, where they do."""
    what = "  the time of the vision part is not in these figures"
    if planner.run.model.vision and not planner.spec.picture_flops:
        return [f"{what}: its operations could not be counted"]
    if planner.work.pictures is not None:
        return []
    most = f"about {_step_text(forecast.uncounted_seconds)} seconds if all tokens of a step are"
    return [f"{what}: `tunesmith data` counts how many tokens are of pictures; {most}"]


def _time_text(hours: float) -> str:
    """`2:05 h`, `5:04 min`, `42 s`, `under 1 s`."""
    seconds = 3600 * hours
    return format_seconds(seconds) if seconds >= 1 else "under 1 s"


def _measured_here(planner: Planner) -> bool:
    """Tell whether a trial on this CPU gave the speed, which holds for a range alone."""
    return planner.cluster.chip.source == MEASURED_HERE


def _hours(
    planner: Planner, best: Forecast, price: float | None, *, checkpoint_size: int
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
        cost = f"; {hourly * 1e6 / best.tokens_per_second / 3600:,.2f} USD per million tokens"
        return [
            "the number of rows is unknown, and so are the hours of the run: "
            f"{ROWS_FIX}, or set train.duration='500 steps'{cost if price else ''}"
        ]
    if price:
        why = "because the speed of this machine is unknown"
        return [f"hours and price: unknown, {why}; --assume tflops=100 gives them"]
    return []
