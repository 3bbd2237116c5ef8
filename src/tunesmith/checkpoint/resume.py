"""The decision whether a command begins a new run, resumes a run or finds a finished run, and the
state that a resumed run needs.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.batches.schedule import BatchSchedule
from tunesmith.checkpoint.claim import TRACKER_IDS, restore
from tunesmith.checkpoint.manifest import last_step_of
from tunesmith.checkpoint.replicate import copies_in, copy_files, copy_folder, newest_checkpoint
from tunesmith.checkpoint.start_adapter import folder_in_run
from tunesmith.config.dump import differences
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Model, Run, Train
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import (
    CheckpointError,
    DataError,
    ModelError,
    RecipeError,
    TunesmithError,
)
from tunesmith.metrics.record import StepRecord
from tunesmith.run_dir import BEST, FINAL, METRICS, RECIPE, SAMPLES
from tunesmith.units import Size, count_of

log = logging.getLogger(__name__)

PROGRESS = "state/progress.json"
OPTIMIZER = "state/optimizer.safetensors"
RECORDS = (METRICS, SAMPLES, BEST, *TRACKER_IDS)
DELETE = "delete this checkpoint to resume from the one before it, or start over with --fresh"
MIXED_RUNS_REASON = "resuming would mix two runs in one set of metrics"
FORCE = "or resume anyway with checkpoint.resume=force"
START_OVER = "start over with --fresh (the old run is moved aside), or use another output_dir"


@dataclass
class Progress:
    """The progress of a run. Together with the saved tensors, it is sufficient to resume the run.

    The fields are the keys of progress.json. The hashes, `micro_batch` and `threads` are None in a
    checkpoint of an older version.

    Attributes:
        step: number of completed optimizer steps.
        seconds: training time so far, for durations that are given as time.
        record: record of the last step. None before the first step.
        validated: whether the validation of this step is complete.
        best_step, best_loss, best_accuracy: values of the best validation so far.
        kept_step, kept_score: step and `validation_score` of the best validation so far, among the
            steps that have a checkpoint.
        worse: number of validations after the best one.
        loss_scale: loss scale of fp16 training.
        good_steps: number of steps after the last change of the loss scale.
        ended: the duration in the recipe with which the run has ended. None before the run has
            ended.
        data_hash: SHA-256 (hex) of the tokens of the training examples.
        validation_hash: SHA-256 of the tokens of the validation examples.
        model_hash: hash of the base model's weights, see `weights_digest`.
        reference_hash: hash of the adapter that the method uses as the reference. None if the
            method has no reference.
        reward_hash: hash of the scorers that reward sampled answers. None for other methods.
        micro_batch: size of the micro batch, such as `4096 tokens`.
        threads: number of torch's CPU threads.
        shares_prompts: whether a packed row holds the prompt of a preference pair only once. None
            in checkpoints of older versions, which stored the prompt twice.
    """

    step: int = 0
    seconds: float = 0.0
    record: StepRecord | None = None
    validated: bool = True
    best_step: int | None = None
    best_loss: float | None = None
    best_accuracy: float | None = None
    kept_step: int | None = None
    kept_score: list[float] | None = None
    worse: int = 0
    loss_scale: float | None = None
    good_steps: int = 0
    ended: str | None = None
    data_hash: str | None = None
    validation_hash: str | None = None
    model_hash: str | None = None
    reference_hash: str | None = None
    reward_hash: str | None = None
    micro_batch: str | None = None
    threads: int | None = None
    shares_prompts: bool | None = None

    def write(self, folder: Path) -> None:
        """Write progress.json into a checkpoint's folder."""
        path = folder / PROGRESS
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {**vars(self), "record": self.record.to_plain() if self.record else None}
        path.write_text(json.dumps(values, indent=1))

    @classmethod
    def read(cls, folder: Path) -> "Progress":
        """Read progress.json in a checkpoint's folder.

        Raise CheckpointError if it is not readable.
        """
        try:
            values = json.loads((folder / PROGRESS).read_text())
            values["record"] = StepRecord.from_plain(values["record"])
            # Ignore unknown keys: an earlier version may have written keys that are no longer used.
            return cls(**{key: values[key] for key in values.keys() & vars(cls()).keys()})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{folder.name} has no readable {PROGRESS}",
                where=folder,
                why=f"the file has no key {error}" if isinstance(error, KeyError) else str(error),
                fix=DELETE,
            ) from error


@dataclass(frozen=True)
class Start:
    """The way in which a run starts: from step 0, from a checkpoint, or not at all because it is
    finished.

    Attributes:
        checkpoint: folder of the checkpoint to resume from. None if the run begins at step 0.
        progress: progress in the checkpoint.
        finished: last step of the run if it is already finished, else None.
        previous_run: the recipe with which the checkpoint was written.
    """

    checkpoint: Path | None = None
    progress: Progress | None = None
    finished: int | None = None
    previous_run: Run | None = None

    @property
    def micro_batch(self) -> Size | None:
        """The micro batch in the checkpoint, or None if the checkpoint does not contain it."""
        if self.progress is None or not self.progress.micro_batch:
            return None
        return Size.parse(self.progress.micro_batch)


def validation_score(
    loss: float | None, accuracy: float | None, best_by: str
) -> list[float] | None:
    """Return the score of a validation. A lower score is better.

    If `best_by` is accuracy, a higher accuracy is better, and the loss decides if accuracies are
    equal. Return None if the loss is missing or not finite. Such a validation is worse than any
    validation with a score.
    """
    if loss is None or not math.isfinite(loss):
        return None
    if best_by == "accuracy" and accuracy is not None:
        return [-accuracy, loss]
    return [loss]


def decide_start(run: Run, ranks: Ranks = ONE_PROCESS) -> Start:
    """Decide from the run directories of all nodes how the run starts.

    This is a collective call.

    When the function returns, each node has the files of the checkpoint that all ranks read. The
    node of rank 0 also has the records, such as metrics.jsonl, and final/ if the run is finished.

    Raise RecipeError if the recipe of the earlier run cannot be read, or if it differs in a key
    that must not change.
    """
    output_dir = Path(run.output_dir)
    final_step: int | None = None
    previous_run: Run | None = None
    with ranks.raise_on_all_ranks():
        if ranks.is_run_dir_writer:
            final_step, previous_run = _earlier_run(run, output_dir)

    final_steps = ranks.all_gather_object(final_step)
    previous_runs = ranks.all_gather_object(previous_run)
    if not any(previous_runs):
        return Start()
    # If the nodes have final/ of different steps, use the latest step.
    final_step = max((step for step in final_steps if step is not None), default=None)

    newest = newest_checkpoint(output_dir, ranks)
    start = Start()
    if newest is not None:
        step, source = newest
        folder = output_dir / f"checkpoint-{step}"
        with ranks.raise_on_all_ranks():
            start = Start(folder, Progress.read(folder), previous_run=previous_runs[source])
    if final_step is not None:
        progress = start.progress
        # The run is finished only if the recipe still has the duration with which it ended. If the
        # recipe now has a longer duration, the run resumes.
        duration = str(run.train.duration)
        if progress is None or (progress.step, progress.ended) == (final_step, duration):
            source = final_steps.index(final_step)
            copy_folder(ranks, output_dir / FINAL, source, needs_files=ranks.is_main_process)
            return Start(finished=final_step)

    if start.checkpoint is None:
        log.info("there is no complete checkpoint: the run starts over")
    else:
        _copy_newest_records(output_dir, ranks)
    return start


def finished_step(run: Run) -> int | None:
    """Return the last step of the run in `run.output_dir`, or None if the run is not finished.

    This is for starts with one process, because it looks only at the directory on this node. The
    contents of checkpoints are compared with their checksums only if the run seems to be finished.
    Raise the same errors as `decide_start`.
    """
    output_dir = Path(run.output_dir)
    final_step, _ = _earlier_run(run, output_dir)
    if final_step is None:
        return None
    checkpoint = output_dir / f"checkpoint-{final_step}"
    if checkpoint.is_dir() and Progress.read(checkpoint).ended != str(run.train.duration):
        return None
    return decide_start(run).finished


def _earlier_run(run: Run, output_dir: Path) -> tuple[int | None, Run | None]:
    """Return the last step of the earlier run in a directory, from the manifest of final/, and the
    recipe of that run. A missing value is None.
    """
    restore(output_dir)
    final_step = last_step_of(output_dir / FINAL)
    if not copies_in(output_dir) and final_step is None:
        return None, None
    is_forced = run.checkpoint.resume == "force"
    recipe = output_dir / RECIPE
    try:
        previous_run = load_recipe(recipe, trusts_code=True)
    except TunesmithError as error:
        raise RecipeError(
            f"the recipe that this run started with cannot be read: {error.what}",
            where=error.where,
            why=error.why,
            fix=f"undo the change in {recipe}, or {START_OVER}",
        ) from error

    run = replace(run, model=restore_resolved_values(run.model, previous_run))
    if folder_in_run(previous_run.adapter.from_, run.adapter.from_):
        # The run started from an adapter in a folder, and `adapter.from` may now name the run
        # directory of this folder. Both names mean the same adapter, so use the earlier name.
        run = replace(run, adapter=replace(run.adapter, from_=previous_run.adapter.from_))

    refused = [change for change in differences(previous_run, run) if not change.allowed]
    if refused and not is_forced:
        raise RecipeError(
            "the recipe changed since this run started",
            where="\n         ".join(map(str, refused)),
            why=MIXED_RUNS_REASON,
            # Offer `checkpoint.resume=force` only if the run is not finished. A finished run has
            # nothing to resume.
            fix=f"{START_OVER}, {FORCE}" if final_step is None else START_OVER,
        )
    return final_step, previous_run


def restore_resolved_values(model: Model, previous_run: Run | None) -> Model:
    """Return the recipe's section `model`, with each `auto` replaced by the value that was chosen
    when the run began.
    """
    if previous_run is None:
        return model
    previous = previous_run.model
    dtype = previous.dtype if model.dtype == "auto" else model.dtype
    quantize = previous.quantize if model.quantize == "auto" else model.quantize
    return replace(model, dtype=dtype, quantize=quantize)


def _copy_newest_records(output_dir: Path, ranks: Ranks) -> None:
    """Copy files such as metrics.jsonl to the node of rank 0, if another node has newer versions.

    Only rank 0 writes these files, but in an earlier start rank 0 may have been on another node.
    This is a collective call.
    """
    sizes = {}
    with ranks.raise_on_all_ranks():
        # Look for files only if the ranks see different directories. If all ranks see the same
        # directory, there is nothing to copy.
        if ranks.is_run_dir_writer and any(ranks.run_dir_writers):
            paths = [output_dir / name for name in RECORDS]
            sizes = {path.name: path.stat().st_size for path in paths if path.is_file()}
    all_sizes = ranks.all_gather_object(sizes)

    # metrics.jsonl grows with every step, so the longest file has the latest step.
    lengths = [sizes_of_rank.get(METRICS, 0) for sizes_of_rank in all_sizes]
    # `index` returns the lowest rank with the longest file. If it is rank 0, nothing must be
    # copied.
    source = lengths.index(max(lengths))
    if source != 0:
        missing = [*all_sizes[source]] if ranks.is_main_process else []
        copy_files(ranks, output_dir, missing, {}, source=source)


def check_unchanged(start: Start, run: Run, hashes: Mapping[str, str | None]) -> None:
    """Raise ModelError or DataError if a hash differs from the hash in the checkpoint.

    Args:
        hashes: the hashes of the current inputs. The keys are names of fields of `Progress`.
    """
    if start.progress is None or run.checkpoint.resume == "force":
        return
    keys = {
        "model_hash": ("model.name", [run.model.name]),
        "reference_hash": ("adapter.from", [str(run.adapter.from_)]),
        "reward_hash": ("method.reward", [str(run.method.reward)]),
        "data_hash": ("data.train", [source.source for source in run.data.train]),
        "validation_hash": ("data.validation", [source.source for source in run.data.validation]),
    }

    for name, digest in hashes.items():
        previous = vars(start.progress)[name]
        if digest is None or previous in (None, digest):
            continue
        key, sources = keys[name]
        error: type[ModelError | DataError]
        if key.startswith("data."):
            changed = "rows, pictures, template or tokenizer"
            error = DataError
        elif key == "method.reward":
            changed = "scorers"
            error = DataError
        else:
            changed = "weights"
            error = ModelError
        raise error(
            f"the {changed} of {key} changed since this run started",
            where=f"{key}: {', '.join(sources)}",
            why=f"the hash is now {digest[:12]}, but the checkpoint has {previous[:12]}",
            fix=f"undo the change, or {START_OVER}, {FORCE}",
        )


@dataclass(frozen=True)
class Resumed:
    """The point from which a run resumes, and its duration.

    Attributes:
        step: number of steps that are done.
        end: the last step, or the duration if it is a time.
        duration, previous_duration: texts that include the number of steps.
        has_new_duration: whether the recipe's duration differs from the one before.
    """

    step: int
    checkpoint: Path
    end: str
    duration: str
    previous_duration: str
    has_new_duration: bool


def find_resumed(start: Start, run: Run, schedule: BatchSchedule) -> Resumed | None:
    """Return the point from which a run resumes. Return None if the run is new.

    Raise RecipeError if the duration is shorter than before, unless `checkpoint.resume` is `force`.
    """
    progress = start.progress
    if start.checkpoint is None or progress is None or start.previous_run is None:
        return None
    previous_train = start.previous_run.train
    previous_steps, previous_duration = _planned_steps(previous_train, schedule, progress)
    steps, duration = _planned_steps(run.train, schedule, progress)
    if steps < previous_steps and run.checkpoint.resume != "force":
        raise RecipeError(
            "train.duration is shorter than when the run started",
            where=f"train.duration: {previous_duration} -> {duration}",
            why=MIXED_RUNS_REASON,
            fix=f"set a longer train.duration, or {START_OVER}, {FORCE}",
        )
    return Resumed(
        progress.step,
        start.checkpoint,
        end=duration if run.train.duration.seconds else str(steps),
        duration=duration,
        previous_duration=previous_duration,
        has_new_duration=previous_train.duration != run.train.duration,
    )


def _planned_steps(train: Train, schedule: BatchSchedule, progress: Progress) -> tuple[int, str]:
    """Return the number of steps of the entire run that a `train` section of the recipe describes,
    and its duration as text.

    If the duration is given as time, the number of steps is estimated from the speed so far.
    """
    steps = schedule.steps(train.duration)
    text = str(train.duration)
    if steps is None:
        seconds = train.duration.seconds or 0.0
        steps = round(seconds * progress.step / max(progress.seconds, 1e-9))
        text += f" (about {count_of(steps, 'step')})"
    elif train.duration.unit != "steps":
        text += f" (= {count_of(steps, 'step')})"
    return steps, text
