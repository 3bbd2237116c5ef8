"""Saving during a run: periodic checkpoints, the last checkpoint, and final/ with the weights."""

import time
from functools import partial

from tunesmith.adapter.peft_files import load_adapter
from tunesmith.build_model import fill_parameters
from tunesmith.checkpoint import contents, manifest
from tunesmith.checkpoint.model_card import model_card
from tunesmith.checkpoint.resume import validation_score
from tunesmith.checkpoint.sharded import RanksWriter, fits_twice, sharded_save_function
from tunesmith.checkpoint.writer import SaveFunction, Writer
from tunesmith.distributed.activity import STUCK_AFTER_S
from tunesmith.methods.pairs import REWARD_ACCURACY
from tunesmith.metrics.record import VALIDATION
from tunesmith.planning.resolve import checkpoint_bytes
from tunesmith.run_dir import FINAL, Phase
from tunesmith.training.loop_part import LoopPart, LoopShared

# A rank that waits for a save counts as stuck STUCK_AFTER_S seconds after the longer of two times:
# the time of the save on a disk with MIN_DISK_BYTES_A_SECOND, and SLOWER_SAVE_FACTOR times the
# longest save so far. A save includes reading the files again for their checksums.
MIN_DISK_BYTES_A_SECOND = 50e6
SLOWER_SAVE_FACTOR = 4.0


class CheckpointSaver(LoopPart):
    """Part of the training loop that saves checkpoints and the final weights.

    Attributes:
        writer: writes checkpoint-<step> into the run directory.

    Args:
        saved_step: step of the checkpoint from which the run resumes, or None.
    """

    def __init__(self, shared: LoopShared, saved_step: int | None) -> None:
        super().__init__(shared)
        self.longest_save = 0.0  # duration in seconds
        keep = self.run.checkpoint.keep
        self.writer: Writer
        sync = self.sinks.flush
        if self.ranks.world > 1:
            self.writer = RanksWriter(self.out, keep, saved_step, sync=sync, ranks=self.ranks)
        else:
            self.writer = Writer(self.out, keep, saved_step, sync=sync)
        # Serialize the tokenizer now, in the main thread. Later, other threads use the tokenizer,
        # so a save in the background could not safely do this.
        self.tokenizer: contents.TokenizerFiles = {}
        if self.ranks.is_main_process:
            template = self.session.data.template
            files = self.session.files
            self.tokenizer = contents.tokenizer_files(files.tokenizer, template, files.folder)
        self.schedule = self.cadence(self.run.checkpoint.every)

    def is_due(self) -> bool:
        """Return whether a periodic checkpoint is due. Call this once per step."""
        return self.schedule.due(self.progress.step, self.progress.seconds)

    def is_new_best(self) -> bool:
        """Return whether to save a checkpoint now because this step has the best validation so far.

        Return True only for adapters, because they are small, and only if `checkpoint.final` is
        `best`. Other checkpoints are saved at the intervals of `checkpoint.every`.
        """
        is_adapter = self.run.adapter.kind == "lora"
        is_best = self.progress.best_step == self.progress.step
        return is_adapter and is_best and self.run.checkpoint.final == "best"

    def raise_failed_write(self) -> None:
        """If a checkpoint write failed, raise its error. All ranks raise it at the same step."""
        has_failed = self.writer.failed
        if self.ranks.world > 1:
            has_failed = self.stop.agreed.failed_writes > 0
        if has_failed:
            self.writer.wait()

    def save(self, *, more_steps_follow: bool = False) -> None:
        """Write checkpoint-<step>. Delete the oldest checkpoints if there are more than `keep`, but
        never the best one.

        If more steps follow, an adapter is copied and written in the background. A fully trained
        model is normally written before training continues. With several ranks, it is written in
        the background if there is enough memory for a copy of the weights and moments.
        """
        progress = self.progress
        self.ranks.heartbeat.phase(Phase.SAVING, self.time_limit())
        # Wait for a write in progress, so that `saved_step` is up to date.
        self.writer.wait()
        # Mark this checkpoint as the best one if its validation is better than the validations of
        # all other checkpoints.
        step = progress.step
        record = progress.record
        if record is not None and record.step == step and progress.validated:
            accuracy = record.extra.get(f"{VALIDATION}{REWARD_ACCURACY}")
            score = validation_score(record.val_loss, accuracy, self.run.validate.best_by)
            kept = progress.kept_score
            # If the run used another `best_by` before it was resumed, the earlier score cannot be
            # compared, so the new score replaces it.
            if score is not None and (kept is None or len(score) != len(kept) or score < kept):
                progress.kept_step = step
                progress.kept_score = score
        # Do not save a step twice. The exception is the end of a run, because `progress` now
        # records that the run has ended.
        if self.writer.saved_step == step and progress.ended is None:
            return
        progress.loss_scale = self.session.optimizer.scale
        progress.good_steps = self.session.optimizer.growth_tracker
        save_fn, in_background = self._prepare(copy=more_steps_follow)
        if in_background:
            self.writer.write_async(save_fn, step, keep_step=progress.kept_step)
            return
        start = time.perf_counter()
        self.writer.write(save_fn, step, keep_step=progress.kept_step)
        seconds = time.perf_counter() - start
        self.longest_save = max(self.longest_save, seconds)

    def _prepare(self, *, copy: bool) -> tuple[SaveFunction, bool]:
        """Return a function that writes the current state, and whether it may run in the
        background.

        Writing in the background requires a copy of the state. The copy is made if `copy` is True
        and there is enough memory.
        """
        session = self.session
        optimizer = session.optimizer.state_dict()
        parts = (self.run, session.model, self.tokenizer, optimizer, self.progress)
        if self.run.adapter.kind == "lora":
            # Rank 0 writes the adapter. The other ranks only send their shards of it to rank 0.
            save_fn, is_copied = contents.adapter_save_function(
                *parts, copy and self.ranks.is_main_process
            )
            if not self.ranks.is_main_process:
                return lambda folder: None, copy
            if copy and not is_copied:
                self.sinks.text(
                    "checkpoint",
                    "not enough device memory for a copy: training waits while the "
                    "checkpoint is written",
                )
            return save_fn, is_copied
        if isinstance(self.writer, RanksWriter):
            is_copied = copy and fits_twice(optimizer, session.model, self.ranks, session.device)
            return sharded_save_function(*parts, ranks=self.writer.ranks, copy=is_copied), is_copied
        return partial(contents.write_checkpoint, *parts), False

    def load_best(self) -> int:
        """Load the best weights into the model, for final/. Return the step of these weights.

        This is a collective call. Call it only after the last checkpoint was saved, because a
        resumed run must continue with the weights of the last step.
        """
        progress = self.progress
        ranks = self.ranks
        best_step = progress.kept_step
        if self.run.checkpoint.final == "last" or best_step is None:
            return progress.step
        if best_step != progress.best_step:
            text = (
                f"step {progress.best_step} had the best validation, but no checkpoint was saved "
                f"at this step: final/ holds the weights of step {best_step}"
            )
            if progress.best_step == 0:
                text = (
                    "warning: no validation was better than the one before training; final/ holds "
                    f"the weights of step {best_step}"
                )
            self.sinks.text("checkpoint", text)
        if best_step == progress.step:
            return progress.step
        ranks.heartbeat.phase(Phase.SAVING_FINAL, self.time_limit())
        checkpoint = self.out / f"checkpoint-{best_step}"
        damage = None
        with ranks.raise_on_all_ranks():
            if ranks.is_run_dir_writer:
                # A file that another node stores is missing on this node. This is not damage,
                # because the other node sends the file when it is read.
                for _, clause in manifest.damaged_files(checkpoint):
                    if not clause.endswith(manifest.ELSEWHERE):
                        damage = damage or clause
        damages = ranks.all_gather_object(damage)
        damage = next(filter(None, damages), None)
        if damage:
            text = (
                "warning: final/ holds the weights of the last step. The best checkpoint, "
                f"{checkpoint.name}, is damaged: {damage}"
            )
            self.sinks.text("checkpoint", text)
            return progress.step
        session = self.session
        model = session.model.model
        if self.run.adapter.kind == "lora":
            load_adapter(model, checkpoint)
        else:
            fill_parameters(self.run, session.files, model, checkpoint, ranks)
        return best_step

    def write_final(self, step: int) -> None:
        """Write the model or the adapter to final/, without the training state. `step` is the step
        of the weights.
        """
        model = self.session.model
        self.ranks.heartbeat.phase(Phase.SAVING_FINAL, self.time_limit())
        if not self.ranks.is_main_process:
            # This rank takes part in gathering the shards, but writes nothing.
            contents.write_model_files(None, self.run, model, {})
            return
        last_step = self.progress.step
        with manifest.atomic_folder(self.out / FINAL, step, last_step) as folder:
            contents.write_model_files(folder, self.run, model, self.tokenizer)
            recipe = self.session.recipe
            card = model_card(recipe.model, recipe)
            card_file = folder / manifest.CARD
            card_file.write_text(card, encoding="utf-8")

    def time_limit(self) -> float:
        """Return the seconds that a rank may wait for a save before it counts as stuck.

        The limit is computed from the size of the checkpoint and the longest save so far.
        """
        trained = sum(parameter.numel() for parameter in self.session.optimizer.params.values())
        size, _ = checkpoint_bytes(self.run, trained, self.session.files.folder)
        return STUCK_AFTER_S + max(
            size / MIN_DISK_BYTES_A_SECOND, SLOWER_SAVE_FACTOR * self.longest_save
        )
