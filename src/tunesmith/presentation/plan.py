"""Text of a plan, as the command `plan` prints it.

The first line says whether the run fits into memory and how long it takes. Further lines have
details.
"""

from collections.abc import Iterator
from pathlib import Path

from rich.filesize import decimal as size_text

from tunesmith.config.schema import Run
from tunesmith.model.known.dtypes import DTYPES
from tunesmith.model.known.gguf_writers import describe_gguf_export
from tunesmith.model.layers.slots import answers_at_once
from tunesmith.model.weights.shipped import AS_SHIPPED
from tunesmith.planning.forecast import Forecast, Planner
from tunesmith.planning.resolve import checkpoint_bytes
from tunesmith.planning.run_plan import (
    DenseExperts,
    Overrun,
    PlanWarning,
    RunPlan,
    StagedLayers,
)
from tunesmith.planning.savings import memory_needs
from tunesmith.planning.workload import Workload
from tunesmith.presentation.data import long_warmup
from tunesmith.quant.schemes import scheme_of
from tunesmith.units import count_of, format_seconds

GIB = 2**30
# Minimum fraction of a step's time. Parts of the step that take less time are not printed.
MIN_SHOWN_SHARE = 0.01


def plan_lines(
    planner: Planner, best: Forecast, folder: Path | None, types: tuple[str, str]
) -> Iterator[str]:
    """Yield the lines of a plan: whether it fits, its inputs, and details if it fits.

    Args:
        best: the forecast of `planner` for the mesh that `train` uses.
        folder: the folder of the model, or None if the model is not on this machine.
        types: model type, and the type of the model's text part.
    """
    yield _sentence(planner, best)
    chip = planner.cluster.chip
    machines = f"machines: {planner.cluster.describe()}, {chip.gib:.0f} GiB"
    if chip.tflops:
        machines += f", {chip.tflops:.0f} TFLOP/s in whole steps ({chip.source})"
    yield machines
    work = planner.work
    steps = f", {count_of(work.steps, 'step')}" if work.steps else ""
    yield f"examples: {source_text(planner.run, work)}; {work.step.mean:,.0f} tokens a step{steps}"
    if best.fits:
        yield from _details(planner, best, folder)
        yield f"GGUF: {describe_gguf_export(*types)}"
        yield from plan_warnings(planner.run, best.plan)
        for text in long_warmup(planner.run.train, work.steps):
            yield f"warning: {text}"


def _sentence(planner: Planner, best: Forecast) -> str:
    """Return the first line, such as `fits: 85 of 103 GiB, about 1:54 h at 1,700 tokens/s`."""
    if not best.fits:
        # Show the minimum memory that the run needs, as the error message does.
        needed, available = memory_needs(best.plan, planner.machine)
        return f"does not fit: {_gib_text(needed)} of {_gib_text(available)} GiB"
    memory = f"{_gib_text(best.phases['step'])} of {_gib_text(best.room)} GiB"
    if not best.tokens_per_second:
        return f"fits: {memory}; the speed of this machine is unknown"
    speed = f"{best.tokens_per_second:,.0f} tokens/s"
    if best.hours is None:
        fix = "to estimate the duration, give --rows N, or set train.duration='500 steps'"
        return f"fits: {memory}, {speed}; the number of rows is unknown: {fix}"
    seconds = 3600 * best.hours
    duration = f"about {format_seconds(seconds)}" if seconds >= 1 else "under 1 s"
    return f"fits: {memory}, {duration} at {speed}"


def _gib_text(size: int) -> str:
    gib = size / GIB
    return f"{gib:.0f}" if gib >= 10 else f"{gib:.1f}"


def source_text(run: Run, work: Workload) -> str:
    """Return the number and length of a run's examples, and where these figures come from."""
    source = work.source
    length = f"{source.length:,.0f} tokens"
    if source.is_cached:
        pictures = f", {work.pictures:.1%} of them of pictures" if run.model.vision else ""
        return f"{source.rows:,} in the token cache, {length} on average{pictures}"
    text = count_of(source.rows + source.held_out, "row") if source.rows else "unknown"
    if source.is_stated:
        text += " (--rows)"
    if source.held_out:
        text += f", {source.held_out:,} of them held out"
    text += f", {'assumed to fill data.seq_len,' if source.is_assumed else 'about'} {length} each"
    if source.is_estimated:
        left_out = "a chat template and pictures" if run.model.vision else "a chat template"
        text += f" (estimated from characters, without {left_out})"
    return f"{text}, all counted as supervised"


def _details(planner: Planner, best: Forecast, folder: Path | None) -> Iterator[str]:
    """Yield lines about mesh, memory, seconds per step and disk."""
    plan = best.plan
    choices = plan.choices
    mesh = f"mesh: {plan.mesh.describe()}" if plan.mesh.world > 1 else "one process"
    is_gpu = planner.machine.device == "cuda"
    device = "a GPU" if is_gpu else "the process, without 0.5 GiB of Python and its libraries"
    yield f"{mesh}; micro batch: {choices['micro batch']}; recompute: {choices['recompute']}"
    yield f"memory of {device}: {plan.memory.describe()}"
    if plan.memory.copies and best.phases["save"] > best.room:
        yield "  training waits for each checkpoint, because both do not fit into memory together"
    method = planner.run.method
    if plan.memory.slots:
        yield (
            f"rollouts: {answers_at_once(method.group)} answers at once, with "
            f"{plan.memory.slots / GIB:.1f} GiB of keys and values; each answer is assumed to have "
            f"method.answer_tokens={method.answer_tokens} tokens, and the time of sampling is "
            "estimated from the memory traffic only"
        )
    if best.step_seconds:
        parts = [
            f"{part} {seconds:.3g}"
            for part, seconds in best.seconds.items()
            if seconds >= MIN_SHOWN_SHARE * best.step_seconds
        ]
        yield f"a step: {best.step_seconds:.3g} seconds: {', '.join(parts)}"
        yield "  loading, compilation, validation and checkpoints need additional time"
        if planner.run.model.vision and not best.seconds.get("vision part"):
            yield "  without the vision encoder, because `tunesmith data` has not counted pictures"
    size, copies = checkpoint_bytes(planner.run, planner.trained, folder)
    yield (
        f"disk: {size_text(size)} per checkpoint, at most {copies} at once, "
        f"{size_text(copies * size)}"
    )


def plan_warnings(run: Run, plan: RunPlan) -> Iterator[str]:
    """Yield the warnings of a plan, each with its fix."""
    if scheme_of(run.model).has_fp8_matmuls and plan.base in DTYPES:
        what = f"the base stays in {plan.base}: {plan.why['base']}"
        yield f"warning: {what}; to save memory, set model.quantize=nf4"
    for warning in plan.warnings:
        yield warning_text(plan, warning)


def warning_text(plan: RunPlan, warning: PlanWarning) -> str:
    """Return the text of a warning of a plan, with its fix."""
    memory = plan.memory
    match warning:
        case DenseExperts(share, stored):
            return (
                f"warning: model.quantize=fp8 dequantizes the experts, {share:.0%} of the "
                f"parameters, which are stored in {stored.upper()}; fix: set "
                f"model.quantize={AS_SHIPPED}"
            )
        case Overrun(limit, fix):
            place = f" ({limit.describe()})" if limit.name else ""
            return (
                f"warning: the run may not fit: it needs about {memory.step / GIB:.1f} GiB, on a "
                f"CPU up to a quarter more, and {memory.free / GIB:.1f} GiB are available{place}; "
                f"fix: {fix}"
            )
        case StagedLayers(layers, rate):
            return (
                f"warning: {layers} of {plan.streamed_layers} streamed layers are in memory that "
                f"the driver does not page-lock: a thread copies them first, at {size_text(rate)}/s"
            )
