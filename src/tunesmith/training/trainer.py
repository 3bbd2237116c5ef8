"""The one loop: batches in, optimizer steps, records out, periodic checkpoints.

    [step -> log -> validate? -> checkpoint?]* -> final/ -> Result

On CUDA a step's metrics are read one step later, so that the host never waits for the device inside a step. An adapter's
checkpoint is copied in a moment and written while the next steps run.
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tunesmith.checkpoint.resume import COUNTER, Progress, Start
from tunesmith.data.loader import GlobalBatch
from tunesmith.errors import TunesmithError
from tunesmith.heartbeat import STUCK
from tunesmith.host_files import write_atomically
from tunesmith.inference.decoding import AnswerClock, sample_answers
from tunesmith.inference.evaluate import validation_loss
from tunesmith.metrics.health import Health
from tunesmith.metrics.profile import Profiler
from tunesmith.metrics.record import StepRecord
from tunesmith.metrics.sink import Sinks
from tunesmith.optim.lr_schedule import scheduled_rate
from tunesmith.parallel.copies import GradientSum
from tunesmith.parallel.shard import reduce_in, sharded_modules
from tunesmith.parallel.tensor import reduce_gradients
from tunesmith.run_directory import STOP_FILE
from tunesmith.runtime.host import return_freed_memory
from tunesmith.runtime.transfer import AsyncScalars
from tunesmith.signals import StepDropped, StopRequest
from tunesmith.training.build import Session, check_one_micro_batch
from tunesmith.training.checkpoint_saver import CheckpointSaver
from tunesmith.training.result import Result, failure_of, non_finite_error, stopped_by
from tunesmith.units import Cadence, ratio

# A limit of the heartbeat, beside STUCK: graphs of a layer are compiled once, in minutes.
COMPILING = 30 * 60.0  # seconds

# Sample answers take so much of the time trained, or so many seconds where that is less; and the last ones as much again.
ANSWER_SHARE = 0.01
ANSWER_SECONDS = 20.0


@dataclass(frozen=True)
class PendingMetrics:
    """A step whose loss, gradient norm and method's metrics may still be on their way from the device."""

    step: int
    batch: GlobalBatch
    scalars: AsyncScalars
    lr: float


class Trainer:
    """One start of a run, from its first step to its end, stop or failure.

    Attributes:
        progress: where the run stands; a checkpoint holds it.
        records: of the steps of this start.
        async_metrics: read a step's metrics while the next step runs.
    """

    halve = True  # the micro batch of the next start, where memory was short

    def __init__(self, session: Session, start: Start, sinks: Sinks, stop: StopRequest) -> None:
        self.session, self.run, self.sinks, self.stop = session, session.run, sinks, stop
        self.out, stop.saving = Path(session.run.output_dir), session.plan.memory.copies
        layout = {"micro_batch": str(session.plan.layout.micro_batch), "threads": torch.get_num_threads()}
        rounding = COUNTER if self.run.train.master_weights == "stochastic" else None
        now = {"ended": None, "rounding": rounding, **layout, **session.hashes}
        self.progress = dataclasses.replace(start.progress or Progress(), **now)
        self.first_step = self.progress.step
        self.agreed_to_stop = self.agreed_write_failed = False
        self.records: list[StepRecord] = []
        self.pending: PendingMetrics | None = None
        self.async_metrics = session.device.type == "cuda"
        self.answer_seconds = 0.0  # that sample answers took in this start
        self.told_of_slow_answers = False
        saved_step = self.first_step if start.progress else None
        self.checkpoints = CheckpointSaver(session, self.progress, sinks, saved_step)
        self.writer = self.checkpoints.writer
        steps_per_epoch = session.data.schedule.steps_per_epoch(0)
        self.lr_schedule: dict[str, Any] = {"total": session.total_steps, "steps_per_epoch": steps_per_epoch}
        clock = self.lr_schedule | {"seconds": self.progress.seconds}
        self.validate_cadence = Cadence(self.run.validate.every if session.data.validation else None, **clock)
        is_adapter = self.run.adapter.kind == "lora"
        is_summed_by_fsdp = not is_adapter and bool(sharded_modules(session.model))
        group = None if is_summed_by_fsdp else session.mesh.data_group
        self.gradient_sum = GradientSum(session.optimizer.parts.values(), group, beside_backward=not is_adapter)
        self.health = Health(session.device, session.dtype, session.peak, session.ranks, sinks)

    # ---- the loop -------------------------------------------------------------------------------------------------

    def fit(self) -> Result:
        """Train to the end of the duration; raise StoppedError after saving when a signal came."""
        self.session.model.train()
        self.health.start()
        if self.session.ranks.world > 1:  # later they agree in each step
            self.agreed_to_stop = any(self.session.ranks.gather(self.asked_to_stop()))
        if self.stopping:  # it came while the model was loaded
            self.save_and_stop()
        if not self.progress.validated:
            self.sinks.text("validation", "now comes the validation that a stop cut off")
            self.validate()
        # Shards gather the whole model for each token: what a base answers is not worth that.
        if not self.first_step and not sharded_modules(self.session.model):
            self.sample()
        ranks, device = self.session.ranks, self.session.device
        profiler = Profiler(self.run.profile, self.out / "profile", rank=ranks.rank, device=device)
        with profiler, self.session.loader(self.first_step) as loader:
            for _ in self.steps(loader):
                profiler.step()
                if self.progress.worse and self.progress.worse == self.run.validate.patience:
                    text = f"no better validation loss {self.progress.worse} times in a row: the run ends here"
                    self.sinks.text("patience", text)
                    break
        self.flush_metrics()
        if self.stopping and not self.over():
            self.save_and_stop()
        return self.end()

    def steps(self, batches: Iterable[GlobalBatch]) -> Iterator[int]:
        """Train on each batch until the run is over; yields the number of optimizer steps taken so far."""
        self.clock = time.perf_counter()
        for batch in batches:
            if self.stopping or self.over():
                return
            if self.agreed_write_failed if self.session.ranks.world > 1 else self.writer.failed:
                self.writer.wait()
            with suppress(StepDropped):
                self.iteration(batch)
                yield self.progress.step

    def iteration(self, batch: GlobalBatch) -> None:
        """One optimizer step; then log, validate and save what is due."""
        progress, heartbeat = self.progress, self.session.ranks.heartbeat
        if progress.step == self.first_step:
            heartbeat.phase("first step", STUCK + COMPILING)
        else:
            heartbeat.phase("training", STUCK)
        heartbeat.progress(progress.step)
        pending = self.train_step(batch)
        if self.async_metrics:
            self.flush_metrics()  # of the step before, while the device computes this one
        self.pending, progress.step = pending, pending.step

        last = self.over()
        due = self.validate_cadence.due(progress.step, progress.seconds) or last
        validate = due and self.session.data.validation is not None
        save = self.checkpoints.is_due()
        if validate or save or last or self.stopping or not self.async_metrics:
            self.flush_metrics(log=not validate)
        if validate:
            progress.validated = False
            self.validate()
        if save and not last and not self.stopping:  # the last step's is written at the end
            self.checkpoints.save_periodic()
        if validate or save:
            self.clock = time.perf_counter()

    def over(self) -> bool:
        """Whether the duration is used up."""
        if self.session.total_steps is not None:
            return self.progress.step >= self.session.total_steps
        return self.progress.seconds >= (self.run.train.duration.seconds or 0.0)

    def train_step(self, batch: GlobalBatch) -> PendingMetrics:
        """Forward, backward and update on one global batch; the loss is divided once, by its denominator over that."""
        model, optimizer = self.session.model, self.session.optimizer
        check_one_micro_batch(self.run, batch)
        lr = scheduled_rate(self.run.train, batch.step, **self.lr_schedule, seconds=self.progress.seconds)
        optimizer.start_step(lr, batch.step)
        denominator = model.method.denominator(batch)
        scale = (optimizer.scale or 1.0) / denominator
        total = torch.zeros((), device=self.session.device)
        metrics = dict.fromkeys(model.method.metrics, total)
        mesh = self.session.mesh
        for index, micro in enumerate(batch.micro, batch.first_micro):
            if self.stop.shortage and self.session.ranks.world == 1:  # several ranks agree at the end of a step
                raise StepDropped
            # Dropout is a function of (seed, step, micro batch): a resumed run draws what the first one drew.
            torch.manual_seed((self.run.train.seed * 1_000_003 + batch.step) * 4_099 + index)
            is_last = micro is batch.micro[-1]
            reduce_in(model, mesh, last=is_last)
            if is_last:
                self.gradient_sum.start()
            made = model(micro)
            self.session.ranks.heartbeat.progress()
            (made.loss * scale).backward()
            total = total + made.loss.detach()
            metrics = {name: value + made.metrics[name] for name, value in metrics.items()}
        grads = optimizer.gradients()
        self.gradient_sum.finish(grads)
        reduce_gradients(grads, model.partial_gradients, mesh)
        means = self.agree([value / denominator for value in (total, *metrics.values())])
        return PendingMetrics(batch.step + 1, batch, AsyncScalars(*means, optimizer.step().to(total.device)), lr)

    def agree(self, means: list[Tensor]) -> Sequence[Tensor]:
        """A step's loss and metrics over all ranks, and after them how many ranks were asked to stop, on how many a write
        of a checkpoint failed, and the seconds that the step took by rank 0's clock: what one rank decided by itself would
        leave the others in a collective.

        On one process just the loss and metrics.
        """
        ranks, mesh = self.session.ranks, self.session.mesh
        if ranks.world == 1:
            return means
        now = time.perf_counter()
        own = [float(self.asked_to_stop()), float(self.writer.failed), (now - self.clock) * ranks.leads]
        self.clock = now
        counted = torch.stack([value.double() for value in means]) * (mesh.tensor_rank == 0)
        # A copy from pageable memory would wait for all that the device has to do.
        pinned = torch.tensor(own, dtype=counted.dtype, pin_memory=counted.is_cuda)
        values = torch.cat([counted, pinned.to(counted.device, non_blocking=True)])
        dist.all_reduce(values)
        return values.unbind()

    def asked_to_stop(self) -> bool:
        """Whether a signal came to this process, or a file asks rank 0 to stop."""
        return self.stop.requested() or (self.session.ranks.leads and (self.out / STOP_FILE).exists())

    @property
    def stopping(self) -> bool:
        """Whether a stop was asked for, of this process or, once all know, of any rank."""
        return self.agreed_to_stop if self.session.ranks.world > 1 else self.asked_to_stop()

    # ---- metrics --------------------------------------------------------------------------------------------------

    def flush_metrics(self, *, log: bool = True) -> None:
        """Read the pending step's metrics into its record; log it, unless a validation loss is to be added first.

        NonFiniteError if the loss or the gradient norm is NaN or infinite.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        loss, *metrics, norm = pending.scalars.read()
        if self.session.ranks.world > 1:
            *metrics, asked, failed, seconds = metrics
            self.agreed_to_stop |= asked > 0
            self.agreed_write_failed |= failed > 0
        else:
            now = time.perf_counter()
            seconds, self.clock = now - self.clock, now
        self.progress.seconds += seconds
        self.stop.takes = 2 * seconds if self.session.ranks.world > 1 else seconds / len(pending.batch.micro)
        scale = self.session.optimizer.scale
        searching = scale is not None and scale >= 1.0  # fp16 skips steps while it searches for its loss scale
        if not (math.isfinite(loss) and (math.isfinite(norm) or searching)):
            self.writer.close()  # the checkpoint in progress may be the last good one
            rows, saved = pending.batch.row_names(), self.writer.saved_step
            raise non_finite_error(loss, norm, self.run, step=pending.step, rows=rows, saved_step=saved)
        self.progress.record = self.make_record(pending, loss, norm, metrics, seconds)
        if log:
            self.log_record()

    def make_record(
        self, pending: PendingMetrics, loss: float, norm: float, metrics: list[float], seconds: float
    ) -> StepRecord:
        """The step's record in the form of metrics.jsonl."""
        session, batch, peak = self.session, pending.batch, self.session.peak_tflops
        return StepRecord(
            step=pending.step, epoch=batch.epoch, loss=loss, learning_rate=pending.lr, grad_norm=norm,
            tokens=batch.tokens, supervised_tokens=batch.supervised, examples=batch.examples,
            step_seconds=seconds, data_seconds=batch.data_seconds, tokens_per_second=ratio(batch.tokens, seconds),
            mfu=ratio(session.flops(batch.indices, batch.supervised), seconds) / (peak * 1e12) if peak else None,
            mfu_peak_tflops=peak, memory_gib=session.memory_gib(), **self.health.read(),
            idle_share=batch.idle_share if session.mesh.shape.data > 1 else None,
            extra=dict(zip(session.model.method.metrics, metrics, strict=True)),
        )  # fmt: skip

    def log_record(self) -> None:
        """Hand the step's record to every sink."""
        assert self.progress.record is not None
        self.progress.validated = True
        self.records.append(self.progress.record)
        self.sinks.step(self.progress.record)

    def validate(self) -> None:
        """Add the validation loss to the step's record and log it; after a signal the next start does so."""
        session, progress, size = self.session, self.progress, self.session.plan.layout.micro_batch
        assert progress.record is not None
        assert session.data.validation is not None
        session.ranks.heartbeat.phase("validation", STUCK + COMPILING)  # the first one compiles
        found = validation_loss(
            session.model, session.data.validation, pad_id=session.files.pad_id, device=session.device, mesh=session.mesh,
            micro_tokens=size.amount if size.unit == "tokens" else self.run.data.seq_len * 4,
            # The ranks agree on a stop in the next step.
            cancelled=lambda: session.ranks.world == 1 and self.stop.requested(),
            scored=session.ranks.heartbeat.progress,
        )  # fmt: skip
        session.model.train()
        if found is None:
            return
        loss = found[0]
        progress.record = dataclasses.replace(progress.record, val_loss=loss)
        self.log_record()
        self.sinks.validation(progress.step, loss)
        progress.worse += 1
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_step, progress.best_loss, progress.worse = progress.step, loss, 0
            if session.ranks.leads:
                best = json.dumps({"step": progress.step, "val_loss": loss}, indent=1)
                write_atomically(self.out / "best.json", best)
        self.sample()

    def sample(self) -> None:
        """Let the model answer some held-out prompts, on the ranks that its weights need."""
        session, data, count = self.session, self.session.data, self.run.log.samples
        session.ranks.heartbeat.phase("sample answers", STUCK)
        together = bool(sharded_modules(session.model))
        answers_here = session.ranks.leads or together
        if not (data.validation and count and answers_here and session.mesh.shape.tensor == 1):
            return
        clock = AnswerClock(
            self.answers_may_take(),
            generated=session.ranks.heartbeat.progress,
            agree=(lambda late: session.ranks.gather(late)[0]) if together else None,
        )
        answers = sample_answers(
            session.model, session.files.tokenizer, data.validation.first(count), data.template.end_ids,
            synced=together, clock=clock,
        )  # fmt: skip
        session.model.train()
        self.answer_seconds += clock.elapsed
        if not clock.late:
            self.sinks.samples(self.progress.step, answers)
        elif not self.told_of_slow_answers:
            self.told_of_slow_answers = True
            text = f"no sample answers at step {self.progress.step}: they would take {clock.predicted:.0f} s"
            self.sinks.text(
                "samples", f"{text}, and {clock.allowed:.0f} s may be spent on them; log.samples=0 asks for none"
            )

    def answers_may_take(self) -> float:
        """Seconds for the sample answers that are due, which are not to cost more than they tell."""
        allowed = max(ANSWER_SECONDS, ANSWER_SHARE * self.progress.seconds)
        return allowed if self.progress.step and self.over() else max(0.0, allowed - self.answer_seconds)

    # ---- the end --------------------------------------------------------------------------------------------------

    def save_and_stop(self) -> None:
        """Save the last step, if there is one, and leave."""
        if self.progress.step:
            # Where memory is short, others take what is left while this run saves.
            self.session.optimizer.drop_gradients()
            return_freed_memory()
            self.checkpoints.save()
        asked = self.session.ranks.gather((self.stop.shortage, self.stop.signal))
        raise stopped_by(asked, self.run, self.progress, self.session.ranks, halve=self.halve)

    def end(self) -> Result:
        """The last checkpoint and final/; a signal that cut off the last validation leaves both to the next start."""
        progress = self.progress
        if not progress.validated:
            self.save_and_stop()
        self.stop.doing = "final/ is written"
        progress.ended = str(self.run.train.duration)
        self.checkpoints.save()
        self.checkpoints.write_final()
        self.session.ranks.heartbeat.phase("end")
        return self.result()

    def result(self) -> Result:
        """What this start came to."""
        progress, records = self.progress, self.records
        return Result(
            self.out, progress.step, self.first_step, progress.seconds,
            tokens=sum(r.tokens for r in records), examples=sum(r.examples for r in records), records=records,
            best_step=progress.best_step, best_loss=progress.best_loss,
        )  # fmt: skip

    def as_failure(self, error: BaseException) -> TunesmithError:
        """The error that ends this run, with what it knows of where it stood."""
        saved_step, plan = self.writer.saved_step, self.session.plan
        step = self.progress.step
        return failure_of(error, self.run, plan, step=step, saved_step=saved_step, halve=self.halve)
