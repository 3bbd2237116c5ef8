"""Validation during training: when it is due, the best result so far, and early stopping."""

import dataclasses
import json

from tunesmith.checkpoint.resume import validation_score
from tunesmith.distributed.activity import COMPILING_S, STUCK_AFTER_S
from tunesmith.host.files import write_atomically
from tunesmith.methods.pairs import REWARD_ACCURACY
from tunesmith.metrics.record import VALIDATION, StepRecord
from tunesmith.run_dir import BEST, Phase
from tunesmith.train_model import ValidationResult
from tunesmith.training.async_metrics import AsyncMetrics
from tunesmith.training.loop_part import LoopPart, LoopShared


class Validation(LoopPart):
    """Part of the training loop that runs the validations."""

    def __init__(self, shared: LoopShared, metrics: AsyncMetrics) -> None:
        super().__init__(shared)
        self.metrics = metrics
        every = self.run.validate.every if self.session.data.validation else None
        self.schedule = self.cadence(every)

    def is_due(self, *, is_last: bool) -> bool:
        """Return whether a validation is due after this step. Call this once per step."""
        is_time = self.schedule.due(self.progress.step, self.progress.seconds)
        return (is_time or is_last) and self.session.data.validation is not None

    def is_out_of_patience(self) -> bool:
        """Return whether `validate.patience` validations in a row had no improvement."""
        without_improvement = self.progress.worse
        patience = self.run.validate.patience
        return patience is not None and 0 < patience <= without_improvement

    def measure(self) -> bool:
        """Run a validation. Add its loss to the record of the last step and log the record.

        Return False if a stop interrupted the validation. When the run is resumed, it repeats the
        validation and logs the record.
        """
        progress = self.progress
        # If a stop interrupts the validation, the checkpoint stores False, and the resumed run
        # repeats the validation. `log_record` sets it to True.
        progress.validated = False
        result = self._result()
        if result is None:
            return False
        assert progress.record is not None
        extra = dict(progress.record.extra)
        for name, value in result.metrics.items():
            extra[f"{VALIDATION}{name}"] = value
        progress.record = dataclasses.replace(progress.record, val_loss=result.loss, extra=extra)
        self.metrics.log_record()
        # Increase the counter now. It is reset below if this validation is the best.
        progress.worse += 1
        if self._is_best(result):
            progress.worse = 0
            self._set_best(result)
        return True

    def measure_before_training(self) -> None:
        """Validate the model before the first step. Later validations are compared with it."""
        if self.session.data.validation is None:
            return
        result = self._result()
        if result is None:
            return
        self._set_best(result)
        rewards = {f"{VALIDATION}{name}": value for name, value in result.metrics.items()}
        self.sinks.step(StepRecord.before_training(result.loss, rewards))

    def _set_best(self, result: ValidationResult) -> None:
        """Record that the validation of the current step is the best one so far."""
        progress = self.progress
        progress.best_step = progress.step
        progress.best_loss = result.loss
        progress.best_accuracy = result.metrics.get(REWARD_ACCURACY)
        best = {"step": progress.best_step, "val_loss": progress.best_loss}
        if progress.best_accuracy is not None:
            best["val_accuracy"] = progress.best_accuracy
        if self.ranks.is_main_process:
            write_atomically(self.out / BEST, json.dumps(best, indent=1))

    def _is_best(self, result: ValidationResult) -> bool:
        """Return whether this validation is better than all earlier ones. If the accuracy is
        compared and is equal, the loss decides.
        """
        progress = self.progress
        if progress.best_loss is None:
            return True
        best_by = self.run.validate.best_by
        score = validation_score(result.loss, result.metrics.get(REWARD_ACCURACY), best_by)
        best = validation_score(progress.best_loss, progress.best_accuracy, best_by)
        return score is not None and (best is None or score < best)

    def _result(self) -> ValidationResult | None:
        session = self.session
        assert session.data.validation is not None
        self.ranks.heartbeat.phase(Phase.VALIDATION, STUCK_AFTER_S + COMPILING_S)
        return self.method.validate(session, self.stop)
