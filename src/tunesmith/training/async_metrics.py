"""From a step's numbers to its record: read while the next step runs, checked, and logged.

On CUDA a step's numbers are read one step later, so that the host never waits for the device inside
a step. Its time goes from the end of the step before to its own end, by the device: the host may be
done with a step when the device is in the middle of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tunesmith.checkpoint.writer import Writer
from tunesmith.data.batches.loader import GlobalBatch
from tunesmith.errors import NonFiniteError
from tunesmith.metrics.gauges import Gauges
from tunesmith.metrics.record import StepRecord
from tunesmith.runtime.transfer import Mark
from tunesmith.training.loop_part import LoopPart, LoopShared
from tunesmith.training.step_scalars import RankStatus, StepNumbers, StepScalars
from tunesmith.units import ratio

MAX_NAMED_ROWS = 8  # in an error


@dataclass(frozen=True)
class StepOutput:
    """A step that ran. Its numbers may still be on their way from the device."""

    step: int  # from 1
    batch: GlobalBatch
    lr: float
    scalars: StepScalars
    ended: Mark  # of the step, on the device


class AsyncMetrics(LoopPart):
    """Makes the records of one start of a run.

    Attributes:
        reads_late: read a step's numbers while the next step runs.
        step_began: on the device, the end of the last step that was read.
        pending: the step whose numbers are not read yet.
        records: of the steps of this start.
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
        """Count the time of the coming step from here on; no step is pending."""
        self.step_began = Mark(self.session.device)

    def reduce(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> StepScalars:
        """The numbers of a step, summed over the ranks; with them the ranks agree on a stop and on
        a checkpoint that could not be written."""
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
        """Take a step's output. Late numbers of the step before are read, as the device is busy."""
        if self.reads_late:
            self.flush()
        self.pending = output

    def flush(self, *, log: bool = True) -> None:
        """Read the pending step's numbers into its record, and log it.

        Args:
            log: False where a validation loss is to be added first.

        NonFiniteError if the loss or the gradient norm is NaN or infinite.
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
        # Ranks share rank 0's seconds: a run by the clock ends on all of them after the same step.
        # The step's reduction cannot carry them, as it runs before the step ends.
        seconds = self.ranks.broadcast_number(seconds)
        self.progress.seconds += seconds
        self.stop.expect_step(seconds, micro_batches=len(output.batch.micro))
        self._check_finite(output, numbers)
        self.progress.record = self._make_record(output, numbers, seconds)
        if log:
            self.log_record()

    def _check_finite(self, output: StepOutput, numbers: StepNumbers) -> None:
        scale = self.session.optimizer.scale
        # fp16 skips steps while it searches for its loss scale.
        is_searching = scale is not None and scale >= 1.0
        if math.isfinite(numbers.loss) and (math.isfinite(numbers.grad_norm) or is_searching):
            return
        # The checkpoint in progress may be the last good one.
        self.writer.close()
        saved_step = self.writer.saved_step
        name = "gradient norm" if math.isfinite(numbers.loss) else "loss"
        rows = output.batch.row_names()
        more = " ..." if len(rows) > MAX_NAMED_ROWS else ""
        update = "the update was not applied"
        if self.run.train.optimizer_in_backward:
            update = "only the parameters with a finite gradient were updated in this step"
            update += ", and none of it was saved"
        checkpoint = f"checkpoint-{saved_step}" if saved_step else "none was written yet"
        raise NonFiniteError(
            f"the {name} is not finite (loss {numbers.loss}, gradient norm {numbers.grad_norm})",
            where=f"step {output.step}, rows {', '.join(rows[:MAX_NAMED_ROWS])}{more}",
            why=f"{update}; the last good checkpoint: {checkpoint}",
            fix="lower train.learning_rate or lengthen train.warmup; "
            "look at those rows with `tunesmith data`; if it also happens with "
            "model.dtype=fp32, the data is the cause",
        )

    def _make_record(self, output: StepOutput, numbers: StepNumbers, seconds: float) -> StepRecord:
        session = self.session
        batch = output.batch
        # The peak of all ranks together.
        peak = (session.peak.tflops or 0.0) * self.ranks.world or None
        mfu = None
        if peak:
            work = session.flops(batch.indices, batch.supervised)
            mfu = ratio(work, seconds) / (peak * 1e12)
            # No share of a peak: fp8 products pass one of 16 bits, or the peak is not this chip's.
            if mfu > 1:
                mfu = None
        idle_share = None
        if session.mesh.shape.data > 1:
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
            extra=session.model.method.finish(numbers.metrics),
        )

    def log_record(self) -> None:
        """Hand the newest record to every sink."""
        assert self.progress.record is not None
        self.progress.validated = True
        self.records.append(self.progress.record)
        self.sinks.step(self.progress.record)
