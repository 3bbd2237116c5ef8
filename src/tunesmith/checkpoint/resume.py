"""How a start in a run directory begins, resumes or finds a finished run, and the state that a resume needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunesmith.checkpoint.run_dir import RECIPE, restore
from tunesmith.checkpoint.state import SavedCheckpoint, list_checkpoints, newest_checkpoint, step_of
from tunesmith.config.dump import differences
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Run
from tunesmith.errors import CheckpointError, DataError, RecipeError, TunesmithError, UsageError
from tunesmith.metrics.record import StepRecord

PROGRESS = "state/progress.json"
OPTIMIZER = "state/optimizer.safetensors"
DELETE = "delete that folder: the run resumes from the one before it; or start over with --fresh"
START_OVER = "start over with --fresh (the old run is put aside), or use another output_dir"


@dataclass
class Progress:
    """Where a run stands: all that a resumed run needs beside tensors. The fields are the keys of progress.json.

    Attributes:
        step: optimizer steps done.
        seconds: training time so far, for durations by the clock.
        record: of the last step; None before the first.
        validated: whether the validation due at this step is done.
        best_step, best_loss: of the best validation so far.
        worse: validations since the best one.
        loss_scale, good_steps: fp16's loss scale, and steps since it last changed.
        ended: the duration that the run completed, as in its recipe; None before its end.
        data_hash: sha256 (hex) of the training examples, as tokens; None in a checkpoint of an older version.
    """

    step: int = 0
    seconds: float = 0.0
    record: StepRecord | None = None
    validated: bool = True
    best_step: int | None = None
    best_loss: float | None = None
    worse: int = 0
    loss_scale: float | None = None
    good_steps: int = 0
    ended: str | None = None
    data_hash: str | None = None

    def write(self, folder: Path) -> None:
        """Write progress.json into a checkpoint's folder."""
        path = folder / PROGRESS
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {**vars(self), "record": self.record.to_plain() if self.record else None}
        path.write_text(json.dumps(values, indent=1))

    @classmethod
    def read(cls, folder: Path) -> Progress:
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
    """How a run starts: at step 0 (`found` is None), from a checkpoint, or not at all (`finished`: its last step)."""

    found: SavedCheckpoint | None = None
    progress: Progress | None = None
    finished: int | None = None


def decide_start(run: Run, *, warn: Callable[[str], None]) -> Start:
    """Decide from the run directory how the run starts.

    Raises:
        RecipeError: keys differ from the recipe that the checkpoints were written with, and may not.
        UsageError: there are checkpoints without a readable recipe.
    """
    output_dir = Path(run.output_dir)
    restore(output_dir)
    if not list_checkpoints(output_dir) and step_of(output_dir / "final") is None:
        return Start()
    refused = [c for c in differences(_recipe_of(output_dir), run) if not c.allowed]
    if refused and run.checkpoint.resume != "force":
        raise RecipeError(
            "the recipe differs from the one that this run began with",
            where="\n         ".join(map(str, refused)),
            why="resuming would mix two runs in one set of numbers",
            fix=f"{START_OVER}, or resume all the same with checkpoint.resume=force",
        )
    final = step_of(output_dir / "final")
    found = newest_checkpoint(output_dir, warn)
    if found is None:
        if final is not None:
            return Start(finished=final)
        warn("no checkpoint is complete: the run starts over")
        return Start()
    progress = Progress.read(found.path)
    if final == found.step and progress.ended == str(run.train.duration):
        return Start(finished=final)
    return Start(found, progress)


def _recipe_of(output_dir: Path) -> Run:
    """The recipe that the checkpoints were written with, without which they are neither resumed from nor deleted."""
    recipe = output_dir / RECIPE
    if not recipe.is_file():
        names = [f.path.name for f in list_checkpoints(output_dir)] or ["final"]
        raise UsageError(
            f"output_dir holds {', '.join(names[:5])}, but no {RECIPE} of the run that wrote it",
            where=str(output_dir),
            why="it may be another program's, or the recipe was deleted",
            fix=START_OVER,
        )
    try:
        return load_recipe(recipe)
    except TunesmithError as error:
        raise RecipeError(
            f"the recipe that this run began with cannot be read: {error.what}",
            where=error.where,
            why=error.why,
            fix=f"undo the change in {recipe}, or {START_OVER}",
        ) from error


def check_data(start: Start, run: Run, digest: str) -> None:
    """DataError if the training examples, whose tokens have this sha256 (hex), are not those that the run began with."""
    before = start.progress.data_hash if start.progress else None
    if before in (None, digest) or run.checkpoint.resume == "force":
        return
    raise DataError(
        "the training data is not what this run began with",
        where=f"data.train: {', '.join(source.source for source in run.data.train)}",
        why=f"its tokens have the hash {digest[:12]}, the checkpoint's have {before[:12] if before else ''}: the rows, the "
        "template or the tokenizer were changed",
        fix=f"undo the change, or {START_OVER}, or resume all the same with checkpoint.resume=force",
    )
