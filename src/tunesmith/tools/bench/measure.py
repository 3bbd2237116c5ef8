"""The measured run: a Session in a folder of its own, the Trainer's own steps, and their figures.

    build -> warm-up -> timed steps -> [profiled steps] -> two adapter checkpoints
    -> measured peak -> BenchReport

It is `train` without its end: no validation, no periodic checkpoints, no files.
"""

import contextlib
import logging
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tunesmith.build_model import Weights
from tunesmith.checkpoint.resume import Start
from tunesmith.config.schema import Checkpoint, Log, Run, Validate
from tunesmith.data.batches.loader import GlobalBatch
from tunesmith.distributed.torch_private import graphs_compiled, scaled_mm
from tunesmith.errors import RunError, TunesmithError
from tunesmith.host.cores import multiplies_bf16
from tunesmith.host.signals import StopRequest
from tunesmith.metrics.hardware import MATMUL_SIZE, matmul_tflops, seconds_of
from tunesmith.metrics.log_file import LogFile
from tunesmith.metrics.profile import Profiler
from tunesmith.metrics.record import StepRecord
from tunesmith.metrics.sink import Sinks
from tunesmith.metrics.terminal import Terminal
from tunesmith.model.dtypes import DTYPES
from tunesmith.quant.schemes import DENSE, scheme_of
from tunesmith.runtime.determinism import deterministic_algorithms
from tunesmith.training.build import Session, build
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer
from tunesmith.units import Length, ratio

log = logging.getLogger(__name__)

# Of the computed tokens; more padding is explained.
FULL = 0.99
# A shape that first comes after this step should find its graph.
STEADY = 3


@dataclass(frozen=True)
class BenchPlan:
    """The steps to measure: of the user's recipe `steps` timed ones, after `warmup` others.

    Attributes:
        weights: "stored" reads the model's files, "random" draws them.
        traces: folder for the profiles of further steps.
    """

    run: Run
    steps: int = 20
    warmup: int = 5
    weights: Weights = "stored"
    traces: Path | None = None

    def measured_run(self, folder: Path) -> Run:
        """The recipe for the steps to measure, without validation, checkpoints and logs."""
        run = self.run
        profile = replace(run.profile, enabled=self.traces is not None)
        steps = self.warmup + self.steps
        if profile.enabled:
            # The profiler slows its steps: they come after those that are timed.
            steps += (profile.wait + profile.warmup + profile.active) * profile.cycles
        return replace(
            run,
            # Whatever else takes time in a run is off, so that only steps are measured.
            data=replace(run.data, validation=(), hold_out=None),
            train=replace(run.train, duration=Length(steps, "steps")),
            validate=Validate(every=None),
            checkpoint=Checkpoint(every=None),
            log=Log(every=run.log.every, tensorboard=False, samples=0),
            profile=profile,
            output_dir=str(folder),
        )


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Speeds are means over the timed steps, which took `seconds` together.

    Shares are between 0 and 1.

    Attributes:
        attention: the backend, and the kernel that it takes.
        quantize: how the base was stored: none, nf4, an fp8 form, or bf16 where fp8 was turned off.
        recomputed_layers: decoder layers whose forward runs again in the backward.
        tokens: non-padding tokens of the timed steps.
        picture_tokens: those of them that stand for pictures.
        samples_times_seq_len_per_second: often called tokens/s: each example counted as if it
            filled `seq_len`.
        fill_share: non-padding tokens of all computed ones.
        padding: where the other tokens come from; empty below 1 %.
        mfu_of_published_peak: FLOPs of the model a second (no recomputation), over the data
            sheet's peak. None where the base is fp8 on a GPU: its products pass a peak of 16 bits.
        mfu_of_measured_peak: the same, over the dense product measured in this run, in
            `measured_peak_dtype`: fp32 on a CPU that only emulates bf16.
        mfu_of_fp8_peak: the same, over the measured fp8 product, where the base is fp8.
        data_wait_share: of the step time, spent waiting for data.
        build_seconds: from the recipe to a model that is ready: rows, weights, optimizer; on a GPU
            also a trial micro batch, compiled.
        first_step_seconds: the first step alone, with what it compiles.
        graphs_compiled: in build and steps.
        graphs_compiled_after_step_3: of them in later steps, where a steady run has none.
        peak_memory_gib: allocated on the GPU from the build, with its trial of memory, to the last
            timed step; on a CPU resident in RAM.
        checkpoint_stall_seconds: how long an adapter's checkpoint holds up the loop; None for full
            runs.
    """

    device: str
    dtype: str
    attention: str
    quantize: str
    micro_batch: str
    recomputed_layers: int
    steps: int
    seconds: float
    tokens: int
    picture_tokens: int
    tokens_per_second: float
    supervised_tokens_per_second: float
    samples_times_seq_len_per_second: float
    fill_share: float
    padding: str
    published_peak_tflops: float | None
    mfu_of_published_peak: float | None
    measured_peak_tflops: float
    measured_peak_dtype: str
    mfu_of_measured_peak: float | None
    mfu_of_fp8_peak: float | None
    step_seconds_p50: float
    step_seconds_p95: float
    data_wait_share: float
    build_seconds: float
    first_step_seconds: float
    graphs_compiled: int
    graphs_compiled_after_step_3: int
    peak_memory_gib: float
    checkpoint_stall_seconds: float | None
    gpu_power_watts: float | None
    first_loss: float
    last_loss: float

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """(name, value with unit, remark) of each line of the table.

        What was not measured has no line.
        """
        speed = f"{self.tokens_per_second:,.0f} /s"
        yield "non-padding tokens", speed, f"{self.tokens:,} in {self.seconds:.1f} s"
        if self.picture_tokens:
            speed = f"{ratio(self.picture_tokens, self.seconds):,.0f} /s"
            share = f"{self.picture_tokens / self.tokens:.1%} of the non-padding tokens"
            yield "tokens of pictures", speed, share
        speed = f"{self.supervised_tokens_per_second:,.0f} /s"
        yield "supervised tokens", speed, "positions that enter the loss"
        speed = f"{self.samples_times_seq_len_per_second:,.0f} /s"
        yield "samples x seq_len", speed, "as often quoted; counts padding as tokens"
        padding = self.padding or "of the computed tokens are not padding"
        yield "fill", f"{self.fill_share:.2%}", padding
        if self.mfu_of_published_peak is not None:
            peak = f"of {self.published_peak_tflops:g} TFLOP/s"
            yield "MFU, published peak", f"{self.mfu_of_published_peak:.1%}", peak
        recomputed = ""
        if self.recomputed_layers:
            recomputed = f"; {self.recomputed_layers} layers recomputed, not counted"
        if self.mfu_of_measured_peak is not None:
            products = f"{self.measured_peak_dtype} products in this run"
            peak = f"of {self.measured_peak_tflops:.3g} TFLOP/s, {products}"
            yield "MFU, measured peak", f"{self.mfu_of_measured_peak:.1%}", peak + recomputed
        if self.mfu_of_fp8_peak is not None:
            peak = "of the fp8 products in this run"
            yield "MFU, fp8 peak", f"{self.mfu_of_fp8_peak:.1%}", peak + recomputed
        spread = ratio(self.step_seconds_p95, self.step_seconds_p50)
        steps = f"p95 {self.step_seconds_p95:.3f} s, p95/p50 {spread:.3f}, {self.steps} steps"
        yield "step time, median", f"{self.step_seconds_p50:.3f} s", steps
        yield "waiting for data", f"{self.data_wait_share:.2%}", "of the step"
        build = f"after building for {self.build_seconds:.1f} s"
        yield "first step", f"{self.first_step_seconds:.1f} s", build
        later = f"{self.graphs_compiled_after_step_3} after step 3"
        yield "graphs compiled", str(self.graphs_compiled), later
        where = "resident memory" if self.device == "cpu" else "allocated on the GPU"
        yield "peak memory", f"{self.peak_memory_gib:.1f} GiB", where
        if self.gpu_power_watts is not None:
            yield "power, mean", f"{self.gpu_power_watts:.0f} W", ""
        if self.checkpoint_stall_seconds is not None:
            stall = f"{self.checkpoint_stall_seconds * 1000:.0f} ms"
            yield "adapter checkpoint", stall, "blocks the loop"
        yield "loss", f"{self.last_loss:.4f}", f"{self.first_loss:.4f} at the first timed step"


class Measured(NamedTuple):
    """The figures of a run, and the profiler's traces, one per cycle."""

    figures: BenchReport
    traces: list[Path]


@dataclass
class Observed:
    """The figures that are seen from outside while the loop runs.

    Attributes:
        graphs: compiled so far: before the build, then after each step up to the last timed one.
        padded: step, from 1 -> tokens computed, padding counted.
        memory_gib: peak at the end of the timed steps.
        stall: seconds that a checkpoint delayed the loop.
    """

    build_seconds: float
    graphs: list[int]
    padded: dict[int, int] = field(default_factory=dict)
    memory_gib: float = 0.0
    stall: float | None = None


def measure(plan: BenchPlan, folder: Path) -> Measured:
    """Run a recipe's steps and measure them.

    folder: an empty one for what the run writes.

    Raises:
        UsageError: the recipe, data, model or machine is wrong.
        RunError: a step failed, such as for lack of memory.
    """
    run = plan.measured_run(folder)
    with deterministic_algorithms(run.train.deterministic):
        # A count before the build, one after each step: differences show which step compiled.
        graphs = [graphs_compiled()]
        began = time.perf_counter()
        session = build(run, Start(), weights=plan.weights, measured=True)
        for line in session.plan.describe():
            log.info(line)
        seen = Observed(time.perf_counter() - began, graphs)
        per_epoch = session.data.schedule.steps_per_epoch(0)
        total = session.total_steps
        sinks = Sinks([Terminal(LogFile(), total_steps=total, steps_per_epoch=per_epoch)])
        trainer = Trainer(session, Start(), sinks, StopControl(StopRequest(), folder))
        profiler = Profiler(run.profile, plan.traces or folder, rank=0, device=session.device)
        sinks.open(run, 0)
        try:
            _run_steps(plan, trainer, profiler, seen)
        # Errors of ours already have a cause; others become those of a failed run.
        except TunesmithError:
            raise
        except Exception as error:
            raise trainer.as_failure(error) from error
        finally:
            sinks.close()
        records = trainer.metrics.records
        # Steps of the warmup come before, those of the profiler after.
        timed = records[plan.warmup : plan.warmup + plan.steps]
        figures = _report(session, timed, records[0].step_seconds, seen)
        return Measured(figures, profiler.traces)


def _run_steps(plan: BenchPlan, trainer: Trainer, profiler: Profiler, seen: Observed) -> None:
    """The trainer's own loop over all steps, then two adapter checkpoints."""
    session = trainer.session
    checkpoints = trainer.checkpoints
    last_timed = plan.warmup + plan.steps

    def counted(batches: Iterable[GlobalBatch]) -> Iterator[GlobalBatch]:
        for batch in batches:
            seen.padded[batch.step + 1] = sum(micro.input_ids.numel() for micro in batch.micro)
            yield batch

    session.model.train()
    with session.loader(0) as loader, ExitStack() as stack:
        for step in trainer.steps(counted(loader)):
            if step <= last_timed:
                seen.graphs.append(graphs_compiled())
            if step == last_timed:
                # Else the profile would begin with its kernels.
                trainer.metrics.flush()
                seen.memory_gib = session.memory_gib()
                stack.enter_context(profiler)
            elif step > last_timed:
                profiler.step()
    # A full model's checkpoint takes as long as the disk does.
    if session.run.adapter.kind == "lora":
        # The first in a process imports what it needs.
        for _ in range(2):
            # The same step would not be saved twice.
            checkpoints.writer.saved_step = None
            checkpoints.save_periodic()
            seen.stall = checkpoints.stalls[-1]
            checkpoints.writer.wait()


def _count_picture_tokens(session: Session, records: list[StepRecord]) -> int:
    examples = session.data.schedule.examples
    counts = session.data.train.picture_tokens
    return sum(int(counts[[*examples(r.step - 1)]].sum()) for r in records)


def _report(
    session: Session, records: list[StepRecord], first_step_seconds: float, seen: Observed
) -> BenchReport:
    """Figures of the timed steps.

    The peak is measured here, on the chip as warm as the steps have left it.
    """
    run = session.run
    device = session.device
    step_seconds = [r.step_seconds for r in records]
    seconds = sum(step_seconds)
    percentiles = np.percentile(step_seconds, [50, 95]).tolist()
    tokens = sum(r.tokens for r in records)
    padded = sum(seen.padded[r.step] for r in records)
    examples = session.data.schedule.examples
    # A record's step counts from 1, those of the schedule from 0.
    flops = sum(session.flops(examples(r.step - 1), r.supervised_tokens) for r in records)
    tflops = ratio(flops, seconds) / 1e12
    peak_dtype = _dtype_of_units(run.model.dtype, device)
    measured_peak = matmul_tflops(device, DTYPES[peak_dtype])
    # A peak that nobody published would make up a utilization.
    published_peak = session.peak.tflops if session.peak.published else None
    quantize = "none" if scheme_of(run.model) is DENSE else session.plan.base
    fp8_peak = fp8_matmul_tflops(device) if quantize.startswith("fp8") else None
    # Products in fp8 pass the peaks of 16 bits: no share of these is a utilization.
    bounds = (None, None) if fp8_peak else (published_peak, measured_peak)
    watts = [r.gpu_power_watts for r in records if r.gpu_power_watts is not None]
    return BenchReport(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        dtype=run.model.dtype,
        attention=session.plan.choices["attention"],
        quantize=quantize,
        micro_batch=str(session.plan.layout.micro_batch),
        recomputed_layers=session.plan.recomputed_layers,
        steps=len(records),
        seconds=seconds,
        tokens=tokens,
        picture_tokens=_count_picture_tokens(session, records),
        tokens_per_second=ratio(tokens, seconds),
        supervised_tokens_per_second=ratio(sum(r.supervised_tokens for r in records), seconds),
        samples_times_seq_len_per_second=ratio(
            sum(r.examples for r in records) * run.data.seq_len, seconds
        ),
        fill_share=tokens / padded,
        padding=_padding(session, records, tokens, padded),
        published_peak_tflops=published_peak,
        mfu_of_published_peak=_utilization(tflops, bounds[0]),
        measured_peak_tflops=measured_peak,
        measured_peak_dtype=peak_dtype,
        mfu_of_measured_peak=_utilization(tflops, bounds[1]),
        mfu_of_fp8_peak=_utilization(tflops, fp8_peak),
        step_seconds_p50=percentiles[0],
        step_seconds_p95=percentiles[1],
        data_wait_share=ratio(sum(r.data_seconds for r in records), seconds),
        build_seconds=seen.build_seconds,
        first_step_seconds=first_step_seconds,
        graphs_compiled=seen.graphs[-1] - seen.graphs[0],
        # The graphs of the last steps, less those that were there once the shapes had been seen.
        graphs_compiled_after_step_3=seen.graphs[-1]
        - seen.graphs[min(STEADY, len(seen.graphs) - 1)],
        peak_memory_gib=seen.memory_gib,
        checkpoint_stall_seconds=seen.stall,
        gpu_power_watts=statistics.fmean(watts) if watts else None,
        first_loss=records[0].loss,
        last_loss=records[-1].loss,
    )


def _dtype_of_units(dtype: str, device: torch.device) -> str:
    """Dtype of the products that bound a step: fp32 on a CPU that emulates bf16, as emulated ones
    are slower than what of a step is in fp32."""
    emulated = dtype == "bf16" and device.type == "cpu" and not multiplies_bf16()
    return "fp32" if emulated else dtype


def _utilization(tflops: float, peak: float | None) -> float | None:
    """Share of a peak that bounds the steps' products; None without one.

    RunError above 1: what passes the bound was timed wrong.
    """
    if not peak:
        return None
    if tflops > peak:
        raise RunError(
            f"{tflops:.4g} TFLOP/s were measured, above a peak of {peak:.4g}: the clock is wrong, "
            "or other programs ran while the peak was measured",
            where="the timed steps, and the product measured after them",
            why="an MFU above 100 % is impossible, so no figure of this run can be trusted",
            fix="run bench again on an idle machine",
        )
    return tflops / peak


def _padding(session: Session, records: list[StepRecord], tokens: int, padded: int) -> str:
    """Explain where padding of the timed steps comes from and what fixes it; "" below 1 %."""
    if tokens >= FULL * padded:
        return ""
    if not session.run.data.pack:
        return "rows are padded to the longest of their micro batch: data.pack=true"
    row_tokens = session.run.row_tokens
    row_length = session.plan.layout.row_length
    schedule = session.data.schedule
    # The room of the packed rows alone, before micro batches are padded.
    room = sum(len(schedule.rows(record.step - 1)) for record in records) * row_tokens
    if row_length is None or tokens < FULL * room:
        what = f"examples fill {tokens / room:.1%} of packed rows of {row_tokens:,}"
        return f"{what}: another data.seq_len, more rows"
    what = f"every micro batch is padded to {row_length:,} tokens"
    return f"{what}: a train.global_batch of whole micro batches"


def fp8_matmul_tflops(device: torch.device) -> float | None:
    """`matmul_tflops` with fp8 (e4m3) factors, scaled by rows, else by tensor.

    None where the device has neither.
    """
    if device.type != "cuda":
        return None
    n = MATMUL_SIZE["cuda"]
    left, right = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    matmul = partial(scaled_mm, left, right.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    for rows in (n, 1):
        scale_a = torch.ones(rows, 1, device=device)
        scale_b = torch.ones(1, rows, device=device)
        # A chip that lacks this product raises.
        with contextlib.suppress(RuntimeError, ValueError):
            seconds = seconds_of(partial(matmul, scale_a=scale_a, scale_b=scale_b))
            return ratio(2 * n**3, seconds) / 1e12
    return None
