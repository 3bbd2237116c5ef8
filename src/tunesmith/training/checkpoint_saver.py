"""When and how a run saves: periodic checkpoints while it trains, the last one, and final/."""

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
from tunesmith.methods.answers import REWARD_ACCURACY
from tunesmith.metrics.record import VALIDATION
from tunesmith.planning.resolve import checkpoint_bytes
from tunesmith.run_dir import FINAL, Phase
from tunesmith.training.loop_part import LoopPart, LoopShared

# A rank that waits longer for a save counts as stuck: a disk that is slower than
# MIN_DISK_BYTES_A_SECOND, or a save that takes SLOWER_SAVE_FACTOR times as long as an earlier one,
# counts as one that stands still. What one rank writes alone is read again for its checksums.
MIN_DISK_BYTES_A_SECOND = 50e6
SLOWER_SAVE_FACTOR = 4.0


class CheckpointSaver(LoopPart):
    """Saves one start of a run.

    Attributes:
        writer: writes checkpoint-<step> into the run directory.

    Args:
        saved_step: step of the checkpoint that the run resumes from, or None.
    """

    def __init__(self, shared: LoopShared, saved_step: int | None) -> None:
        super().__init__(shared)
        self.longest_save = 0.0  # seconds
        keep = self.run.checkpoint.keep
        self.writer: Writer
        sync = self.sinks.flush
        if self.ranks.world > 1:
            self.writer = RanksWriter(self.out, keep, saved_step, sync=sync, ranks=self.ranks)
        else:
            self.writer = Writer(self.out, keep, saved_step, sync=sync)
        # Serialized once, in the main thread: later the tokenizer is in use.
        self.tokenizer: contents.TokenizerFiles = {}
        if self.ranks.is_main_process:
            template = self.session.data.template
            files = self.session.files
            self.tokenizer = contents.tokenizer_files(files.tokenizer, template, files.folder)
        self.schedule = self.cadence(self.run.checkpoint.every)

    def is_due(self) -> bool:
        """Tell whether a periodic checkpoint is due; ask once a step."""
        return self.schedule.due(self.progress.step, self.progress.seconds)

    def is_new_best(self) -> bool:
        """Tell whether the validation of this step is the best so far, and its weights are saved
        for final/ without waiting for `checkpoint.every`: an adapter's are, in a moment.
        """
        is_adapter = self.run.adapter.kind == "lora"
        is_best = self.progress.best_step == self.progress.step
        return is_adapter and is_best and self.run.checkpoint.final == "best"

    def raise_failed_write(self) -> None:
        """Raise the error of a checkpoint that could not be written, on all ranks at one step."""
        has_failed = self.writer.failed
        if self.ranks.world > 1:
            has_failed = self.stop.agreed.failed_writes > 0
        if has_failed:
            self.writer.wait()

    def save(self, *, more_steps_follow: bool = False) -> None:
        """Write checkpoint-<step>, then delete the oldest beyond `keep`, but never the best one.

        Where more steps follow, an adapter is copied and written while they run. A model trained in
        full is written here and now, unless many ranks share it and their hosts have room for a
        copy of weights and moments.
        """
        progress = self.progress
        self.ranks.heartbeat.phase(Phase.SAVING, self.time_limit())
        # After a write in progress `saved_step` is up to date.
        self.writer.wait()
        # A validation of this step counts if it is the best one with a checkpoint.
        record = progress.record
        if record is not None and record.step == progress.step and progress.validated:
            accuracy = record.extra.get(f"{VALIDATION}{REWARD_ACCURACY}")
            score = validation_score(record.val_loss, accuracy, self.run.validate.best_by)
            kept = progress.kept_score
            # By another `best_by` than before, scores cannot be compared.
            if score is not None and (kept is None or len(score) != len(kept) or score < kept):
                progress.kept_step = progress.step
                progress.kept_score = score
        # The end is saved over the same step once more: its progress says that the run has ended.
        if self.writer.saved_step == progress.step and progress.ended is None:
            return
        progress.loss_scale = self.session.optimizer.scale
        progress.good_steps = self.session.optimizer.growth_tracker
        save_fn, in_background = self._prepare(copy=more_steps_follow)
        if in_background:
            self.writer.write_async(save_fn, progress.step, keep_step=progress.kept_step)
            return
        began = time.perf_counter()
        self.writer.write(save_fn, progress.step, keep_step=progress.kept_step)
        self.longest_save = max(self.longest_save, time.perf_counter() - began)

    def _prepare(self, *, copy: bool) -> tuple[SaveFunction, bool]:
        """Return what writes the state of this moment, and whether it may run beside later steps.

        That takes a copy: if `copy` is set and there is room for it.
        """
        session = self.session
        optimizer = session.optimizer.state_dict()
        parts = (self.run, session.model, self.tokenizer, optimizer, self.progress)
        if self.run.adapter.kind == "lora":
            # Rank 0 writes an adapter. The others only give it their parts here.
            save_fn, is_copied = contents.adapter_save_function(
                *parts, copy and self.ranks.is_main_process
            )
            if not self.ranks.is_main_process:
                return lambda folder: None, copy
            if copy and not is_copied:
                text = (
                    "not enough device memory for a copy: training waits while the "
                    "checkpoint is written"
                )
                self.sinks.text("checkpoint", text)
            return save_fn, is_copied
        if isinstance(self.writer, RanksWriter):
            is_copied = copy and fits_twice(optimizer, session.model, self.ranks, session.device)
            return sharded_save_function(*parts, ranks=self.writer.ranks, copy=is_copied), is_copied
        return partial(contents.write_checkpoint, *parts), False

    def load_best(self) -> int:
        """Load the weights that final/ is to hold into the model; the step that they are of.

        A collective call, once the run is over and saved: its state goes on from the last step,
        whatever final/ holds.
        """
        progress = self.progress
        best_step = progress.kept_step
        if self.run.checkpoint.final == "last" or best_step is None:
            return progress.step
        if best_step != progress.best_step:
            text = f"step {progress.best_step} had the best validation, but no checkpoint"
            self.sinks.text("checkpoint", f"{text}: final/ is of step {best_step}")
        if best_step == progress.step:
            return progress.step
        self.ranks.heartbeat.phase(Phase.SAVING_FINAL, self.time_limit())
        checkpoint = self.out / f"checkpoint-{best_step}"
        damage = None
        with self.ranks.raise_on_all_ranks():
            if self.ranks.is_run_dir_writer:
                # Parts that other ranks wrote may lie on their nodes, which give them when they
                # are read.
                for _, clause in manifest.damaged_files(checkpoint):
                    if not clause.endswith(manifest.ELSEWHERE):
                        damage = damage or clause
        damage = next(filter(None, self.ranks.all_gather_object(damage)), None)
        if damage:
            text = f"warning: final/ holds the last step's weights: {checkpoint.name} was the best"
            self.sinks.text("checkpoint", f"{text} one, but {damage}")
            return progress.step
        session = self.session
        if self.run.adapter.kind == "lora":
            load_adapter(session.model.model, checkpoint)
        else:
            model = session.model.model
            fill_parameters(self.run, session.files, model, checkpoint, self.ranks)
        return best_step

    def write_final(self, step: int) -> None:
        """Write final/: the model or adapter, whose weights are of `step`, without the training
        state.
        """
        model = self.session.model
        self.ranks.heartbeat.phase(Phase.SAVING_FINAL, self.time_limit())
        if not self.ranks.is_main_process:
            # Takes part in gathering what ranks share, and writes nothing.
            contents.write_model_files(None, self.run, model, {})
            return
        last_step = self.progress.step
        with manifest.atomic_folder(self.out / FINAL, step, last_step) as folder:
            contents.write_model_files(folder, self.run, model, self.tokenizer)
            card = model_card(self.run.model, self.run, self.out, step=step)
            (folder / manifest.CARD).write_text(card, encoding="utf-8")

    def time_limit(self) -> float:
        """Seconds that a rank may wait for a save: by its bytes on the slowest disk, and at least
        several times as long as the longest save of this start took.
        """
        trained = sum(parameter.numel() for parameter in self.session.optimizer.params.values())
        size, _ = checkpoint_bytes(self.run, trained, self.session.files.folder)
        return STUCK_AFTER_S + max(
            size / MIN_DISK_BYTES_A_SECOND, SLOWER_SAVE_FACTOR * self.longest_save
        )
