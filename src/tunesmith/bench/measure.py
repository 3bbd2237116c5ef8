"""The measured run: a Session in a folder of its own, the Trainer's own steps, and what they came to.

    build -> first step -> warm-up -> timed steps -> [traced steps] -> one adapter checkpoint -> matmul ceiling -> Figures

It is `train` without its end: no validation, no checkpoints on the way, nothing kept.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tunesmith.bench import figures
from tunesmith.bench.figures import BenchReport, Work
from tunesmith.bench.measured_peak import fp8_matmul_tflops, matmul_tflops
from tunesmith.build_model import Weights
from tunesmith.checkpoint.resume import Start
from tunesmith.config.schema import Checkpoint, Log, Profile, Run, Validate
from tunesmith.data.loader import GlobalBatch
from tunesmith.errors import TunesmithError
from tunesmith.metrics import hardware
from tunesmith.metrics.profile import Profiler
from tunesmith.metrics.sink import Sinks
from tunesmith.metrics.terminal import Terminal
from tunesmith.model.spec import flops, recompute_flops
from tunesmith.private import graphs_compiled
from tunesmith.signals import StopRequest
from tunesmith.training.build import Session, build
from tunesmith.training.run import print_line
from tunesmith.training.trainer import Trainer
from tunesmith.units import Length

SETTLED = 3  # a shape that comes later than this step should find its graph


@dataclass(frozen=True)
class BenchPlan:
    """What is measured.

    Attributes:
        run: the recipe as it was asked for.
        steps, warmup: timed steps, and the steps before them.
        weights: those of the model's files, or random ones.
        traces: folder for profiler traces of further steps after the timed ones, or None.
    """

    run: Run
    steps: int = 20
    warmup: int = 5
    weights: Weights = "stored"
    traces: Path | None = None

    @property
    def traced(self) -> int:
        """Steps that the profiler sees after the timed ones."""
        profile = self.run.profile
        return (profile.wait + profile.warmup + profile.active) * profile.cycles if self.traces else 0

    def bare(self, folder: Path) -> Run:
        """The recipe for as many steps as are measured, writing nothing but into `folder`. Epochs repeat."""
        total = self.warmup + self.steps + self.traced
        return replace(
            self.run,
            data=replace(self.run.data, validation=()),
            train=replace(self.run.train, duration=Length(total, "steps")),
            validate=Validate(every=None),
            checkpoint=Checkpoint(every=None),
            log=Log(every=self.run.log.every, tensorboard=False, samples=0),
            profile=replace(self.run.profile, enabled=bool(self.traces)),
            output_dir=str(folder),
        )


@dataclass(frozen=True)
class Measured:
    """Figures of a run, its traces, and the rows of its timed steps: [token ids, mask of trained ones] in order."""

    figures: BenchReport
    folder: Path  # of the model
    traces: tuple[Path, ...]
    examples: list[tuple[list[int], list[int]]]
    pad_id: int


class Noted:
    """The loader's batches on their way to the trainer, with what each will compute noted: step -> padded tokens."""

    def __init__(self) -> None:
        self.padded: dict[int, int] = {}

    def passing(self, batches: Iterator[GlobalBatch]) -> Iterator[GlobalBatch]:
        for batch in batches:
            self.padded[batch.step] = sum(micro.input_ids.numel() for micro in batch.micro)
            yield batch


def measure(plan: BenchPlan, folder: Path, *, say: Callable[[str], None] = print_line) -> Measured:
    """Run a recipe's steps and measure them.

    Args:
        plan: what is measured.
        folder: an empty folder for what the run writes.
        say: takes a line about each thing found and chosen before the first step.

    Raises:
        UsageError: the recipe, data, model or machine is wrong.
        RunError: a step failed, for want of memory, say.
    """
    run = plan.bare(folder)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began, compiled = time.perf_counter(), graphs_compiled()
    session = build(run, Start(), say=say, weights=plan.weights, checkpoints=False)
    build_seconds = time.perf_counter() - began
    per_epoch = session.data.course.steps_per_epoch(0)
    sinks = Sinks([Terminal(None, total_steps=session.total_steps, steps_per_epoch=per_epoch)])
    trainer = Trainer(session, Start(), sinks, StopRequest())
    sinks.open(run, 0)
    try:
        seen = _drive(plan, trainer, compiled)
    except TunesmithError:
        raise
    except Exception as error:
        raise trainer.as_failure(error) from error
    finally:
        sinks.close()
    return _result(plan, trainer, seen, build_seconds)


@dataclass
class _Seen:
    """What the loop alone can see."""

    padded: dict[int, int]
    graphs: list[int]  # compiled so far, before the build (whose trial compiles) and after each step
    memory: dict[str, float | None]
    traces: tuple[Path, ...]
    stalls: dict[str, float | None]


def _drive(plan: BenchPlan, trainer: Trainer, compiled: int) -> _Seen:
    """The trainer's own loop over warm-up, timed and traced steps; then one adapter checkpoint.

    Args:
        compiled: graphs that there were before the build.
    """
    session, noted, timed = trainer.s, Noted(), plan.warmup + plan.steps
    session.model.train()
    graphs, memory = [compiled], {}
    settings = trainer.run.profile if plan.traces else Profile()
    profiler = Profiler(settings, plan.traces or trainer.out, rank=0, device=session.device)
    with ExitStack() as stack:
        loader = stack.enter_context(session.loader(0))
        for step in trainer.steps(noted.passing(iter(loader))):
            trainer.after_step()
            if step in (1, timed):  # the next step's work must not count for this one
                trainer.settle()
            if step <= timed:
                graphs.append(graphs_compiled())
            if step == timed:
                memory = _peak_memory(session.device)
                stack.enter_context(profiler)
            elif step > timed:
                profiler.step()
    return _Seen(noted.padded, graphs, memory, tuple(profiler.traces), _checkpoint_stalls(trainer))


def _peak_memory(device: torch.device) -> dict[str, float | None]:
    """Peaks so far, GiB: on the GPU, where there is one, and in RAM."""
    cuda = device.type == "cuda"
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None,
        "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30 if cuda else None,
        "peak_resident_gib": hardware.memory_gib(),
    }


def _checkpoint_stalls(trainer: Trainer) -> dict[str, float | None]:
    """Seconds that a checkpoint keeps the loop from its next step: the first one, and another."""
    stalls: list[float | None] = [None, None]
    if trainer.s.trained == "lora":  # a full one takes as long as the disk does
        for turn in (0, 1):
            trainer.writer.saved_step = None  # else a second one at the same step is none
            trainer.save_on_the_way()
            stalls[turn] = trainer.checkpoint_stalls[-1]
            trainer.writer.wait()
    return {"first_checkpoint_stall_seconds": stalls[0], "checkpoint_stall_seconds": stalls[1]}


def _work(plan: BenchPlan, trainer: Trainer, padded: dict[int, int]) -> Work:
    """What the timed steps computed."""
    session = trainer.s
    course, records = session.data.course, trainer.records[plan.warmup : plan.warmup + plan.steps]
    model = again = 0.0
    for record in records:
        lengths = course.lengths[course.examples(record.step - 1)].tolist()
        extra = {"adapter_parameters": session.adapter_parameters}
        model += flops(session.facts, lengths, record.supervised_tokens, trained=session.trained, **extra)
        again += recompute_flops(session.facts, lengths, session.recomputed_layers, **extra)
    return Work(
        tokens=sum(r.tokens for r in records),
        supervised_tokens=sum(r.supervised_tokens for r in records),
        padded_tokens=sum(padded[r.step - 1] for r in records),
        examples=sum(r.examples for r in records),
        model_flops=model,
        hardware_flops=model + again,
    )


def _result(plan: BenchPlan, trainer: Trainer, seen: _Seen, build_seconds: float) -> Measured:
    """Figures from the records; the ceiling is measured here, on the chip as the steps have left it."""
    session, run = trainer.s, trainer.run
    records = trainer.records[plan.warmup : plan.warmup + plan.steps]
    work, timing = _work(plan, trainer, seen.padded), figures.timing(records)
    peak, source = hardware.peak_tflops(session.device, session.dtype)
    held = "none" if run.model.quantize == "none" else next(c.taken for c in session.choices if c.part == "base")
    watts = [r.gpu_power_watts for r in records if r.gpu_power_watts is not None]
    shares = figures.shares(
        work,
        timing["seconds"],
        peak=peak,
        ceiling=matmul_tflops(session.device, session.dtype),
        ceiling_fp8=fp8_matmul_tflops(session.device) if held.startswith("fp8") else None,
    )
    values: dict[str, Any] = {
        **{k: v for k, v in vars(work).items() if not k.endswith("_flops")},
        **timing,
        **figures.speeds(work, timing["seconds"], run.data.seq_len),
        **shares,
        **seen.memory,
        **seen.stalls,
    }
    found = BenchReport(
        device=_device_name(session.device),
        dtype=run.model.dtype,
        quantize=held,
        micro_batch=str(session.rows.micro_batch),
        recomputed_layers=session.recomputed_layers,
        steps=len(records),
        warmup_steps=plan.warmup,
        published_peak_source=source,
        build_seconds=build_seconds,
        first_step_seconds=trainer.records[0].step_seconds,
        graphs_compiled=seen.graphs[-1] - seen.graphs[0],
        graphs_compiled_after_step_3=seen.graphs[-1] - seen.graphs[min(SETTLED, len(seen.graphs) - 1)],
        power_mean_watts=statistics.fmean(watts) if watts else None,
        first_loss=records[0].loss,
        last_loss=records[-1].loss,
        **values,
    )
    return Measured(found, session.folder, seen.traces, _examples(plan, session), session.pad_id)


def _examples(plan: BenchPlan, session: Session) -> list[tuple[list[int], list[int]]]:
    """The rows that the warm-up and the timed steps learnt from, in order."""
    course, tokens = session.data.course, session.data.train
    chosen = [i for step in range(plan.warmup + plan.steps) for i in course.examples(step)]
    return [(tokens[i].ids.tolist(), tokens[i].trained.astype(int).tolist()) for i in chosen]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def let_go() -> None:
    """Give the device's memory back, for a process that is to run beside this one."""
    torch.compiler.reset()  # compiled layers must not be what keeps a model alive
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
