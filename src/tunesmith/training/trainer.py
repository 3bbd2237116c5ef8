"""The one loop: batches in, optimizer steps, records out, checkpoints on the way.

    [step -> record -> validate? -> checkpoint?]* -> final/ -> Result

On CUDA a step's numbers are read one step late, so that the host never waits for the device inside a step. An adapter's
checkpoint is copied in a moment and written behind the steps that follow.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.checkpoint import export, state
from tunesmith.checkpoint.resume import Progress, Start
from tunesmith.checkpoint.writer import Writer
from tunesmith.data.loader import GlobalBatch
from tunesmith.errors import StoppedError, TunesmithError
from tunesmith.host_files import write_atomically
from tunesmith.inference.decoding import sample_answers
from tunesmith.inference.evaluate import validation_loss
from tunesmith.metrics import hardware
from tunesmith.metrics.profile import Profiler
from tunesmith.metrics.record import StepRecord
from tunesmith.metrics.sink import Sinks
from tunesmith.model.spec import flops
from tunesmith.optim import learning_rate, warmup_steps
from tunesmith.runtime.transfer import AsyncScalars
from tunesmith.signals import StopRequest
from tunesmith.training.build import Session, check_one_micro_batch
from tunesmith.training.result import Result, describe_failure, not_finite, passes
from tunesmith.units import Cadence


@dataclass(frozen=True)
class Pending:
    """A step whose numbers, loss and gradient norm, may still be on their way from the device."""

    step: int
    batch: GlobalBatch
    numbers: AsyncScalars
    rate: float


class Trainer:
    """One start of a run, from its first step to its end, stop or failure.

    Attributes:
        checkpoint_stalls: seconds that each checkpoint on the way held up the loop.
    """

    def __init__(self, session: Session, start: Start, sinks: Sinks, stop: StopRequest) -> None:
        self.s, self.run, self.sinks, self.stop = session, session.run, sinks, stop
        self.out = Path(session.run.output_dir)
        before = start.progress
        self.step = self.first_step = before.step if before else 0
        self.seconds = before.seconds if before else 0.0
        self.best_step, self.best_loss = (before.best_step, before.best_loss) if before else (None, None)
        self.worse = before.worse if before else 0
        self.records: list[StepRecord] = []
        self.record = before.record if before else None
        self.validated = before.validated if before else True
        self.writer = Writer(self.out, self.run.checkpoint.keep, self.step if before else None, sync=sinks.flush)
        self.tokenizer = export.tokenizer_files(session.files.tokenizer, session.data.template, self.out)
        self.checkpoint_stalls: list[float] = []
        self.ended = False
        self.pending: Pending | None = None
        per_epoch = session.data.course.steps_per_epoch(0)
        pace: dict[str, Any] = {
            "total": session.total_steps, "steps_per_epoch": per_epoch, "seconds": self.seconds
        }  # fmt: skip
        self.validate_pace = Cadence(self.run.validate.every if self.s.data.validation else None, **pace)
        self.checkpoint_pace = Cadence(self.run.checkpoint.every, **pace)
        self.warmup = warmup_steps(self.run.train, session.total_steps, per_epoch)
        self.peak, _ = hardware.peak_tflops(session.device, session.dtype)
        self.gauges = hardware.Gauges(session.device)
        # On the CPU the numbers are there when the step ends; on CUDA they are read while the next step runs.
        self.late = session.device.type == "cuda"

    # ---- one step -------------------------------------------------------------------------------------------------

    def train_step(self, batch: GlobalBatch) -> Pending:
        """Forward, backward and update on one global batch; the loss is divided once, by its denominator over the batch."""
        optimizer, device = self.s.optimizer, self.s.device
        check_one_micro_batch(self.run, batch)
        rate = learning_rate(self.run.train, batch.step, warmup=self.warmup, progress=self.progress(batch.step))
        optimizer.start_step(rate, batch.step)
        denominator = self.s.model.method.denominator(batch)
        scale = (optimizer.scale or 1.0) / denominator
        total = torch.zeros((), device=device)
        for index, micro in enumerate(batch.micro):
            # Dropout is a function of (seed, step, micro batch): a resumed run draws what the first one drew.
            torch.manual_seed((self.run.train.seed * 1_000_003 + batch.step) * 4_099 + index)
            loss = self.s.model(micro.to(device)).loss
            (loss * scale).backward()
            total = total + loss.detach()
        return Pending(batch.step + 1, batch, AsyncScalars(total / denominator, optimizer.step()), rate)

    def progress(self, step: int) -> float:
        """Share of the course after the warm-up that lies behind update `step` (from 0), by steps or by the clock."""
        if self.s.total_steps is None:
            return self.seconds / (self.run.train.duration.seconds or 1.0)
        return (step - self.warmup) / max(1, self.s.total_steps - self.warmup)

    # ---- the loop -------------------------------------------------------------------------------------------------

    def fit(self) -> Result:
        """Run to the end of the duration; raise StoppedError after saving when a signal came."""
        self.s.model.train()
        if not self.validated:
            self.sinks.text("validation", "the validation that a stop cut off is made up for")
            self.finish_step()
        profiler = Profiler(self.run.profile, self.out / "profile", rank=0, device=self.s.device)
        with profiler, self.s.loader(self.step) as loader:
            for _ in self.steps(loader):
                profiler.step()
                self.after_step()
                if self.worse and self.worse == self.run.validate.patience:
                    self.sinks.text(
                        "patience", f"no better validation loss {self.worse} times in a row: the run ends here"
                    )
                    break
        self.settle()
        if self.stop.signal and not self.over():
            self.save_and_stop()
        return self.end()

    def steps(self, batches: Iterable[GlobalBatch]) -> Iterator[int]:
        """Take one optimizer step on each batch until the run is over; yields the number of steps taken so far."""
        self.clock = time.perf_counter()
        for batch in batches:
            if self.stop.signal or self.over():
                return
            self.writer.check()
            pending = self.train_step(batch)
            if self.late:
                self.settle()
            self.pending, self.step = pending, pending.step
            yield self.step

    def over(self) -> bool:
        """Whether the duration is used up."""
        if self.s.total_steps is not None:
            return self.step >= self.s.total_steps
        return self.seconds >= (self.run.train.duration.seconds or 0.0)

    def after_step(self) -> None:
        """Read the step's numbers where they are needed now, validate and save when due."""
        last = self.over()
        validate = self.s.data.validation is not None and (self.validate_pace.due(self.step, self.seconds) or last)
        save = self.checkpoint_pace.due(self.step, self.seconds)
        if validate or save or last or self.stop.signal or not self.late:
            self.settle(finish=not validate)
        if validate:
            self.validated = False
            self.finish_step()
        if save and not last and not self.stop.signal:  # the last step's is written at the end
            self.save_on_the_way()
        if validate or save:
            self.clock = time.perf_counter()

    def settle(self, *, finish: bool = True) -> None:
        """Turn the pending step into its record; write it, unless a validation is to be added first.

        Raises:
            NonFiniteError: if the loss or the gradient norm is NaN or infinite; its update was not applied, or in the
            backward in part.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        loss, norm = pending.numbers.read()
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.seconds += seconds
        self.check_finite(pending, loss, norm)
        self.record = self.make_record(pending, loss, norm, seconds)
        if finish:
            self.write_record()

    def check_finite(self, pending: Pending, loss: float, norm: float) -> None:
        """Stop on NaN or Inf, naming step, rows and the last good checkpoint; fp16 may skip steps while it finds its scale."""
        scale = self.s.optimizer.scale
        searching = scale is not None and scale >= 1.0
        if math.isfinite(loss) and (math.isfinite(norm) or searching):
            return
        self.writer.close()  # the checkpoint under way may be the last good one
        raise not_finite(
            loss,
            norm,
            step=pending.step,
            rows=pending.batch.row_names(),
            saved_step=self.writer.saved_step,
            in_backward=self.run.train.optimizer_in_backward,
        )

    def make_record(self, pending: Pending, loss: float, norm: float, seconds: float) -> StepRecord:
        """The step's record in the form of metrics.jsonl."""
        batch, device = pending.batch, self.s.device
        utilization, watts = self.gauges.read()
        course = self.s.data.course
        work = flops(
            self.s.files.spec,
            course.lengths[batch.indices],
            batch.supervised,
            trained=self.s.trained,
            adapter_parameters=self.s.adapter_parameters,
        )
        return StepRecord(
            step=pending.step,
            epoch=batch.epoch,
            loss=loss,
            learning_rate=pending.rate,
            grad_norm=norm,
            tokens=batch.tokens,
            supervised_tokens=batch.supervised,
            examples=batch.examples,
            step_seconds=seconds,
            data_seconds=batch.data_seconds,
            tokens_per_second=batch.tokens / seconds,
            mfu=work / seconds / (self.peak * 1e12) if self.peak else None,
            mfu_peak_tflops=self.peak,
            memory_gib=hardware.memory_gib(device),
            gpu_utilization=utilization,
            gpu_power_watts=watts,
        )

    def write_record(self) -> None:
        """Hand the step's record to every view."""
        assert self.record is not None
        self.validated = True
        self.records.append(self.record)
        self.sinks.step(self.record)

    # ---- validation -----------------------------------------------------------------------------------------------

    def finish_step(self) -> None:
        """Validate, add the loss to the step's record and write it; a signal leaves the validation to the next start."""
        assert self.record is not None
        assert self.s.data.validation is not None
        micro = self.s.plan.layout.micro_batch
        found = validation_loss(
            self.s.model,
            self.s.data.validation,
            micro_tokens=micro.amount if micro.unit == "tokens" else self.run.data.seq_len * 4,
            pad_id=self.s.files.pad_id,
            device=self.s.device,
            cancelled=lambda: self.stop.signal is not None,
        )
        self.s.model.train()
        if found is None:
            return
        self.record = dataclasses.replace(self.record, val_loss=found[0])
        self.write_record()
        self.sinks.validation(self.step, found[0])
        self.note_best(found[0])
        if self.run.log.samples:
            examples = self.s.data.validation.first(self.run.log.samples)
            stops = self.s.data.template.stops
            self.sinks.samples(self.step, sample_answers(self.s.model, self.s.tokenizer, examples, stops))
            self.s.model.train()

    def note_best(self, loss: float) -> None:
        """Remember the best validation, in best.json too."""
        if self.best_loss is None or loss < self.best_loss:
            self.best_step, self.best_loss, self.worse = self.step, loss, 0
            best = {"step": self.step, "val_loss": loss}
            write_atomically(self.out / "best.json", json.dumps(best, indent=1))
        else:
            self.worse += 1

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def save(self, *, on_the_way: bool = False) -> None:
        """Write checkpoint-<step>, then drop the oldest beyond `keep` (never the best one).

        Args:
            on_the_way: more steps follow, so an adapter is copied and written while they run. A model trained in full
                is written here and now: a second copy of its weights and moments would not fit beside the first.
        """
        self.writer.wait()
        if self.writer.saved_step == self.step and not self.ended:
            return
        parts = (self.run, self.s.model, self.tokenizer, self.s.optimizer.state_dict(), self.progress_made())
        if on_the_way and self.run.adapter.kind == "lora":
            try:
                self.writer.write_async(export.snapshot(*parts), self.step, keep_step=self.best_step)
            except torch.OutOfMemoryError:
                self.sinks.text("checkpoint", "no room on the device for a copy: training waits while it is written")
            else:
                return
        self.writer.write(lambda folder: export.write_checkpoint(folder, *parts), self.step, keep_step=self.best_step)

    def save_on_the_way(self) -> None:
        """Save while more steps follow, and note how long that held them up."""
        began = time.perf_counter()
        self.save(on_the_way=True)
        self.checkpoint_stalls.append(time.perf_counter() - began)

    def progress_made(self) -> Progress:
        """Where the run stands, for the checkpoint of this step."""
        assert self.record is not None
        return Progress(
            step=self.step,
            seconds=self.seconds,
            record=self.record,
            validated=self.validated,
            best_step=self.best_step,
            best_loss=self.best_loss,
            worse=self.worse,
            loss_scale=self.s.optimizer.scale,
            good_steps=self.s.optimizer.growth_tracker,
            ended=str(self.run.train.duration) if self.ended else None,
            data_hash=self.s.data.digest,
        )

    def save_and_stop(self) -> None:
        """Save the last step and leave with exit code 75."""
        if self.record is not None:
            self.save()
        raise StoppedError(
            f"stopped by {self.stop.signal}: step {self.step} is saved",
            where=str(self.out / f"checkpoint-{self.step}"),
            fix="start the same command again: it goes on from there",
        )

    def end(self) -> Result:
        """The last checkpoint and final/; a signal that cut off the last validation leaves both to the next start."""
        if not self.validated:
            self.save_and_stop()
        self.ended = True
        self.save()
        with state.writing(self.out / "final", self.step) as folder:
            export.write_model(folder, self.run, self.s.model, self.tokenizer)
        return Result(
            output_dir=self.out,
            steps=self.step,
            first_step=self.first_step,
            seconds=self.seconds,
            tokens=sum(r.tokens for r in self.records),
            examples=sum(r.examples for r in self.records),
            records=self.records,
            best_step=self.best_step,
            best_loss=self.best_loss,
        )

    def as_failure(self, error: BaseException) -> TunesmithError:
        """The error that ends this run, with what it knows of where it stood."""
        taken, smaller = passes(self.run, self.s.plan.layout)
        return describe_failure(
            error, folder=self.out, step=self.step, saved_step=self.writer.saved_step, micro=taken, smaller=smaller
        )
