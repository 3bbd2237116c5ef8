"""Names and checked readers of the files in a run directory.

Every part of tunesmith that shows, compares or continues a run reads the small files of the run
with this module. The files may be incomplete (the run was killed, or only partly copied), edited by
hand or written by another version, so their types are checked:

    open_regular  refuses pipes and devices, because reading them may block forever
    parse_json    refuses NaN, lone surrogates and very deep nesting
    read_*        return the content, or a text that says why it cannot be used

A missing file is not an error, because a run writes most files late or never. The types of the
metrics records are in `metrics/record.py`.
"""

import json
import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    BinaryIO,
    Generic,
    NamedTuple,
    NotRequired,
    TypeVar,
    cast,
)

from annotated_types import Ge, Len
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from tunesmith.config import schema
from tunesmith.config.load import load_recipe
from tunesmith.config.names import keys
from tunesmith.config.schema import Run
from tunesmith.config.trust import RUN_RECIPE
from tunesmith.config.yaml_file import read_file
from tunesmith.errors import RecipeError, TunesmithError, UsageError
from tunesmith.host.files import find_similar_path, relative_to_cwd
from tunesmith.units import Length

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Fields = dict[str, Any]  # content of a JSON or YAML file with unchecked values

RECIPE = RUN_RECIPE
IDENTITY = "env.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
ROLLOUTS = "rollouts"  # folder of sampled answers, one file per step
NO_FINAL_ANSWERS = "no sample answers of the final weights: "  # prefix of a line in log.txt
HELD_OUT = "held-out.txt"  # the held-out rows, one per line: `file:line  start of the row`
LOG = "log.txt"
FAILURE = "failure.json"
STOPPED = "stopped.json"  # exists if the run was stopped, with the reason
RUNNING = "running.json"  # exists while a process is training, and after it was killed
BEST = "best.json"
LOCK = ".lock"
STOP_FILE = "stop"  # creating this file asks the run to save and end
FINAL = "final"
TENSORBOARD = "tensorboard"
PROFILE = "profile"
MANIFEST = "manifest.json"  # in final/ and in each checkpoint
SWEEP = "sweep.json"
EVALS = "evals"  # folder of the answers and scores of `eval`
SCORES = "*.scores.json"  # the files with scores in EVALS
# Name of a score. The score is the fraction of pairs whose chosen answer has a higher probability
# than the rejected answer.
PAIRS = "pairs in order"


class RunState(StrEnum):
    """The state of a run, as `status`, `watch`, `report` and their JSON show it."""

    QUEUED = "queued"  # waiting for a node or a container
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"  # by a request or because of low memory; the same command resumes
    FAILED = "failed"  # by an error, which is in failure.json
    KILLED = "killed"  # no process is running, and no file says how it ended
    UNKNOWN = "unknown"  # the run directory cannot be read from this machine


class Phase(StrEnum):
    """The current phase of a run, as shown in the progress bar, failure.json and stopped.json."""

    JOINING = "joining the ranks"
    START = "start"
    LOADING = "loading the model"
    REFERENCE = "reference"  # computing the reference's log probabilities of the answers
    COMPARING = "comparing the base in 8 bits with bf16"
    FIRST_STEP = "first step"
    TRAINING = "training"
    VALIDATION = "validation"
    SAMPLES = "sample answers"
    SAVING = "saving"
    SAVING_FINAL = "saving final/"
    END = "end"


_SURROGATE = re.compile("[\ud800-\udfff]")


class Part(NamedTuple, Generic[T_co]):
    """The valid part of a file.

    Attributes:
        value: the valid content.
        fault: the problem with the file, or "".
        lines: the number of skipped lines, for a file with one record per line.
    """

    value: T_co
    fault: str = ""
    lines: int | None = None


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Symbolic links are followed.

    Raise OSError for a pipe or a device. The type is checked before the file is opened, because
    opening a pipe waits for a writer. O_NONBLOCK avoids this wait if a pipe replaces the file after
    the check.
    """
    _check_regular(path.stat().st_mode, path)
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(os.fstat(handle).st_mode, path)
        return os.fdopen(handle, "rb")
    except OSError:
        os.close(handle)
        raise


def _check_regular(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(0, "the path is not a regular file", str(path))


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file. Raise OSError as `open_regular` does."""
    with open_regular(path) as file:
        return file.read()


def shown(path: str | Path) -> str:
    """Return a path as valid Unicode text. Bytes that are not UTF-8 are replaced."""
    return os.fsencode(path).decode(errors="replace")


def suggest_run(path: Path) -> str:
    """Return the fix for a path that is not a run. The fix names a similar folder, if any."""
    near = None if path.is_dir() else find_similar_path(path)
    if near and near.is_dir():
        return f"did you mean {relative_to_cwd(near)}?"
    return "use the output_dir of a run"


def parse_json(text: str | bytes) -> object:
    """Parse a JSON text. Raise ValueError if it is not strict JSON."""
    from pydantic_core import from_json

    value: object = from_json(text, allow_inf_nan=False)
    return value


Count = Annotated[int, Ge(0)]
Interval = Annotated[list[float], Len(3, 3)]  # mean, lower and upper end of the interval


def form_fault(value: object, form: object) -> str:
    """Return why a value does not have the type `form`, or "" if it does. pydantic checks it."""
    from pydantic import ValidationError

    try:
        _validator(form).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part)[:80] for part in first["loc"])
        return f"{place}: {first['msg']}" if place else first["msg"]
    return ""


@cache
def _validator(form: Any) -> "TypeAdapter[object]":
    from pydantic import TypeAdapter

    return TypeAdapter(form)


def read_object(path: Path, form: type[T]) -> T:
    """Read a JSON file with an object of the type `form`. Additional keys are kept.

    Raise OSError if the file cannot be read, and ValueError if its content has another type.
    """
    return parse_object(read_bytes(path), form)


def parse_object(content: bytes, form: type[T]) -> T:
    """Parse a JSON text with an object of the type `form`. Raise ValueError for another text."""
    values = parse_json(content)
    fault = form_fault(values, form)
    if fault:
        raise ValueError(fault)
    return cast("T", values)


def read_part(path: Path, read: Callable[[Path], T]) -> Part[T | None]:
    """Read a file of a run with the function `read`.

    The value is None if the file does not exist or is damaged. For a damaged file, `fault` has the
    reason.
    """
    try:
        return Part(read(path))
    except FileNotFoundError:
        return Part(None)
    except (OSError, ValueError) as error:
        return Part(None, reason_of(error))


def reason_of(error: OSError | ValueError) -> str:
    """Return why a file could not be read, in words."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)


class Environment(TypedDict, total=False):
    """Values of env.json that are read again. Further values are only shown."""

    command: list[str] | None
    commit: str | None
    data_hash: str | None
    validation_hash: str | None
    model_hash: str | None
    validation_examples: Count


class Failure(TypedDict, total=False):
    """Content of failure.json: the error that ended the run, with its rank and phase."""

    what: str
    where: str | None
    why: str | None
    cause: str | None
    rank: Count | None
    host: str | None
    phase: str | None
    collective: str | None
    last_step: Count | None
    next: str | None


class Stopped(TypedDict, total=False):
    """Content of stopped.json: the reason of the stop, and the saved step."""

    signal: str | None
    reason: str
    step: Count | None
    what: str
    figures: dict[str, object] | None


class RunningNote(TypedDict):
    """Content of running.json: the process that is training, or that was killed."""

    host: str
    boot: str
    began: str
    process: Count
    oom_kills: Count


def read_env(folder: Path) -> Part[Fields]:
    """Read env.json. The value is an empty dict if the file does not exist."""
    values, fault, _ = read_part(folder / IDENTITY, partial(read_object, form=Environment))
    return Part(cast("Fields", values or {}), fault)


def held_out_hash(folder: Path) -> str | None:
    """Return the hash of a run's held-out rows from env.json, or None if there is no such hash.

    Raise UsageError if env.json is damaged, because other rows must not be taken for the held-out
    rows.
    """
    values, fault, _ = read_env(folder)
    validation_hash: str | None = values.get("validation_hash")
    if fault and validation_hash is None:
        raise UsageError(
            "env.json is damaged, so the run's held-out rows are unknown",
            where=folder / IDENTITY,
            why=fault,
            fix="copy the run directory again from the machine that trained it, "
            "or give the rows with `tunesmith eval RUN --data FILE`",
        )
    return validation_hash


def read_failure(folder: Path) -> Part[Failure | None]:
    return read_part(folder / FAILURE, partial(read_object, form=Failure))


def read_stopped(folder: Path) -> Part[Stopped | None]:
    return read_part(folder / STOPPED, partial(read_object, form=Stopped))


def ended_state(
    recorded: float | None,
    failure: Failure | None,
    stopped: Stopped | None,
    final: "Manifest | None",
) -> tuple[RunState, int]:
    """Return the state and the number of steps of a run that has no running process.

    The number of steps is taken from the newest record. If the run was stopped, stopped.json may
    have a later step, because the record of a step is missing if its validation was interrupted.
    The resumed run measures the validation again and then writes the record.

    Args:
        recorded: the step of the newest record.
        failure, stopped: the content of failure.json and stopped.json of the last start.
        final: the manifest of final/, which may be from an earlier, shorter run.
    """
    step = int(recorded or 0)
    if failure is not None:
        return RunState.FAILED, step
    if stopped is not None:
        return RunState.STOPPED, max(step, stopped.get("step") or 0)
    if final is not None and final["last_step"] >= step:
        return RunState.FINISHED, step
    return RunState.KILLED, step


def read_running(folder: Path) -> RunningNote | None:
    """Read running.json. Return None if it does not exist or is incomplete."""
    return read_part(folder / RUNNING, partial(read_object, form=RunningNote)).value


def read_recipe(path: Path) -> Part[Fields]:
    """Read the config.yaml of a run directory, or another recipe, as plain values.

    The value is an empty dict if the file does not exist, or if a section has a wrong type. The
    values are not checked against the schema, because the run may be from another version of
    tunesmith.
    """
    if path.is_dir():
        path = path / RECIPE
    try:
        # Refuse a pipe or a device here, because `read_file` would block when it opens one.
        open_regular(path).close()
        values: Fields = read_file(path).values
    except FileNotFoundError:
        return Part({})
    except OSError as error:
        return Part({}, reason_of(error))
    except RecipeError as error:
        return Part({}, error.why or error.what)
    # Refuse a lone half of a surrogate pair, because it cannot be encoded in a file or a page.
    if _SURROGATE.search(json.dumps(values, ensure_ascii=False)):
        return Part({}, "the file contains invalid Unicode")
    for name, form in _SECTION_FORMS.items():
        if name in values and form_fault(values[name], form):
            return Part({}, f"the section {name} has a wrong type")
    return Part(values)


def share_done(recipe: Fields, steps: float, epochs: float, seconds: float = 0.0) -> float | None:
    """Compute the completed fraction of a run's duration, from 0 to 1.

    Return None before the first step, and if there is no recipe or no valid duration.
    """
    try:
        duration = Length.parse(recipe["train"]["duration"])
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
    return duration.share(steps=steps, epochs=epochs, seconds=seconds)


_SECTION_FORMS = {
    name: dict[str, object]
    for name, (_, hint) in keys().items()
    if "." not in name and schema.is_section(hint)
} | {"method": str | dict[str, object]}  # a method without parameters is written as its name


def with_earlier_runs(run: Run) -> tuple[list[Run], str]:
    """Return the recipes of a run and of all runs that it continues, and a text about missing
    recipes.

    A run continues another run if its `adapter.from` or its model is the output of the other run.
    The origin of adapters and models on the Hub is not checked.
    """
    runs = [run]
    fault = ""
    for later in runs:  # the list grows during the loop
        model = later.model.name if Path(later.model.name, MANIFEST).is_file() else None
        for place in filter(None, (model, later.adapter.from_)):
            file = Path(place).parent / RECIPE
            try:
                earlier = load_recipe(file, trusts_code=True)
            except TunesmithError as error:
                fault = f"the training continued from {place}, whose recipe cannot be read: "
                fault += error.what
                continue
            # Add each run only once. Otherwise two runs that continue each other would make the
            # loop endless.
            if earlier not in runs:
                runs.append(earlier)
    return runs, fault


class ManifestEntry(TypedDict):
    """Size and hash of one file of a checkpoint."""

    bytes: Count
    sha256: str


class Manifest(TypedDict):
    """Content of manifest.json: the step of the weights, the last step of the run, and the files.

    Only the manifest of final/ has `last_step`, because its weights may be from an earlier step.
    """

    step: Count
    last_step: NotRequired[Count]
    files: dict[str, ManifestEntry]


def read_manifest(folder: Path) -> Manifest | None:
    """Read manifest.json of final/ or of a checkpoint. Return None if it does not exist.

    Raise ValueError if the file is damaged.
    """
    values, fault, _ = read_part(folder / MANIFEST, partial(read_object, form=Manifest))
    if fault:
        raise ValueError(fault)
    if values is not None:
        values.setdefault("last_step", values["step"])
    return values


def weights_step(folder: Path | None) -> int | None:
    """Return the step of the weights in final/ or a checkpoint, or None if it is unknown."""
    manifest = None
    with suppress(ValueError):
        manifest = read_manifest(folder) if folder else None
    return manifest["step"] if manifest else None


def describe_weights(step: int, last_step: int) -> str:
    """Describe in words whether the weights are from the last step or from the best validation."""
    if step == last_step:
        return f"of the last step, {step:,}"
    return f"of step {step:,} of {last_step:,}, the best saved validation"


class Sample(TypedDict):
    """A line of samples.jsonl. Earlier versions did not write `expected` and `row`."""

    step: Count
    prompt: str
    answer: str
    expected: NotRequired[str | None]
    row: NotRequired[str | None]


# Number of newest steps of a run with sampled answers whose answers are kept in files.
KEPT_ROLLOUTS = 20


def rollout_files(folder: Path) -> dict[int, Path]:
    """Return the files of sampled answers in a folder by their step, in order."""
    found = {}
    for path in folder.glob("step-*.safetensors"):
        step = path.stem.removeprefix("step-")
        if step.isdecimal():
            found[int(step)] = path
    return dict(sorted(found.items()))


def outdated_rollouts(folder: Path, newest: int) -> list[Path]:
    """Return the files of sampled answers that can be deleted after the step `newest`.

    The files of the newest KEPT_ROLLOUTS steps and of the first step are kept. 5 to 8 files of the
    steps between are kept too, at equal distances, to show answers of the middle of a run. Files of
    later steps are from before the run was resumed.
    """
    # A power of two, because the multiples of the next one are multiples of this one.
    distance = 1 << (newest // 8).bit_length()
    outdated = []
    for step, path in rollout_files(folder).items():
        is_kept = step == 1 or step > newest - KEPT_ROLLOUTS or step % distance == 0
        if step > newest or not is_kept:
            outdated.append(path)
    return outdated


def read_samples(folder: Path) -> Part[list[Sample]]:
    """Read the sample answers in samples.jsonl, sorted by step.

    An invalid last line without a newline is ignored, because a process may still be writing this
    line.
    """
    content, fault, _ = read_part(folder / SAMPLES, read_bytes)
    rows = []
    skipped = 0
    for number, line in enumerate((content or b"").splitlines(keepends=True), start=1):
        try:
            row = parse_json(line)
            reason = form_fault(row, Sample)
        except ValueError as error:
            reason = str(error)
        if not reason:
            rows.append(cast("Sample", row))
        # Report an invalid line, unless it is the incomplete last line, which a process may still
        # be writing.
        elif line.endswith(b"\n"):
            skipped += 1
            fault = fault or f"line {number}: {reason}"
    rows.sort(key=lambda row: row["step"])
    return Part(rows, fault, skipped or None)


class RowLosses(TypedDict):
    """The number of tokens of each row, and the loss of each row by model (`tuned`, `base`).

    A model whose loss is not finite is omitted.
    """

    row_hash: str
    tokens: list[Count]
    tuned: list[float]
    base: NotRequired[list[float]]


class Score(TypedDict):
    """The result of a scorer for each model, the difference of the models, and the row scores."""

    verdict: str
    tuned: Interval
    base: NotRequired[Interval | None]
    difference: NotRequired[Interval | None]
    by_row: NotRequired[dict[str, list[float]]]


class EvalScores(TypedDict):
    """The results of `eval`.

    `losses` has the loss of each model, or None if the loss is not finite. `row_losses` is None if
    a loss is not finite. `seen` is the number of rows that were in the training data, or None if it
    is unknown.
    """

    data: str
    rows: Count
    row_hash: str
    scores: dict[str, Score]
    step: Count | None
    seen: Count | None
    losses: dict[str, float | None] | None
    row_losses: RowLosses | None


def read_scores(path: Path) -> EvalScores:
    """Read a file with scores. Raise OSError or ValueError if it is damaged."""
    values = {**dict.fromkeys(EvalScores.__annotations__), **read_object(path, Fields)}
    # The losses of each row are not saved if a loss is not finite.
    if form_fault(values["row_losses"], RowLosses):
        values["row_losses"] = None
    fault = form_fault(values, EvalScores)
    if fault:
        raise ValueError(fault)
    return cast("EvalScores", {name: values[name] for name in EvalScores.__annotations__})
