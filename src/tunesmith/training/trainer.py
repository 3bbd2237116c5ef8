"""The training loop, which runs optimizer steps on batches, validates and saves.

    [train_step -> metrics -> validation? -> checkpoint?]* -> final/ -> Result

`steps` is the loop, and `train_step` is one step of it. On CUDA a step's metrics are read one step
later (`async_metrics`). The checkpoint of an adapter is copied quickly and written while the next
steps run (`checkpoint_saver`).
"""

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from tunesmith.batches.loader import GlobalBatch
from tunesmith.checkpoint.resume import Progress, Start
from tunesmith.distributed.activity import COMPILING_S, STUCK_AFTER_S
from tunesmith.errors import TunesmithError
from tunesmith.host.logger import logged_if_slow
from tunesmith.metrics.profile import Profiler
from tunesmith.metrics.sink import Sinks
from tunesmith.optim.lr_schedule import scheduled_rate
from tunesmith.parallel.copies import GradientSum
from tunesmith.parallel.mesh import all_reduce_together
from tunesmith.parallel.shard import set_gradient_sync, sharded_modules
from tunesmith.parallel.tensor import reduce_gradients
from tunesmith.run_dir import PROFILE, Phase
from tunesmith.runtime.host import return_freed_memory
from tunesmith.runtime.transfer import Mark
from tunesmith.train_model import StepTotals
from tunesmith.training.answer_sampler import AnswerSampler
from tunesmith.training.async_metrics import AsyncMetrics, StepOutput
from tunesmith.training.checkpoint_saver import CheckpointSaver
from tunesmith.training.loop_part import LoopPart, LoopShared
from tunesmith.training.result import Result, failure_of, stopped_by
from tunesmith.training.session import Session, check_one_micro_batch
from tunesmith.training.stop_control import StopControl
from tunesmith.training.validation import Validation
from tunesmith.units import count_of

log = logging.getLogger(__name__)

SLOW_STEP_SECONDS = 5.0
SLOW_FIRST_STEP = "the first step is running; it takes minutes if kernels are compiled"


class Trainer(LoopPart):
    """The training loop. It begins at step 0 or at a checkpoint, and ends with the run, a stop or a
    failure.
    """

    def __init__(
        self,
        session: Session,
        start: Start,
        sinks: Sinks,
        stop: StopControl,
    ) -> None:
        run = session.run
        # Take the progress from the checkpoint, but replace the values that are determined anew
        # when a run is resumed.
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
        # Tell the memory guard how many bytes a save needs, so that the guard requests a stop while
        # enough memory is left to save.
        stop.request.saving = session.plan.memory.copies
        self.first_step = progress.step
        saved_step = None
        ended = None
        if start.progress:
            saved_step = self.first_step
            ended = start.progress.ended
        # If the run had already ended, but the recipe now has another duration, the run continues,
        # even if early stopping had ended it.
        if ended not in (None, str(run.train.duration)):
            progress.worse = 0
        self.checkpoints = CheckpointSaver(shared, saved_step)
        stop.request.saved_step = lambda: self.checkpoints.writer.saved_step
        self.metrics = AsyncMetrics(shared, self.checkpoints.writer)
        self.validation = Validation(shared, self.metrics)
        self.answers = AnswerSampler(shared)
        self.learning_rate = partial(
            scheduled_rate,
            run.train,
            total=session.total_steps,
            steps_per_epoch=session.data.schedule.steps_per_epoch(0),
        )
        # FSDP already sums the gradients of a sharded, fully trained model, so `gradient_sum` must
        # not sum them again.
        is_adapter = run.adapter.kind == "lora"
        is_summed_by_fsdp = not is_adapter and bool(sharded_modules(session.model))
        self.gradient_sum = GradientSum(
            session.optimizer.parts.values(),
            None if is_summed_by_fsdp else session.mesh.data_group,
            beside_backward=not is_adapter,
            late={p for module in session.model.projector for p in module.parameters()},
        )

    def fit(self) -> Result:
        """Train until the duration is reached. Raise StoppedError after saving if a stop is
        requested.
        """
        self.stop.agree()
        if self.stop.is_due():  # a stop was requested while the model was loaded
            self.save_and_stop()
        if not self.progress.validated:
            self.sinks.text("validation", "continuing the validation that was interrupted")
            self.validate()
            # The checkpoint of this step already exists. Save it again, because the validation has
            # now shown whether it is the best one.
            self.checkpoints.save()
        if self.first_step == 0 and self.method.validates_first:
            self.validation.measure_before_training()
        # Do not sample answers before training if the model is sharded, because it would gather all
        # weights for each token, which is too slow.
        if self.first_step == 0 and not self.answers.is_sharded:
            self.answers.sample(is_first=True)
        folder = self.out / PROFILE
        device = self.session.device
        profiler = Profiler(self.run.profile, folder, rank=self.ranks.rank, device=device)
        with profiler, self.batches() as batches:
            for _ in self.steps(batches):
                profiler.step()
        self.metrics.flush()
        if self.stop.is_due() and not self.is_over:
            self.save_and_stop()
        if self.stop.ends() and not self.is_over:
            text = f"on_record has ended the run after step {self.progress.step}"
            self.sinks.text("stopped", text)
        return self.end()

    def batches(self) -> AbstractContextManager[Iterable[GlobalBatch]]:
        """Return the global batches of the remaining steps."""

        def ends() -> bool:
            self.stop.agree()
            return self.is_over or self.stop.is_due() or self.stop.ends()

        return self.method.batches(self.session, self.first_step, self.stop, ends)

    def steps(self, batches: Iterable[GlobalBatch]) -> Iterator[int]:
        """Train on each batch until the run is over. Yield the number of optimizer steps so far."""
        progress = self.progress
        metrics = self.metrics
        stop = self.stop
        metrics.restart_clock()
        if self.validation.is_out_of_patience():
            return
        for batch in batches:
            if self.is_over or stop.is_due() or stop.ends():
                return
            self.checkpoints.raise_failed_write()
            self.report_phase()
            with self.logged_if_slow(progress.step):
                output = self.train_step(batch)
            if output is None:
                # The step was aborted because of low memory. `stop.is_due` then ends the loop in
                # the next iteration.
                continue
            metrics.submit(output)
            progress.step = output.step
            self.ranks.heartbeat.progress(progress.step)
            stop.request.nothing_to_save = False

            is_last = self.is_over
            validates = self.validation.is_due(is_last=is_last)
            saves = self.checkpoints.is_due()
            # Normally the values of a step are read during the next step. Read them now if a
            # validation or a checkpoint follows, or if the run ends. If there is a validation, log
            # the record after the validation.
            reads_now = validates or saves or is_last or not metrics.reads_late
            # Before the next answers are sampled, a stop of another rank must be known.
            reads_now = reads_now or batch.is_sampled
            if reads_now or stop.is_due():
                metrics.flush(log=not validates)
            if validates:
                self.validate()
                saves = saves or self.checkpoints.is_new_best()
            # The last checkpoint of the run is not written here but after the loop.
            if saves and not is_last and not stop.is_due():
                self.checkpoints.save(more_steps_follow=True)
            # Validation and saving must not count in the duration of the next step.
            if validates or saves:
                metrics.restart_clock()
            yield progress.step
            if self.validation.is_out_of_patience():
                validations = count_of(progress.worse, "validation")
                text = f"stopping the run, because {validations} brought no improvement"
                self.sinks.text("patience", text)
                return

    def logged_if_slow(self, step: int) -> AbstractContextManager[None]:
        """Return a context that logs a message if the first step takes long."""
        if step > self.first_step or not self.ranks.is_main_process:
            return nullcontext()
        return logged_if_slow(log, SLOW_FIRST_STEP, SLOW_STEP_SECONDS)

    def train_step(self, batch: GlobalBatch) -> StepOutput | None:
        """Run forward, backward and the update on one global batch.

        Return None if memory is low. The weights are then unchanged, and the caller saves the
        previous step.
        """
        session = self.session
        model = session.model
        optimizer = session.optimizer
        mesh = session.mesh
        check_one_micro_batch(self.run, batch)
        lr = self.learning_rate(batch.step, seconds=self.progress.seconds)
        optimizer.start_step(lr, batch.step)
        denominator = self.method.denominator(batch)
        # Compute values that the losses of all micro batches need. This is a collective call.
        self._seed_dropout(batch.step, -1)
        totals = self.method.begin_step(
            model,
            StepTotals(batch.examples, batch.chosen_tokens, batch.mismatched),
            lambda total: all_reduce_together([total], mesh.data_group),
        )
        loss_of = partial(self.method, totals=totals)
        # With fp16, the loss is multiplied by the loss scale. The optimizer divides the gradients
        # by it.
        loss_factor = (optimizer.scale or 1.0) / denominator
        zero = torch.zeros((), device=session.device)
        loss = zero
        metrics = dict.fromkeys(self.method.metrics, zero)
        for index, micro_batch in enumerate(batch.micro, batch.first_micro):
            if self.stop.drops_step():
                return None
            self._seed_dropout(batch.step, index)
            # If the model is sharded, each backward reduces the gradients over the ranks. If each
            # rank has a copy of the model, only the last backward of a step reduces them.
            is_last_backward = micro_batch is batch.micro[-1]
            set_gradient_sync(model, mesh, last=is_last_backward)
            if is_last_backward:
                self.gradient_sum.start()
            with model.step_context(micro_batch):
                output = model(micro_batch, loss_of)
                self.ranks.heartbeat.progress()
                (output.loss * loss_factor).backward()
            # Do not add in place, because all sums begin as the same zero tensor.
            loss = loss + output.loss.detach()
            metrics = {name: value + output.metrics[name] for name, value in metrics.items()}
        # Sum over the data ranks first, then over the tensor-parallel group. After both sums, the
        # norm is the norm of the entire gradient.
        gradients = optimizer.gradients()
        self.gradient_sum.finish(gradients)
        reduce_gradients(gradients, model.partial_gradients, mesh)
        means = {name: value / denominator for name, value in metrics.items()}
        scalars = self.metrics.reduce(loss / denominator, means)
        # `step` clips the gradients by their norm, updates the weights, drops the gradients and
        # returns the norm.
        grad_norm = optimizer.step()
        scalars.copy_to_host(grad_norm)
        return StepOutput(batch.step + 1, batch, lr, scalars, Mark(session.device))

    def _seed_dropout(self, step: int, micro_batch: int) -> None:
        """Derive the seed for dropout from the run's seed, the step and the micro batch, so that a
        resumed run draws the same masks. The micro batch is -1 for what a method computes before
        the first one.
        """
        # Each factor is larger than the number that is added after it, so that different inputs
        # give different seeds.
        torch.manual_seed((self.run.train.seed * 1_000_003 + step) * 4_099 + micro_batch)

    def report_phase(self) -> None:
        """Report to the heartbeat that a step begins, and the time limit of the step."""
        heartbeat = self.ranks.heartbeat
        if self.progress.step == self.first_step:
            heartbeat.phase(Phase.FIRST_STEP, STUCK_AFTER_S + COMPILING_S)
        else:
            heartbeat.phase(Phase.TRAINING, STUCK_AFTER_S)
        heartbeat.progress(self.progress.step)

    def validate(self) -> None:
        """Run a validation and then sample answers.

        After the last validation no answers are sampled here, because `end` samples answers of the
        final weights.
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
        """Save the last step, if there is one, and raise StoppedError."""
        if self.progress.step:
            # Free as much memory as possible, because memory can be low and the save needs some.
            self.session.optimizer.drop_gradients()
            return_freed_memory()
            self.checkpoints.save()
        request = (self.stop.request.low_memory, self.stop.request.signal)
        requests = self.ranks.all_gather_object(request)
        raise stopped_by(requests, self.run, self.progress, self.ranks)

    def end(self) -> Result:
        """Write the last checkpoint and final/.

        If a stop interrupted the last validation, save and stop instead. When the run is resumed,
        it repeats the validation and writes final/.
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
        """Convert an exception to an error of this run that names the last step and checkpoint."""
        return failure_of(
            error,
            self.run,
            self.session.plan,
            step=self.progress.step,
            saved_step=self.checkpoints.writer.saved_step,
        )
