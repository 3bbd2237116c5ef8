"""Measurement of training speed. The results are computed from the records of the timed steps.

    build -> warm-up -> timed steps -> [profiled steps] -> BenchReport

The training steps are the same as in `train`. There is no validation, and no checkpoint is saved.
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
from tunesmith.start.build import build
from tunesmith.start.lines import choices_line
from tunesmith.start.request import Request, Weights
from tunesmith.training.session import Session
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer
from tunesmith.units import Length, count_of, ratio

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchPlan:
    """The settings of a measurement.

    Attributes:
        run: the user's recipe.
        steps: the number of timed steps.
        warmup: the number of untimed steps that run first.
        weights: "stored" reads the model's files, "random" initializes the weights randomly.
        traces: the folder for profiler traces, which are recorded in additional steps. None: no
            traces.
    """

    run: Run
    steps: int = 20
    warmup: int = 5
    weights: Weights = "stored"
    traces: Path | None = None

    def measured_run(self, folder: Path) -> Run:
        """Return the recipe to run: the user's recipe without validation, checkpoints and logs.

        Args:
            folder: the run directory.
        """
        run = self.run
        profile = replace(run.profile, enabled=self.traces is not None)
        steps = self.warmup + self.steps
        if profile.enabled:
            # Profile additional steps after the timed ones, because the profiler slows them down.
            steps += (profile.wait + profile.warmup + profile.active) * profile.cycles
        return replace(
            run,
            # Disable validation, checkpoints and logs, so that only training steps take time.
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
    """Results of a measurement, computed from the records of the timed steps. Speeds are means.

    Attributes:
        attention: the attention backend and its kernel.
        quantize: the storage format of the base model: none, nf4, an fp8 format, or bf16 if fp8 was
            disabled.
        micro_batch: the size of a micro batch, with its unit.
        recomputed_layers: number of decoder layers whose forward is recomputed in the backward.
        seconds: total duration of the timed steps.
        tokens: number of tokens in the timed steps, without padding.
        mfu: model FLOPs utilization (MFU), averaged over the timed steps. None if a record has no
            MFU.
        mfu_peak_tflops: the peak speed of the hardware. `mfu` is a fraction of this speed.
        data_wait_share: fraction of the step time that was spent waiting for data.
        rollout_seconds: mean seconds per step to sample and reward answers. None if the method
            samples no answers.
        build_seconds: seconds to read rows and weights and to build the model and the optimizer. On
            a GPU this includes a trial micro batch and its compilation.
        first_step_seconds: duration of the first warm-up step, including compilation.
        peak_memory_gib: on a GPU, the maximum of the allocated memory from the build to the last
            timed step. On a CPU, the resident memory.
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
    rollout_seconds: float | None
    build_seconds: float
    first_step_seconds: float
    peak_memory_gib: float
    gpu_power_watts: float | None
    first_loss: float
    last_loss: float

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield each row of the printed table as (name, value with unit, remark).

        Values that were not measured have no row.
        """
        speed = f"{self.tokens_per_second:,.0f} /s"
        yield "non-padding tokens", speed, f"{self.tokens:,} in {self.seconds:.1f} s"
        speed = f"{self.supervised_tokens_per_second:,.0f} /s"
        yield "supervised tokens", speed, "positions that enter the loss"
        if self.mfu is not None:
            peak = f"of {self.mfu_peak_tflops:g} TFLOP/s"
            if self.recomputed_layers:
                layers = count_of(self.recomputed_layers, "layer")
                peak += f"; the recomputation of {layers} is not counted"
            yield "MFU", f"{self.mfu:.1%}", peak
        spread = f"p95 {self.step_seconds_p95:.3f} s, {count_of(self.steps, 'step')}"
        yield "step time, median", f"{self.step_seconds_p50:.3f} s", spread
        yield "waiting for data", f"{self.data_wait_share:.2%}", "of the step"
        if self.rollout_seconds is not None:
            yield "rollouts, mean", f"{self.rollout_seconds:.3f} s", "to sample and reward answers"
        build = f"after building for {self.build_seconds:.1f} s"
        yield "first step", f"{self.first_step_seconds:.1f} s", build
        where = "resident memory" if self.device == "cpu" else "allocated on the GPU"
        yield "peak memory", f"{self.peak_memory_gib:.1f} GiB", where
        if self.gpu_power_watts is not None:
            yield "power, mean", f"{self.gpu_power_watts:.0f} W", ""
        yield "loss", f"{self.last_loss:.4f}", f"{self.first_loss:.4f} at the first timed step"


class Measured(NamedTuple):
    """Results of a measurement, and the profiler's trace files, one per profiler cycle."""

    figures: BenchReport
    traces: list[Path]


def measure(plan: BenchPlan, folder: Path) -> Measured:
    """Train the steps of a plan, and compute the speed from the records of the steps.

    Args:
        folder: an empty folder for the files that the run writes.

    Raises:
        UsageError: if the recipe, the data, the model or the machine is not suitable.
        RunError: if a step fails, for example because memory is exhausted.
    """
    run = plan.measured_run(folder)
    with deterministic_algorithms(run.train.deterministic):
        began = time.perf_counter()
        session = build(Request(run, purpose="measure", weights=plan.weights))
        build_seconds = time.perf_counter() - began
        log.info(choices_line(session.plan))
        per_epoch = session.data.schedule.steps_per_epoch(0)
        total = session.total_steps
        sinks = Sinks([Terminal(LogFile(), total_steps=total, steps_per_epoch=per_epoch)])
        trainer = Trainer(session, Start(), sinks, StopControl(StopRequest(), folder))
        profiler = Profiler(run.profile, plan.traces or folder, rank=0, device=session.device)
        sinks.open(run, 0)
        try:
            _train(trainer, profiler, last_timed=plan.warmup + plan.steps)
        # A TunesmithError already has a message for the user. Convert any other error to a
        # RunError.
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
    """Run all steps in the trainer's loop, and profile the steps after the timed ones."""
    with trainer.batches() as batches, ExitStack() as stack:
        for step in trainer.steps(batches):
            if step == last_timed:
                # Wait until the GPU has finished this step. Otherwise the profile would include the
                # rest of the step.
                trainer.metrics.flush()
                stack.enter_context(profiler)
            elif step > last_timed:
                profiler.step()


def _report(
    session: Session, records: Sequence[StepRecord], build_seconds: float, first_step_seconds: float
) -> BenchReport:
    """Compute the results of the timed steps.

    Args:
        records: the records of the timed steps.
        build_seconds: the seconds that it took to build the model.
        first_step_seconds: the duration of the first warm-up step.
    """
    run = session.run
    plan = session.plan
    last = records[-1]
    figures = RunFigures.of(records)
    step_seconds = sorted(record.step_seconds for record in records)
    mfu_seconds = sum((record.mfu or 0.0) * record.step_seconds for record in records)
    watts = finite(figures.column("gpu_power_watts"))
    rollouts = [r.extra["rollout_seconds"] for r in records if "rollout_seconds" in r.extra]
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
        rollout_seconds=statistics.fmean(rollouts) if rollouts else None,
        build_seconds=build_seconds,
        first_step_seconds=first_step_seconds,
        peak_memory_gib=last.memory_gib,
        gpu_power_watts=statistics.fmean(watts) if watts else None,
        first_loss=records[0].loss,
        last_loss=last.loss,
    )
