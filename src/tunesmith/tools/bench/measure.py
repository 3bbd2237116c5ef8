"""The measured run: the steps of a `train`, and the figures of its records.

    build -> warm-up -> timed steps -> [profiled steps] -> BenchReport

It is `train` without its end: no validation, no checkpoints, no files.
"""

import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from tunesmith.build_model import Weights
from tunesmith.checkpoint.resume import Start
from tunesmith.config.schema import Checkpoint, Log, Run, Validate
from tunesmith.errors import TunesmithError
from tunesmith.host.signals import StopRequest
from tunesmith.metrics.log_file import LogFile
from tunesmith.metrics.profile import Profiler
from tunesmith.metrics.record import StepRecord
from tunesmith.metrics.run_figures import RunFigures, finite
from tunesmith.metrics.sink import Sinks
from tunesmith.metrics.terminal import Terminal
from tunesmith.quant.schemes import DENSE, scheme_of
from tunesmith.runtime.determinism import deterministic_algorithms
from tunesmith.training.build import Session, build
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer
from tunesmith.units import Length, ratio

log = logging.getLogger(__name__)


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
    """The figures of the timed steps, from the records of the run. Speeds are means.

    Attributes:
        attention: the backend, and the kernel that it takes.
        quantize: how the base was stored: none, nf4, an fp8 form, or bf16 where fp8 was turned off.
        recomputed_layers: decoder layers whose forward runs again in the backward.
        seconds: of all timed steps together.
        tokens: non-padding tokens of the timed steps.
        mfu: the records' mean over time. None if a record has none.
        mfu_peak_tflops: the peak that `mfu` is relative to.
        data_wait_share: share of the step time that was spent waiting for data.
        build_seconds: from the recipe to a model that is ready: rows, weights, optimizer; on a GPU
            also a trial micro batch, compiled.
        first_step_seconds: the first step of the warm-up, with its compilation.
        peak_memory_gib: allocated on the GPU from the build, with its trial of memory, to the last
            timed step; on a CPU resident in RAM.
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
    tokens_per_second: float
    supervised_tokens_per_second: float
    mfu: float | None
    mfu_peak_tflops: float | None
    step_seconds_p50: float
    step_seconds_p95: float
    data_wait_share: float
    build_seconds: float
    first_step_seconds: float
    peak_memory_gib: float
    gpu_power_watts: float | None
    first_loss: float
    last_loss: float

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield (name, value with unit, remark) of each line of the table.

        A value that was not measured has no line.
        """
        speed = f"{self.tokens_per_second:,.0f} /s"
        yield "non-padding tokens", speed, f"{self.tokens:,} in {self.seconds:.1f} s"
        speed = f"{self.supervised_tokens_per_second:,.0f} /s"
        yield "supervised tokens", speed, "positions that enter the loss"
        if self.mfu is not None:
            peak = f"of {self.mfu_peak_tflops:g} TFLOP/s"
            if self.recomputed_layers:
                peak += f"; {self.recomputed_layers} layers recomputed, not counted"
            yield "MFU", f"{self.mfu:.1%}", peak
        spread = f"p95 {self.step_seconds_p95:.3f} s, {self.steps} steps"
        yield "step time, median", f"{self.step_seconds_p50:.3f} s", spread
        yield "waiting for data", f"{self.data_wait_share:.2%}", "of the step"
        build = f"after building for {self.build_seconds:.1f} s"
        yield "first step", f"{self.first_step_seconds:.1f} s", build
        where = "resident memory" if self.device == "cpu" else "allocated on the GPU"
        yield "peak memory", f"{self.peak_memory_gib:.1f} GiB", where
        if self.gpu_power_watts is not None:
            yield "power, mean", f"{self.gpu_power_watts:.0f} W", ""
        yield "loss", f"{self.last_loss:.4f}", f"{self.first_loss:.4f} at the first timed step"


class Measured(NamedTuple):
    """The figures of a run, and the profiler's traces, one per cycle."""

    figures: BenchReport
    traces: list[Path]


def measure(plan: BenchPlan, folder: Path) -> Measured:
    """Run a recipe's steps and read its figures from their records.

    folder: an empty one for what the run writes.

    Raises:
        UsageError: the recipe, data, model or machine is wrong.
        RunError: a step failed, such as for lack of memory.
    """
    run = plan.measured_run(folder)
    with deterministic_algorithms(run.train.deterministic):
        began = time.perf_counter()
        session = build(run, Start(), weights=plan.weights, measured=True)
        build_seconds = time.perf_counter() - began
        for line in session.plan.describe():
            log.info(line)
        per_epoch = session.data.schedule.steps_per_epoch(0)
        total = session.total_steps
        sinks = Sinks([Terminal(LogFile(), total_steps=total, steps_per_epoch=per_epoch)])
        trainer = Trainer(session, Start(), sinks, StopControl(StopRequest(), folder))
        profiler = Profiler(run.profile, plan.traces or folder, rank=0, device=session.device)
        sinks.open(run, 0)
        try:
            _train(trainer, profiler, last_timed=plan.warmup + plan.steps)
        # Errors of ours already have a cause; others become those of a failed run.
        except TunesmithError:
            raise
        except Exception as error:
            raise trainer.as_failure(error) from error
        finally:
            sinks.close()
    records = trainer.metrics.records
    timed = records[plan.warmup : plan.warmup + plan.steps]
    report = _report(session, timed, build_seconds, records[0].step_seconds)
    return Measured(report, profiler.traces)


def _train(trainer: Trainer, profiler: Profiler, *, last_timed: int) -> None:
    """Take all steps in the trainer's own loop, and profile those after the timed ones."""
    session = trainer.session
    session.model.train()
    with session.loader(0) as loader, ExitStack() as stack:
        for step in trainer.steps(loader):
            if step == last_timed:
                # Otherwise the profile would begin with this step's kernels.
                trainer.metrics.flush()
                stack.enter_context(profiler)
            elif step > last_timed:
                profiler.step()


def _report(
    session: Session, records: Sequence[StepRecord], build_seconds: float, first_step_seconds: float
) -> BenchReport:
    """Return the figures of the timed steps.

    Args:
        records: the records of these steps.
        build_seconds, first_step_seconds: of the entire run.
    """
    run = session.run
    plan = session.plan
    last = records[-1]
    figures = RunFigures.of(records)
    step_seconds = sorted(record.step_seconds for record in records)
    mfu_seconds = sum((record.mfu or 0.0) * record.step_seconds for record in records)
    watts = finite(figures.column("gpu_power_watts"))
    return BenchReport(
        device="cpu" if plan.device == "cpu" else torch.cuda.get_device_name(session.device),
        dtype=run.model.dtype,
        attention=plan.choices["attention"],
        quantize="none" if scheme_of(run.model) is DENSE else plan.base,
        micro_batch=str(plan.layout.micro_batch),
        recomputed_layers=plan.recomputed_layers,
        steps=len(records),
        seconds=figures.seconds,
        tokens=int(figures.tokens),
        tokens_per_second=ratio(figures.tokens, figures.seconds),
        supervised_tokens_per_second=ratio(figures.total("supervised_tokens"), figures.seconds),
        mfu=None if last.mfu is None else ratio(mfu_seconds, figures.seconds),
        mfu_peak_tflops=last.mfu_peak_tflops,
        step_seconds_p50=statistics.median(step_seconds),
        step_seconds_p95=step_seconds[round(0.95 * (len(step_seconds) - 1))],
        data_wait_share=ratio(figures.total("data_seconds"), figures.seconds),
        build_seconds=build_seconds,
        first_step_seconds=first_step_seconds,
        peak_memory_gib=last.memory_gib,
        gpu_power_watts=statistics.fmean(watts) if watts else None,
        first_loss=records[0].loss,
        last_loss=last.loss,
    )
