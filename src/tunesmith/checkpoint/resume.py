"""What a run directory holds, and what a start in it does: begin, go on, or say that it is finished."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.checkpoint.state import Found, listing, newest, step_of, sweep
from tunesmith.config.dump import differences
from tunesmith.config.load import load
from tunesmith.config.schema import Run
from tunesmith.errors import CheckpointError, MachineError, RecipeError

PROGRESS = "state/progress.json"
OPTIMIZER = "state/optimizer.safetensors"
RECIPE = "config.yaml"


@dataclass(frozen=True)
class Progress:
    """Everything beside tensors that a resumed run needs.

    Attributes:
        step: optimizer steps done.
        seconds: training time behind them, for durations by the clock.
        record: the last step's record, as written to metrics.jsonl.
        validated: whether the validation due at this step was done before the checkpoint was written.
        best_step, best_loss: the best validation so far.
        worse: validations since the best one.
        loss_scale, good_steps: fp16's loss scale.
        ended: the duration that the run came to the end of, as written in its recipe; None on the way.
    """

    step: int
    seconds: float
    record: dict[str, Any]
    validated: bool
    best_step: int | None = None
    best_loss: float | None = None
    worse: int = 0
    loss_scale: float | None = None
    good_steps: int = 0
    ended: str | None = None

    def write(self, folder: Path) -> None:
        """Write progress.json into a checkpoint's folder."""
        path = folder / PROGRESS
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> Progress:
        """Read progress.json of a checkpoint's folder; CheckpointError if it is none of ours."""
        try:
            return cls(**json.loads((folder / PROGRESS).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{folder.name} has no readable {PROGRESS}",
                where=str(folder),
                why=str(error),
                fix="delete that folder: the run goes on from the one before it; or start over with --fresh",
            ) from error


@dataclass(frozen=True)
class Start:
    """How a run begins: from nothing (`found` is None), from a checkpoint, or not at all (`finished`)."""

    found: Found | None = None
    progress: Progress | None = None
    finished: int | None = None


@contextmanager
def claimed(output_dir: Path) -> Iterator[None]:
    """Make the run directory and hold it: a second run in it is refused while this one lives.

    Raises:
        MachineError: if the folder cannot be made or written, or another run holds it.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(output_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise MachineError(
            f"the run directory cannot be written: {error.strerror}",
            where=str(output_dir),
            why="output_dir must be a folder that you may write to",
            fix="choose another one: output_dir=runs/my-run",
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise MachineError(
            "another run is writing to this run directory",
            where=str(output_dir),
            why="two runs in one folder would overwrite each other's checkpoints",
            fix="wait for it, stop it, or choose another folder: output_dir=runs/my-run",
        ) from error
    try:
        yield
    finally:
        os.close(handle)


def put_aside(output_dir: Path) -> Path | None:
    """Move what an earlier run left to `<output_dir>.previous-<n>`, so that starting over loses nothing."""
    old = [p for p in output_dir.iterdir() if p.name != ".lock"]
    if not old:
        return None
    number = 1
    while (place := output_dir.with_name(f"{output_dir.name}.previous-{number}")).exists():
        number += 1
    place.mkdir()
    for path in old:
        path.rename(place / path.name)
    return place


def decide(run: Run, *, warn: Callable[[str], None]) -> Start:
    """Look at the run directory and say how the run starts.

    Raises:
        RecipeError: if keys differ from the recipe that the checkpoints were written with, and may not.
    """
    output_dir = Path(run.output_dir)
    sweep(output_dir)
    recipe = output_dir / RECIPE
    if not listing(output_dir) and step_of(output_dir / "final") is None:
        return Start()
    if recipe.is_file():
        changes = differences(load(recipe), run)
        refused = [c for c in changes if not c.allowed]
        if refused and run.checkpoint.resume != "force":
            raise RecipeError(
                "the recipe differs from the one that this run began with",
                where="\n         ".join(f"{c.key}: {c.old} -> {c.new}" for c in refused),
                why="going on would mix two runs in one set of numbers",
                fix="start over with --fresh (the old run is put aside), use another output_dir, "
                "or go on all the same with checkpoint.resume=force",
            )
    final = step_of(output_dir / "final")
    found = newest(output_dir, warn)
    if found is None:
        if final is not None:
            return Start(finished=final)
        warn("no checkpoint is whole: the run starts over")
        return Start()
    progress = Progress.read(found.path)
    if final == found.step and progress.ended == str(run.train.duration):
        return Start(finished=final)
    return Start(found, progress)
