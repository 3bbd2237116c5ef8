"""What a run directory holds, and what a start in it does: begin, go on, or say that it is finished."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.checkpoint.state import Checkpoint, list_checkpoints, newest_checkpoint, step_of, sweep
from tunesmith.config.dump import differences
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Run
from tunesmith.errors import CheckpointError, DataError, MachineError, RecipeError, TunesmithError, UsageError

PROGRESS = "state/progress.json"
OPTIMIZER = "state/optimizer.safetensors"
RECIPE = "config.yaml"
LOCK = ".lock"
DELETE = "delete that folder: the run goes on from the one before it; or start over with --fresh"


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
        data_hash: sha256 (hex) of the training examples, as tokens; None in a checkpoint of an older version.
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
    data_hash: str | None = None

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
                fix=DELETE,
            ) from error


START_OVER = "start over with --fresh (what lies there is put aside), or use another output_dir"


@dataclass(frozen=True)
class Start:
    """How a run begins: from nothing (`found` is None), from a checkpoint, or not at all (`finished`)."""

    found: Checkpoint | None = None
    progress: Progress | None = None
    finished: int | None = None


@contextlib.contextmanager
def claimed(output_dir: Path) -> Iterator[None]:
    """Make the run directory and hold it: a second run in it is refused while this one lives.

    Folders that were made here and that nothing was written into are taken away again.

    Raises:
        MachineError: if the folder cannot be made or written, or another run holds it.
    """
    made = missing(output_dir)
    lock = output_dir / LOCK
    handle = _held(output_dir, lock)
    try:
        yield
    finally:
        take_away(made)
        os.close(handle)


def missing(output_dir: Path) -> list[Path]:
    """The run directory and the folders above it, as far as they have to be made: the innermost first."""
    return [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]


def take_away(made: list[Path]) -> None:
    """Remove folders that a start made, if it wrote nothing into them: a start that is refused leaves no trace."""
    if made and made[0].is_dir() and [path.name for path in made[0].iterdir()] == [LOCK]:
        with contextlib.suppress(OSError):  # another start may be making the same folders at this moment
            (made[0] / LOCK).unlink()
            for folder in made:
                folder.rmdir()


def _held(output_dir: Path, lock: Path) -> int:
    """An open handle on the lock file, locked for this process."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
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
    if os.fstat(handle).st_nlink == 0:  # its holder took the empty folder away just now
        os.close(handle)
        return _held(output_dir, lock)
    return handle


def put_aside(output_dir: Path, inputs: Iterable[str] = ()) -> Path | None:
    """Move what an earlier run left to `<output_dir>.previous-<n>`, so that starting over loses nothing.

    Args:
        inputs: what the new run reads; a name of the Hub is no path and lies nowhere.

    Raises:
        UsageError: the folder holds more than a run: one of the inputs, or the working directory.
    """
    old = [p for p in output_dir.iterdir() if p.name != LOCK]
    if not old:
        return None
    here = output_dir.resolve()
    for path in (Path.cwd(), *map(Path, inputs)):
        if path.exists() and path.resolve().is_relative_to(here):
            raise UsageError(
                "output_dir holds more than a run, and starting over would move it away",
                where=str(output_dir),
                why=f"{path} lies in it",
                fix="use a folder of its own: output_dir=runs/my-run",
            )
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
        UsageError: if the checkpoints there are not those of a run whose recipe can be read.
    """
    output_dir = Path(run.output_dir)
    sweep(output_dir)
    if not list_checkpoints(output_dir) and step_of(output_dir / "final") is None:
        return Start()
    refused = [c for c in differences(_begun_with(output_dir), run) if not c.allowed]
    if refused and run.checkpoint.resume != "force":
        raise RecipeError(
            "the recipe differs from the one that this run began with",
            where="\n         ".join(map(str, refused)),
            why="going on would mix two runs in one set of numbers",
            fix=f"{START_OVER}, or go on all the same with checkpoint.resume=force",
        )
    final = step_of(output_dir / "final")
    found = newest_checkpoint(output_dir, warn)
    if found is None:
        if final is not None:
            return Start(finished=final)
        warn("no checkpoint is whole: the run starts over")
        return Start()
    progress = Progress.read(found.path)
    if final == found.step and progress.ended == str(run.train.duration):
        return Start(finished=final)
    return Start(found, progress)


def _begun_with(output_dir: Path) -> Run:
    """The recipe that the checkpoints of a run directory were written with.

    Without it nothing says what they are: they may be another program's, and must neither be gone on from nor pruned.
    """
    recipe = output_dir / RECIPE
    if not recipe.is_file():
        names = [f.path.name for f in list_checkpoints(output_dir)] or ["final"]
        raise UsageError(
            f"output_dir holds {', '.join(names[:5])}, and no {RECIPE} that says which run they belong to",
            where=str(output_dir),
            why="they may be another program's, or the recipe was deleted",
            fix=START_OVER,
        )
    try:
        return load_recipe(recipe)
    except TunesmithError as error:
        raise RecipeError(
            f"the recipe that this run began with cannot be read: {error.what}",
            where=error.where,
            why=error.why,
            fix=f"undo what was changed in {recipe}, or {START_OVER}",
        ) from error


def check_data(start: Start, run: Run, digest: str) -> None:
    """Refuse to go on with training examples that are not those that the run began with.

    Args:
        digest: sha256 (hex) of the training examples, as tokens.

    Raises:
        DataError: they differ, and `checkpoint.resume` is not force.
    """
    before = start.progress.data_hash if start.progress else None
    if before in (None, digest) or run.checkpoint.resume == "force":
        return
    raise DataError(
        "the training data is not what this run began with",
        where=f"data.train: {', '.join(source.source for source in run.data.train)}",
        why=f"its tokens have the hash {digest[:12]}, those of the checkpoint {before[:12] if before else ''}: rows, the "
        "template or the tokenizer were changed",
        fix=f"undo the change, or {START_OVER}, or go on all the same with checkpoint.resume=force",
    )
