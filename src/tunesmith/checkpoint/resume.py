"""The start in a run directory: it begins, resumes or finds a finished run.

And the state that a resume needs.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.checkpoint.claim import TRACKER_IDS, restore
from tunesmith.checkpoint.manifest import last_step_of
from tunesmith.checkpoint.replicate import bring_folder, copies_in, copy_files, newest_checkpoint
from tunesmith.checkpoint.start_adapter import folder_in_run
from tunesmith.config.dump import differences
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Model, Run, Train
from tunesmith.data.batches.schedule import BatchSchedule
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
DELETE = "delete that folder: the run resumes from the one before it; or start over with --fresh"
MIXED_RUNS_REASON = "resuming would mix two runs in one set of metrics"
FORCE = "or resume anyway with checkpoint.resume=force"
START_OVER = "start over with --fresh (the old run is moved aside), or use another output_dir"


@dataclass
class Progress:
    """The point that a run has reached: all that a resumed run needs beside tensors.

    The fields are the keys of progress.json. The hashes, `micro_batch` and `threads` are None in a
    checkpoint of an older version.

    Attributes:
        step: optimizer steps so far.
        seconds: training time so far, for durations by the clock.
        record: of the last step; None before the first.
        validated: whether the validation due at this step is complete.
        best_step, best_loss, best_accuracy: of the best validation so far.
        kept_step, kept_score: of the best validation so far whose step has a checkpoint, with its
            `validation_score`.
        worse: validations since the best one.
        loss_scale: fp16's.
        good_steps: since it last changed.
        ended: the duration that the run completed, as in its recipe; None before its end.
        data_hash: sha256 (hex) of the training examples, as tokens.
        validation_hash: of the held-out ones.
        model_hash: of the base's weights, see `weights_digest`.
        reference_hash: of the adapter that a method compares with; None: it compares with none.
        micro_batch: what one forward takes, such as `4096 tokens`.
        threads: that torch computes with on the host.
        shares_prompts: whether rows hold the prompt of a pair once; None: in an older version's
            they did not.
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
        """Read progress.json of a checkpoint's folder; CheckpointError if it is not readable."""
        try:
            values = json.loads((folder / PROGRESS).read_text())
            values["record"] = StepRecord.from_plain(values["record"])
            # A file of an earlier version may have keys that are not read any more.
            return cls(**{key: values[key] for key in values.keys() & vars(cls()).keys()})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{folder.name} has no readable {PROGRESS}",
                where=str(folder),
                why=f"it has no key {error}" if isinstance(error, KeyError) else str(error),
                fix=DELETE,
            ) from error


@dataclass(frozen=True)
class Start:
    """The way a run starts.

    Attributes:
        checkpoint: the folder where it resumes; None: it begins at step 0.
        progress: of the checkpoint.
        finished: the last step of a run that has nothing left to do.
        previous_run: the recipe that the checkpoint was written with.
    """

    checkpoint: Path | None = None
    progress: Progress | None = None
    finished: int | None = None
    previous_run: Run | None = None

    @property
    def micro_batch(self) -> Size | None:
        """The micro batch of the earlier start, where it was noted."""
        if self.progress is None or not self.progress.micro_batch:
            return None
        return Size.parse(self.progress.micro_batch)


def validation_score(
    loss: float | None, accuracy: float | None, best_by: str
) -> list[float] | None:
    """Score a validation: the lower of two is the better one, of equal accuracies by the loss; None
    for a loss that is none or not finite, which is worse than any.
    """
    if loss is None or not math.isfinite(loss):
        return None
    return [-accuracy, loss] if best_by == "accuracy" and accuracy is not None else [loss]


def decide_start(run: Run, ranks: Ranks = ONE_PROCESS) -> Start:
    """Decide from the run directory, or those of all nodes, how the run starts.

    A collective call. Afterwards each node has what all ranks read of the checkpoint, and rank 0's
    the records and final/ of a finished run. RecipeError where keys differ from the recipe of the
    checkpoints and may not, or that recipe cannot be read.
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
    # Nodes may have ended at other steps: the newest final/ counts.
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
        # A longer duration than the one that it completed goes on.
        duration = str(run.train.duration)
        if progress is None or (progress.step, progress.ended) == (final_step, duration):
            source = final_steps.index(final_step)
            bring_folder(ranks, output_dir / FINAL, source, wants=ranks.is_main_process)
            return Start(finished=final_step)
    if start.checkpoint is None:
        log.info("there is no complete checkpoint: the run starts over")
    else:
        _bring_records(output_dir, ranks)
    return start


def finished_step(run: Run) -> int | None:
    """The last step of a run of one process that has nothing left to do; raises as `decide_start`.

    The contents of checkpoints are compared only where the run seems to have ended.
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
    """The last step by final/, and the recipe of checkpoints, of one directory."""
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
    run = replace(run, model=as_it_began(run.model, previous_run))
    if folder_in_run(previous_run.adapter.from_, run.adapter.from_):
        # So does a run directory, for the folder in it that the run began with.
        run = replace(run, adapter=replace(run.adapter, from_=previous_run.adapter.from_))
    refused = [change for change in differences(previous_run, run) if not change.allowed]
    if refused and not is_forced:
        raise RecipeError(
            "the recipe changed since this run started",
            where="\n         ".join(map(str, refused)),
            why=MIXED_RUNS_REASON,
            # A finished run has nothing to resume.
            fix=f"{START_OVER}, {FORCE}" if final_step is None else START_OVER,
        )
    return final_step, previous_run


def as_it_began(model: Model, previous_run: Run | None) -> Model:
    """The recipe's `model` section; `auto` stands for what it stood for when the run began."""
    if previous_run is None:
        return model
    previous = previous_run.model
    dtype = previous.dtype if model.dtype == "auto" else model.dtype
    quantize = previous.quantize if model.quantize == "auto" else model.quantize
    return replace(model, dtype=dtype, quantize=quantize)


def _bring_records(output_dir: Path, ranks: Ranks) -> None:
    """Copy what only rank 0 writes to rank 0's node, where another one has more of it.

    A collective call.
    """
    sizes: dict[str, int] = {}
    with ranks.raise_on_all_ranks():
        # Where all see one directory there is nothing to copy.
        if ranks.is_run_dir_writer and any(ranks.run_dir_writers):
            paths = [output_dir / name for name in RECORDS]
            sizes = {path.name: path.stat().st_size for path in paths if path.is_file()}
    all_sizes = ranks.all_gather_object(sizes)
    # Each step is a line: the longest one goes furthest.
    lengths = [sizes_of_rank.get(METRICS, 0) for sizes_of_rank in all_sizes]
    # The lowest rank of those with as much: rank 0 where nothing is to be copied.
    source = lengths.index(max(lengths))
    if source != 0:
        missing = [*all_sizes[source]] if ranks.is_main_process else []
        copy_files(ranks, output_dir, missing, {}, source=source)


def check_unchanged(start: Start, run: Run, hashes: Mapping[str, str | None]) -> None:
    """ModelError or DataError where a hash is not the checkpoint's.

    hashes: by their names in `Progress`.
    """
    if start.progress is None or run.checkpoint.resume == "force":
        return
    keys = {
        "model_hash": ("model.name", [run.model.name]),
        "reference_hash": ("adapter.from", [str(run.adapter.from_)]),
        "data_hash": ("data.train", [source.source for source in run.data.train]),
        "validation_hash": ("data.validation", [source.source for source in run.data.validation]),
    }
    for name, digest in hashes.items():
        previous = vars(start.progress)[name]
        if digest is None or previous in (None, digest):
            continue
        key, sources = keys[name]
        is_data = key.startswith("data.")
        changed = "rows, pictures, template or tokenizer" if is_data else "weights"
        error: type[ModelError | DataError] = DataError if is_data else ModelError
        raise error(
            f"the {changed} of {key} changed since this run started",
            where=f"{key}: {', '.join(sources)}",
            why=f"the hash is {digest[:12]}, the checkpoint's is {previous[:12]}",
            fix=f"undo the change, or {START_OVER}, {FORCE}",
        )


def describe_resume(start: Start, run: Run, schedule: BatchSchedule) -> list[str]:
    """Lines for the user about a resumed run.

    From which step it goes on, and its new duration.
    RecipeError if the duration is shorter than it was, and `checkpoint.resume` is not `force`.
    """
    progress = start.progress
    if start.checkpoint is None or progress is None or start.previous_run is None:
        return []
    previous_train = start.previous_run.train
    previous_steps, previous_duration = _outlook(previous_train, schedule, progress)
    steps, duration = _outlook(run.train, schedule, progress)
    end = duration if run.train.duration.seconds else steps
    lines = [f"resuming from step {progress.step:,} of {end}, {start.checkpoint}"]
    is_other = previous_train.duration != run.train.duration
    if is_other:
        lines.append(f"train.duration: {previous_duration} -> {duration}")
    if steps < previous_steps and run.checkpoint.resume != "force":
        raise RecipeError(
            "the run would be shorter than at its start",
            where=lines[-1],
            why=MIXED_RUNS_REASON,
            fix=f"a longer train.duration, or {START_OVER}, {FORCE}",
        )
    if is_other and run.train.schedule != "constant":
        lines.append(f"the learning rate may jump: its schedule now spans {duration}")
    return lines


def _outlook(train: Train, schedule: BatchSchedule, progress: Progress) -> tuple[int, str]:
    """Return the steps of the whole run and its duration in words, by a `train` section.

    The steps of a run by the clock are those that it makes at the speed so far.
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
