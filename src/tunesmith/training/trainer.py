"""The training loop: batches in, optimizer steps out, and after a step what is due.

    [train_step -> metrics -> validation? -> checkpoint?]* -> final/ -> Result

`steps` is the loop and `train_step` is one step of it. On CUDA a step's metrics are read one step
later (`async_metrics`), and an adapter's checkpoint is copied in a moment and written while the
next steps run (`checkpoint_saver`).
"""

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from tunesmith.checkpoint.resume import Progress, Start
from tunesmith.data.batches.loader import GlobalBatch
from tunesmith.distributed.activity import COMPILING_S, STUCK_AFTER_S
from tunesmith.errors import TunesmithError
from tunesmith.host.logger import logged_if_slow
from tunesmith.methods.base import StepTotals
from tunesmith.metrics.profile import Profiler
from tunesmith.metrics.sink import Sinks
from tunesmith.optim.lr_schedule import scheduled_rate
from tunesmith.parallel.copies import GradientSum
from tunesmith.parallel.mesh import all_reduce_together
from tunesmith.parallel.shard import set_gradient_sync, sharded_modules
from tunesmith.parallel.tensor import reduce_gradients
from tunesmith.run_dir import Phase
from tunesmith.runtime.host import return_freed_memory
from tunesmith.runtime.transfer import Mark
from tunesmith.training.answer_sampler import AnswerSampler
from tunesmith.training.async_metrics import AsyncMetrics, StepOutput
from tunesmith.training.build import Session, check_one_micro_batch
from tunesmith.training.checkpoint_saver import CheckpointSaver
from tunesmith.training.loop_part import LoopPart, LoopShared
from tunesmith.training.result import Result, failure_of, stopped_by
from tunesmith.training.stop_control import StopControl
from tunesmith.training.validation import Validation
from tunesmith.units import count_of

log = logging.getLogger(__name__)

SLOW_STEP_SECONDS = 5.0
SLOW_FIRST_STEP = "the first step is being computed; where kernels are compiled it takes minutes"


class Trainer(LoopPart):
    """One start of a run, from its first step to its end, stop or failure."""

    def __init__(
        self,
        session: Session,
        start: Start,
        sinks: Sinks,
        stop: StopControl,
    ) -> None:
        run = session.run
        # The point that the run has reached, and what it computes with from here on.
        progress = dataclasses.replace(
            start.progress or Progress(),
            ended=None,
            micro_batch=str(session.plan.layout.micro_batch),
            threads=torch.get_num_threads(),
            shares_prompts=session.data.train.shares_prompts,
            **session.hashes,
        )
        shared = LoopShared(session, progress, sinks, stop)
        super().__init__(shared)
        # The guard of the host's memory leaves room for a save.
        stop.request.saving = session.plan.memory.copies
        self.first_step = progress.step
        saved_step = self.first_step if start.progress else None
        ended = start.progress.ended if start.progress else None
        # Patience has ended a shorter run: this one goes on.
        self.is_longer = ended not in (None, str(run.train.duration))
        self.checkpoints = CheckpointSaver(shared, saved_step)
        self.metrics = AsyncMetrics(shared, self.checkpoints.writer)
        self.validation = Validation(shared, self.metrics)
        self.answers = AnswerSampler(shared)
        self.learning_rate = partial(
            scheduled_rate,
            run.train,
            total=session.total_steps,
            steps_per_epoch=session.data.schedule.steps_per_epoch(0),
        )
        # A model trained in full that is sharded has its gradients summed by FSDP.
        is_adapter = run.adapter.kind == "lora"
        is_summed_by_fsdp = not is_adapter and bool(sharded_modules(session.model))
        self.gradient_sum = GradientSum(
            session.optimizer.parts.values(),
            None if is_summed_by_fsdp else session.mesh.data_group,
            beside_backward=not is_adapter,
            late={p for module in session.model.projector for p in module.parameters()},
        )

    def fit(self) -> Result:
        """Train to the end of the duration; StoppedError, with all saved, where a stop comes."""
        self.session.model.train()
        self.stop.agree()
        if self.stop.is_due():  # it came while the model was loaded
            self.save_and_stop()
        if not self.progress.validated:
            self.sinks.text("validation", "continuing the validation that was interrupted")
            self.validate()
            # Its checkpoint is there already; only now it may count as the best one.
            self.checkpoints.save()
        # Shards would gather the whole model for each token: too slow for answers of a base.
        if self.first_step == 0 and not self.answers.is_sharded:
            self.answers.sample()
        folder = self.out / "profile"
        device = self.session.device
        profiler = Profiler(self.run.profile, folder, rank=self.ranks.rank, device=device)
        with profiler, self.session.loader(self.first_step) as batches:
            for _ in self.steps(batches):
                profiler.step()
        self.metrics.flush()
        if self.stop.is_due() and not self.is_over:
            self.save_and_stop()
        return self.end()

    def steps(self, batches: Iterable[GlobalBatch]) -> Iterator[int]:
        """Train on each batch until the run is over; yields the optimizer steps taken so far."""
        progress = self.progress
        self.metrics.restart_clock()
        if self.validation.is_out_of_patience() and not self.is_longer:
            return
        for batch in batches:
            if self.stop.is_due() or self.is_over:
                return
            if self.stop.ends():
                text = f"on_record has ended the run after step {progress.step}"
                self.sinks.text("stopped", text)
                return
            self.checkpoints.raise_failed_write()
            self.report_phase()
            with self.logged_if_slow(progress.step):
                output = self.train_step(batch)
            if output is None:
                # Memory ran short: the next turn stops the run, by `stop.is_due`.
                continue
            self.metrics.submit(output)
            progress.step = output.step
            self.stop.request.nothing_to_save = False

            is_last = self.is_over
            validates = self.validation.is_due(is_last=is_last)
            saves = self.checkpoints.is_due()
            # The record of a step is usually read during the next one; at once where it goes into a
            # checkpoint, and before the run ends. With a validation it is logged after that.
            reads_now = validates or saves or is_last or not self.metrics.reads_late
            if reads_now or self.stop.is_due():
                self.metrics.flush(log=not validates)
            if validates:
                self.validate()
                saves = saves or self.checkpoints.is_new_best()
            # The last step's checkpoint is written at the end.
            if saves and not is_last and not self.stop.is_due():
                self.checkpoints.save(more_steps_follow=True)
            # The next step's seconds are its own.
            if validates or saves:
                self.metrics.restart_clock()
            yield progress.step
            if self.validation.is_out_of_patience():
                text = f"no better validation loss in {count_of(progress.worse, 'validation')}"
                self.sinks.text("patience", f"{text}: stopping the run")
                return

    def logged_if_slow(self, step: int) -> AbstractContextManager[None]:
        """Return a context that says in the log that the first step takes long, if it does."""
        if step > self.first_step or not self.ranks.is_main_process:
            return nullcontext()
        return logged_if_slow(log, SLOW_FIRST_STEP, SLOW_STEP_SECONDS)

    def train_step(self, batch: GlobalBatch) -> StepOutput | None:
        """Forward, backward and update on one global batch, whose loss is divided once.

        None where memory ran short meanwhile: nothing is updated, and the step before is saved.
        """
        model = self.session.model
        optimizer = self.session.optimizer
        mesh = self.session.mesh
        check_one_micro_batch(self.run, batch)
        lr = self.learning_rate(batch.step, seconds=self.progress.seconds)
        optimizer.start_step(lr, batch.step)
        denominator = model.method.denominator(batch)
        # What the losses of the step share; a collective call.
        totals = model.method.begin_step(
            model,
            StepTotals(batch.examples, batch.chosen_tokens, batch.mismatched),
            lambda total: all_reduce_together([total], mesh.data_group),
        )
        loss_of = partial(model.method, totals=totals)
        # fp16 scales the loss up, and the optimizer divides the gradients by the scale again.
        loss_factor = (optimizer.scale or 1.0) / denominator
        zero = torch.zeros((), device=self.session.device)
        loss = zero
        metrics = dict.fromkeys(model.method.metrics, zero)
        for index, micro_batch in enumerate(batch.micro, batch.first_micro):
            if self.stop.drops_step():
                return None
            # Dropout is a function of (seed, step, micro batch): a resumed run draws what the
            # first one drew. The factors are primes, larger than the counts that are added.
            torch.manual_seed((self.run.train.seed * 1_000_003 + batch.step) * 4_099 + index)
            # Shards reduce their gradients in every backward, copies sum theirs beside the last.
            is_last_backward = micro_batch is batch.micro[-1]
            set_gradient_sync(model, mesh, last=is_last_backward)
            if is_last_backward:
                self.gradient_sum.start()
            with model.step_context(micro_batch):
                output = model(micro_batch, loss_of)
                self.ranks.heartbeat.progress()
                (output.loss * loss_factor).backward()
            # Not in place: all began as the same tensor.
            loss = loss + output.loss.detach()
            metrics = {name: value + output.metrics[name] for name, value in metrics.items()}
        # Sum over the data ranks, then over the tensor group: the norm is of the whole gradient.
        gradients = optimizer.gradients()
        self.gradient_sum.finish(gradients)
        reduce_gradients(gradients, model.partial_gradients, mesh)
        means = {name: value / denominator for name, value in metrics.items()}
        scalars = self.metrics.reduce(loss / denominator, means)
        # Clips by the norm, which it returns, updates the weights and drops the gradients.
        grad_norm = optimizer.step()
        scalars.copy_to_host(grad_norm)
        return StepOutput(batch.step + 1, batch, lr, scalars, Mark(self.session.device))

    def report_phase(self) -> None:
        """Tell the heartbeat that a step begins, and how long it may take."""
        heartbeat = self.ranks.heartbeat
        if self.progress.step == self.first_step:
            heartbeat.phase(Phase.FIRST_STEP, STUCK_AFTER_S + COMPILING_S)
        else:
            heartbeat.phase(Phase.TRAINING, STUCK_AFTER_S)
        heartbeat.progress(self.progress.step)

    def validate(self) -> None:
        """Measure the held-out rows, then let the model answer some of them.

        The weights of final/ answer at the end.
        """
        if self.validation.measure() and not (self.is_over or self.validation.is_out_of_patience()):
            self.answers.sample()

    @property
    def is_over(self) -> bool:
        """Return whether the run has trained for its whole duration."""
        if self.session.total_steps is not None:
            return self.progress.step >= self.session.total_steps
        return self.progress.seconds >= (self.run.train.duration.seconds or 0.0)

    def save_and_stop(self) -> None:
        """Save the last step, if there is one, and leave."""
        if self.progress.step:
            # Where memory is short, others take what is left while this run saves.
            self.session.optimizer.drop_gradients()
            return_freed_memory()
            self.checkpoints.save()
        request = (self.stop.request.low_memory, self.stop.request.signal)
        requests = self.ranks.all_gather_object(request)
        raise stopped_by(requests, self.run, self.progress, self.ranks)

    def end(self) -> Result:
        """Write the last checkpoint and final/. After a stop that cut off the last validation the
        next start writes them.
        """
        progress = self.progress
        if not progress.validated:
            self.save_and_stop()
        self.stop.request.doing = "final/ is written"
        progress.ended = str(self.run.train.duration)
        self.checkpoints.save()
        final_step = self.checkpoints.load_best()
        self.answers.sample_final(final_step)
        self.checkpoints.write_final(final_step)
        self.ranks.heartbeat.phase(Phase.END)
        return Result(
            self.out,
            progress.step,
            self.first_step,
            progress.seconds,
            records=self.metrics.records,
            best_step=progress.best_step,
            best_loss=progress.best_loss,
            final_step=final_step,
        )

    def as_failure(self, error: BaseException) -> TunesmithError:
        """The error that ends this run, with what it knows of where it stood."""
        return failure_of(
            error,
            self.run,
            self.session.plan,
            step=self.progress.step,
            saved_step=self.checkpoints.writer.saved_step,
        )
