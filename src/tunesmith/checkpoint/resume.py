"""How a start in a run directory begins, resumes or finds a finished run, and the state that a resume needs."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.checkpoint.claim import TRACKER_IDS, restore
from tunesmith.checkpoint.manifest import SavedCheckpoint, step_of
from tunesmith.checkpoint.replicate import bring_folder, copies_in, copy_files, newest_checkpoint
from tunesmith.config.dump import differences, is_free
from tunesmith.config.load import load_recipe
from tunesmith.config.removed import REMOVED
from tunesmith.config.schema import Run, Train
from tunesmith.data.schedule import BatchSchedule
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import (
    CheckpointError,
    DataError,
    ModelError,
    RecipeError,
    RemovedError,
    TunesmithError,
)
from tunesmith.metrics.record import StepRecord
from tunesmith.optim.lr_schedule import scheduled_rate
from tunesmith.run_dir import BEST, FINAL, METRICS, RECIPE, SAMPLES
from tunesmith.units import Size

PROGRESS = "state/progress.json"
OPTIMIZER = "state/optimizer.safetensors"
RECORDS = (METRICS, SAMPLES, BEST, *TRACKER_IDS)
DELETE = "delete that folder: the run resumes from the one before it; or start over with --fresh"
JUMP = 0.01  # of the peak learning rate: a larger change of the schedule is told
MIXED = "resuming would mix two runs in one set of numbers"
COUNTER = "counter"  # `Progress.rounding`: noise by the index of an element
FORCE = "or resume all the same with checkpoint.resume=force"
START_OVER = "start over with --fresh (the old run is put aside), or use another output_dir"


@dataclass
class Progress:
    """Where a run stands: all that a resumed run needs beside tensors. The fields are the keys of progress.json.

    The hashes, `micro_batch` and `threads` are None in a checkpoint of an older version.
    """

    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # training time so far, for durations by the clock
    record: StepRecord | None = None  # of the last step; None before the first
    validated: bool = True  # whether the validation due at this step is done
    best_step: int | None = None  # of the best validation so far
    best_loss: float | None = None
    worse: int = 0  # validations since the best one
    loss_scale: float | None = None  # fp16's
    good_steps: int = 0  # since it last changed
    ended: str | None = (
        None  # the duration that the run completed, as in its recipe; None before its end
    )
    data_hash: str | None = None  # sha256 (hex) of the training examples, as tokens
    validation_hash: str | None = None  # of the held-out ones
    model_hash: str | None = None  # of the base's weights, see `weights_digest`
    micro_batch: str | None = None  # what one forward takes, such as `4096 tokens`
    threads: int | None = None  # that torch computes with on the host
    rounding: str | None = (
        None  # how stochastic rounding gets its noise; None: there is none, or drawn by a generator
    )

    def write(self, folder: Path) -> None:
        """Write progress.json into a checkpoint's folder."""
        path = folder / PROGRESS
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {**vars(self), "record": self.record.to_plain() if self.record else None}
        path.write_text(json.dumps(values, indent=1))

    @classmethod
    def read(cls, folder: Path) -> "Progress":
        """Read progress.json of a checkpoint's folder; CheckpointError if that cannot be done."""
        try:
            values = json.loads((folder / PROGRESS).read_text())
            return cls(**{**values, "record": StepRecord.from_plain(values["record"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            why = f"it has no key {error}" if isinstance(error, KeyError) else str(error)
            what = f"{folder.name} has no readable {PROGRESS}"
            raise CheckpointError(what, where=str(folder), why=why, fix=DELETE) from error


@dataclass(frozen=True)
class Start:
    """How a run starts: at step 0 (`found` is None), from a checkpoint, or not at all (`finished`: its last step).

    `before` is the recipe that the checkpoint was written with.
    """

    found: SavedCheckpoint | None = None
    progress: Progress | None = None
    finished: int | None = None
    before: Run | None = None

    @property
    def micro_batch(self) -> Size | None:
        """What one forward took before, where it is known."""
        return (
            Size.parse(self.progress.micro_batch)
            if self.progress and self.progress.micro_batch
            else None
        )


def decide_start(run: Run, ranks: Ranks = ONE_PROCESS, *, warn: Callable[[str], None]) -> Start:
    """Decide from the run directory, or from those of all nodes, how the run starts; a collective call.

    Afterwards each node has what all ranks read of the checkpoint, and rank 0's the records and final/ of a finished run.
    RecipeError where keys differ from the recipe of the checkpoints and may not, or that recipe cannot be read.
    """
    output_dir = Path(run.output_dir)
    with ranks.together():
        final, before = _earlier_run(run, output_dir) if ranks.leads_dir else (None, None)
    finals, recipes = ranks.gather(final), ranks.gather(before)
    if not any(recipes):
        return Start()
    final = max((step for step in finals if step is not None), default=None)
    found, progress = newest_checkpoint(output_dir, warn, ranks), None
    if found is not None:
        with ranks.together():
            progress = Progress.read(found.path)
    ended = (
        progress is not None
        and progress.step == final
        and progress.ended == str(run.train.duration)
    )
    if final is not None and (ended or found is None):
        bring_folder(ranks, output_dir / FINAL, finals.index(final), wants=ranks.leads, say=warn)
        return Start(finished=final)
    if found is None:
        warn("no checkpoint is complete: the run starts over")
        return Start()
    _bring_records(output_dir, ranks, warn)
    return Start(found, progress, before=recipes[found.source])


def _earlier_run(run: Run, output_dir: Path) -> tuple[int | None, Run | None]:
    """The step of final/, and the recipe of checkpoints, of one directory."""
    restore(output_dir)
    final = step_of(output_dir / FINAL)
    if not copies_in(output_dir) and final is None:
        return None, None
    before = _recipe_of(output_dir, forced=run.checkpoint.resume == "force")
    refused = [c for c in differences(before, run) if not c.allowed]
    if refused and run.checkpoint.resume != "force":
        what, where = (
            "the recipe differs from the one that this run began with",
            "\n         ".join(map(str, refused)),
        )
        raise RecipeError(what, where=where, why=MIXED, fix=f"{START_OVER}, {FORCE}")
    return final, before


def _bring_records(output_dir: Path, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Copy what only rank 0 writes to rank 0's node, where another one has more of it; a collective call."""
    with ranks.together():
        own = (
            [path for name in RECORDS if (path := output_dir / name).is_file()]
            if any(ranks.dir_leaders)
            else []
        )
        sizes = [(path.name, path.stat().st_size) for path in own if ranks.leads_dir]
    every = ranks.gather(dict(sizes))
    # Each step is a line: the longest one goes furthest
    records = [files.get(RECORDS[0], 0) for files in every]
    if (source := records.index(max(records))) != 0:
        copy_files(
            ranks, output_dir, [*every[source]] if ranks.leads else [], {}, say=say, source=source
        )


def _recipe_of(output_dir: Path, *, forced: bool) -> Run:
    """The recipe that the checkpoints were written with, without which they are neither resumed from nor deleted.

    What changed nothing that was learned is ignored where it was removed since, and with `forced` a removed base too.
    """
    recipe = output_dir / RECIPE
    ignored = [key for key in REMOVED if forced or is_free(key)]
    try:
        return load_recipe(recipe, ignored=ignored)
    except RemovedError as error:
        raise RecipeError(
            error.what, where=error.where, why=error.why, fix=f"{START_OVER}, {FORCE}"
        ) from error
    except TunesmithError as error:
        what, fix = (
            f"the recipe that this run began with cannot be read: {error.what}",
            f"undo the change in {recipe}",
        )
        raise RecipeError(
            what, where=error.where, why=error.why, fix=f"{fix}, or {START_OVER}"
        ) from error


def check_unchanged(start: Start, run: Run, hashes: Mapping[str, str | None]) -> None:
    """ModelError or DataError where one of the hashes, by their names in `Progress`, is not the checkpoint's."""
    known = vars(start.progress) if start.progress and run.checkpoint.resume != "force" else {}
    parts = {
        "model_hash": ("base model", "model.name", (run.model.name,)),
        "data_hash": ("training data", "data.train", [s.source for s in run.data.train]),
        "validation_hash": (
            "validation data",
            "data.validation",
            [s.source for s in run.data.validation],
        ),
    }
    for name, now in hashes.items():
        before, (what, key, names) = known.get(name), parts[name]
        if now is None or before in (None, now):
            continue
        kind, how = (
            (ModelError, "weights")
            if name == "model_hash"
            else (DataError, "rows, template or tokenizer")
        )
        why = f"its hash is {now[:12]}, the checkpoint's is {str(before)[:12]}: {how} were changed"
        what, fix = (
            f"the {what} is not what this run began with",
            f"undo the change, or {START_OVER}, {FORCE}",
        )
        raise kind(what, where=f"{key}: {', '.join(names)}", why=why, fix=fix)


def describe_resume(start: Start, run: Run, schedule: BatchSchedule) -> list[str]:
    """Lines for the user: from which step the run goes on, its new duration, and what that does to the learning rate.

    RecipeError if the duration is shorter than before, and `checkpoint.resume` is not `force`.
    """
    if not (start.found and start.progress and start.before):
        return []
    old, new, done = start.before.train, run.train, start.progress
    (before, was, planned), (after, now, rate) = (
        _outlook(train, schedule, done) for train in (old, new)
    )
    lines = [
        f"resuming from step {done.step:,} of {now if new.duration.seconds else after}, {start.found.path}"
    ]
    if old.duration != new.duration:
        lines.append(f"train.duration: {was} -> {now}")
    if after < before and run.checkpoint.resume != "force":
        what, fix = (
            "the run would be shorter than it began",
            f"a longer train.duration, or {START_OVER}, {FORCE}",
        )
        raise RecipeError(what, where=lines[-1], why=MIXED, fix=fix)
    if done.record and done.step < after and abs(rate - planned) > JUMP * new.learning_rate:
        jump = f"{done.record.learning_rate:.2e} to {rate:.2e}"
        lines.append(f"the learning rate jumps from {jump}: its schedule now spans {now}")
    return lines


def _outlook(train: Train, schedule: BatchSchedule, done: Progress) -> tuple[int, str, float]:
    """The steps of a whole run (of one by the clock, at the speed so far), its duration in words, and the learning rate
    of the step after `done`."""
    total, unit = schedule.steps(train.duration), train.duration.unit
    steps = total or round((train.duration.seconds or 0.0) * done.step / max(done.seconds, 1e-9))
    text = (
        f"{train.duration}"
        if unit == "steps"
        else f"{train.duration} ({'=' if total else 'about'} {steps:,} steps)"
    )
    per_epoch = schedule.steps_per_epoch(0)
    rate = scheduled_rate(
        train, done.step, total=total, steps_per_epoch=per_epoch, seconds=done.seconds
    )
    return steps, text, rate
