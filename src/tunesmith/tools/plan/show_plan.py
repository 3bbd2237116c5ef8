"""Output of a plan.

The first line says whether the run fits into memory and how long it takes. Further lines have
details.
"""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from rich.filesize import decimal as size_text

from tunesmith.config.schema import Run
from tunesmith.data.batches.schedule import describe_long_warmup
from tunesmith.host.streams import show
from tunesmith.model.gguf_writers import describe_gguf_export, gguf_writer
from tunesmith.planning.forecast import Forecast, Planner
from tunesmith.planning.machines import Cluster
from tunesmith.planning.resolve import checkpoint_bytes
from tunesmith.planning.savings import check_memory_fits, memory_needs
from tunesmith.quant.schemes import scheme_of
from tunesmith.tools.plan.on_paper import PaperModel, StatedRows, prepare_on_paper
from tunesmith.units import count_of, format_seconds

if TYPE_CHECKING:
    # Import only for type checks: Transformers is slow to import, and a plan may not need it.
    from tunesmith.training.make_recipe import NewRecipe

GIB = 2**30
# Minimum fraction of a step's time. Parts of the step that take less time are not printed.
MIN_SHOWN_SHARE = 0.01


def show_plan(
    args: argparse.Namespace, cluster: Cluster, recipe: Run, new_recipe: "NewRecipe | None"
) -> None:
    """Print the plan of a recipe. Raise MachineError if the run does not fit.

    Args:
        args: the options of the command `plan`.
        cluster: the machines of the plan.
        new_recipe: how the recipe was created from a model and data. None if it was read from a
            file.
    """
    rows = StatedRows(args.rows, args.length)
    if new_recipe is not None and not args.length:
        rows = StatedRows(args.rows, new_recipe.mean_length, new_recipe.is_estimated)
    planner, model = prepare_on_paper(recipe, cluster, rows)
    best = planner.best()
    if args.json:
        print(json.dumps(_report(planner, best, model), indent=1, default=vars))
    else:
        lines = [_sentence(planner, best), *_inputs(planner)]
        if best.fits:
            lines += _details(planner, best, model)
        show("\n".join(lines), sys.stdout)
    # This call raises the error if the run does not fit. It is after the output, so that the user
    # also sees the inputs of the plan.
    check_memory_fits(best.plan, planner.machine, where=cluster.describe())


def _report(planner: Planner, best: Forecast, model: PaperModel) -> dict[str, object]:
    """Return the values that --json prints."""
    plan = vars(best.plan) | {"mesh": best.plan.mesh._asdict(), "savings": None}
    size, _ = checkpoint_bytes(planner.run, planner.trained, model.folder)
    return {
        "machines": vars(planner.cluster),
        "work": planner.work._asdict(),
        "checkpoint_bytes": size,
        "gguf": {
            "writer": gguf_writer(*model.types),
            "needs": describe_gguf_export(*model.types),
        },
        # List with one entry, the mesh that `train` would use.
        "meshes": [vars(best) | {"plan": plan}],
    }


def _sentence(planner: Planner, best: Forecast) -> str:
    """Return the first line, such as `fits: 85 of 103 GiB, about 1:54 h at 1,700 tokens/s`."""
    needed, available = best.phases["step"], best.room
    if not best.fits:
        # Show the minimum memory that the run needs, as the error message does.
        needed, available = memory_needs(best.plan, planner.machine)
        return f"does not fit: {_gib_text(needed)} of {_gib_text(available)} GiB"
    memory = f"fits: {_gib_text(needed)} of {_gib_text(available)} GiB"
    if not best.tokens_per_second:
        return f"{memory}; the speed of this machine is unknown"
    speed = f"{best.tokens_per_second:,.0f} tokens/s"
    if best.hours is None:
        fix = "to estimate the duration, give --rows N, or set train.duration='500 steps'"
        return f"{memory}, {speed}; the number of rows is unknown: {fix}"
    seconds = 3600 * best.hours
    duration = f"about {format_seconds(seconds)}" if seconds >= 1 else "under 1 s"
    return f"{memory}, {duration} at {speed}"


def _gib_text(size: int) -> str:
    gib = size / GIB
    return f"{gib:.0f}" if gib >= 10 else f"{gib:.1f}"


def _inputs(planner: Planner) -> list[str]:
    """Return lines that describe the inputs of the plan: the machines and the examples."""
    chip = planner.cluster.chip
    work = planner.work
    machines = f"machines: {planner.cluster.describe()}, {chip.gib:.0f} GiB"
    if chip.tflops:
        machines += f", {chip.tflops:.0f} TFLOP/s in whole steps ({chip.source})"
    steps = f", {count_of(work.steps, 'step')}" if work.steps else ""
    return [machines, f"examples: {work.source}; {work.step.mean:,.0f} tokens a step{steps}"]


def _details(planner: Planner, best: Forecast, model: PaperModel) -> list[str]:
    """Return lines about mesh, memory, seconds per step and disk, and the warnings of the plan."""
    plan = best.plan
    choices = plan.choices
    mesh = f"mesh: {plan.mesh.describe()}" if plan.mesh.world > 1 else "one process"
    is_gpu = planner.machine.device == "cuda"
    device = "a GPU" if is_gpu else "the process, without 0.5 GiB of Python and its libraries"
    lines = [
        f"{mesh}; micro batch: {choices['micro batch']}; recompute: {choices['recompute']}",
        f"memory of {device}: {plan.memory.describe()}",
    ]
    if plan.memory.copies and best.phases["save"] > best.room:
        why = "a step and a checkpoint do not fit into memory at the same time"
        lines.append(f"  training waits for each checkpoint: {why}")
    if best.step_seconds:
        parts = [
            f"{part} {_seconds_text(seconds)}"
            for part, seconds in best.seconds.items()
            if seconds >= MIN_SHOWN_SHARE * best.step_seconds
        ]
        lines.append(f"a step: {_seconds_text(best.step_seconds)} seconds: {', '.join(parts)}")
        lines.append("  loading, compilation, validation and checkpoints need additional time")
        if planner.run.model.vision and not best.seconds.get("vision part"):
            why = "run `tunesmith data`, which counts the picture tokens"
            lines.append(f"  the time of the vision encoder is not included; to include it, {why}")
    size, copies = checkpoint_bytes(planner.run, planner.trained, model.folder)
    maximum = f"at most {copies} at once, {size_text(copies * size)}"
    lines.append(f"disk: {size_text(size)} per checkpoint, {maximum}")
    lines.append(f"GGUF: {describe_gguf_export(*model.types)}")
    return lines + _warnings(planner, best)


def _seconds_text(seconds: float) -> str:
    """Return the seconds of a step as text, such as `2.67`, or `0.0038` for a short step."""
    return f"{seconds:.2f}" if seconds >= 0.1 else f"{seconds:.4f}"


def _warnings(planner: Planner, best: Forecast) -> list[str]:
    plan = best.plan
    lines = list(plan.warnings)
    if scheme_of(planner.run.model).has_fp8_matmuls and plan.base != "fp8":
        what = f"the base stays in {plan.base}: {plan.why['base']}"
        lines.append(f"warning: {what}; to save memory, set model.quantize=nf4")
    lines += [
        f"warning: {text}" for text in describe_long_warmup(planner.run.train, planner.work.steps)
    ]
    waits = planner.warn_of_waits(best)
    return [*lines, waits] if waits else lines
