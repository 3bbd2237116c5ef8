"""Creation of the record of a step from values that are on the device.

On CUDA, the values of a step are read while the next step runs, so that the host never waits for
the device within a step. The duration of a step is measured on the device, from the end of the
previous step to the end of the step, because the host can be ahead of the device.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tunesmith.batches.loader import GlobalBatch
from tunesmith.checkpoint.writer import Writer
from tunesmith.errors import NonFiniteError
from tunesmith.metrics.gauges import Gauges
from tunesmith.metrics.record import StepRecord
from tunesmith.runtime.transfer import Mark
from tunesmith.training.loop_part import LoopPart, LoopShared
from tunesmith.training.step_scalars import RankStatus, StepNumbers, StepScalars
from tunesmith.units import ratio

MAX_NAMED_ROWS = 8  # maximum number of rows that an error lists


@dataclass(frozen=True)
class StepOutput:
    """Output of a step. Its values may not have been copied from the device yet."""

    step: int  # counts from 1
    batch: GlobalBatch
    lr: float
    scalars: StepScalars
    ended: Mark  # end of the step on the device


class AsyncMetrics(LoopPart):
    """Part of the training loop that creates the record of each step.

    Attributes:
        reads_late: whether the values of a step are read while the next step runs.
        step_began: a mark on the device at the end of the last step whose values were read.
        pending: the step whose values were not read yet, or None.
        records: records of all steps since the run was started or resumed.
    """

    def __init__(self, shared: LoopShared, writer: Writer) -> None:
        super().__init__(shared)
        self.writer = writer
        self.gauges = Gauges(self.session.device, links=self.ranks.world > 1)
        self.reads_late = self.session.device.type == "cuda"
        self.pending: StepOutput | None = None
        self.records: list[StepRecord] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start measuring the duration of the next step. Call this only if no step is pending."""
        self.step_began = Mark(self.session.device)

    def reduce(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> StepScalars:
        """Sum the values of a step over all ranks. The same collective tells all ranks about
        requests to stop and failed checkpoint writes.
        """
        scalars = StepScalars(loss, metrics)
        if self.ranks.world == 1:
            return scalars
        status = RankStatus(
            stop_requests=float(self.stop.is_requested()),
            failed_writes=float(self.writer.failed),
            ends=float(self.stop.wants_end()),
        )
        scalars.all_reduce(status, self.session.mesh)
        return scalars

    def submit(self, output: StepOutput) -> None:
        """Store a step's output for `flush`. If `reads_late`, first read the values of the previous
        step.
        """
        if self.reads_late:
            self.flush()
        self.pending = output

    def flush(self, *, log: bool = True) -> None:
        """Read the values of the pending step, create its record, and log it.

        Args:
            log: whether to log the record. Pass False if a validation loss will be added to the
                record first.

        Raises:
            NonFiniteError: the loss or the gradient norm is NaN or infinite.
            RunError: see `Method.find_fault`.
        """
        output = self.pending
        self.pending = None
        if output is None:
            return
        numbers = output.scalars.read()
        if numbers.status is not None:
            self.stop.agree_on(numbers.status)
        seconds = output.ended.seconds_since(self.step_began)
        self.step_began = output.ended
        # All ranks use rank 0's duration, so that a run with a time limit ends after the same step
        # on all of them. This needs a separate broadcast, because the reduction of the step's
        # values runs before the step ends.
        seconds = self.ranks.broadcast_number(seconds)
        self.progress.seconds += seconds
        activity = self.ranks.heartbeat.activity
        activity.longest_step = max(activity.longest_step, seconds)
        self.stop.expect_step(seconds, micro_batches=len(output.batch.micro))
        self._check_finite(output, numbers)
        record = self._make_record(output, numbers, seconds)
        fault = self.method.find_fault(record.extra)
        if fault is not None:
            raise fault
        self.progress.record = record
        if log:
            self.log_record()

    def _check_finite(self, output: StepOutput, numbers: StepNumbers) -> None:
        """Raise NonFiniteError if the loss or the gradient norm of a step is not finite."""
        scale = self.session.optimizer.scale
        # fp16 training halves the loss scale after a step with infinite gradients and skips this
        # step. If the scale falls below 1, the gradients themselves are not finite.
        is_searching = scale is not None and scale >= 1.0
        if math.isfinite(numbers.loss) and (math.isfinite(numbers.grad_norm) or is_searching):
            return
        # Wait for the checkpoint in progress, because the error below names the last checkpoint
        # that was saved.
        self.writer.close()
        saved_step = self.writer.saved_step
        name = "gradient norm" if math.isfinite(numbers.loss) else "loss"
        rows = output.batch.row_names()
        more = " ..." if len(rows) > MAX_NAMED_ROWS else ""
        update = "the update was not applied"
        if self.run.train.optimizer_in_backward:
            update = (
                "only the parameters with a finite gradient were updated in this step, and this"
                " update was not saved"
            )
        checkpoint = "no checkpoint was written yet"
        if saved_step:
            checkpoint = f"checkpoint-{saved_step} is the last good checkpoint"
        raise NonFiniteError(
            f"the {name} is not finite (loss {numbers.loss}, gradient norm {numbers.grad_norm})",
            where=f"step {output.step}, rows {', '.join(rows[:MAX_NAMED_ROWS])}{more}",
            why=f"the learning rate is too high, or a row is bad; {update}, and {checkpoint}",
            fix="lower train.learning_rate or lengthen train.warmup; "
            "look at the rows of this step with `tunesmith data`; if the error also occurs with "
            "model.dtype=fp32, the data is the cause",
        )

    def _make_record(self, output: StepOutput, numbers: StepNumbers, seconds: float) -> StepRecord:
        session = self.session
        batch = output.batch
        # Sum of the peak TFLOP/s of all ranks.
        peak = (session.peak.tflops or 0.0) * self.ranks.world or None
        mfu = None
        # The FLOPs and the idle time of batches of sampled answers are not known.
        if peak and not batch.is_sampled:
            work = session.flops(batch.indices, batch.supervised)
            mfu = ratio(work, seconds) / (peak * 1e12)
            # A value above 1 is invalid. The cause can be fp8 matmuls, which exceed the 16-bit
            # peak, or a peak that does not belong to this chip.
            if mfu > 1:
                mfu = None
        idle_share = None
        if session.mesh.shape.data > 1 and not batch.is_sampled:
            idle_share = batch.idle_share
        return StepRecord(
            step=output.step,
            epoch=batch.epoch,
            loss=numbers.loss,
            learning_rate=output.lr,
            grad_norm=numbers.grad_norm,
            tokens=batch.tokens,
            supervised_tokens=batch.supervised,
            examples=batch.examples,
            step_seconds=seconds,
            data_seconds=batch.data_seconds,
            tokens_per_second=ratio(batch.tokens, seconds),
            mfu=mfu,
            mfu_peak_tflops=peak,
            memory_gib=session.memory_gib(),
            **self.gauges.read(),
            idle_share=idle_share,
            extra={**batch.extra, **self.method.finish(numbers.metrics)},
        )

    def log_record(self) -> None:
        """Send the newest record to every sink, such as the terminal and metrics.jsonl."""
        record = self.progress.record
        assert record is not None
        self.progress.validated = True
        self.records.append(record)
        self.sinks.step(record)
