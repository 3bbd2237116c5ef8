"""The files of a run directory: their names, and what a reader may take from each.

Whoever shows, compares or continues a run reads its small files here. A run may have been killed
while it wrote, copied in part, edited by hand, or written by another version, so nothing in it is
believed unchecked:

    open_regular   a pipe or a device is never opened: reading one may never end
    parse_json     no NaN, lone surrogates, endless nesting, or number that a float cannot hold
    read_*         the values whose type is right, and a sentence on what is wrong with the rest

A file that is not there is no fault: most of them come late or never. The records' own types are in
`metrics/record.py`.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import StrEnum
from functools import cache
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

from annotated_types import Ge, Le, Len
from typing_extensions import TypedDict  # that pydantic reads also before Python 3.12

from tunesmith.config import schema
from tunesmith.config.load import RUN_IDENTITY, RUN_RECIPE, load_recipe
from tunesmith.config.names import keys
from tunesmith.config.schema import Run
from tunesmith.config.tree import read_file
from tunesmith.errors import RecipeError, TunesmithError, UsageError
from tunesmith.host.files import from_here, near_path
from tunesmith.host.packages import COMPUTE
from tunesmith.units import Length

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Fields = dict[str, Any]  # of a JSON or YAML file whose values may be anything

RECIPE = RUN_RECIPE
IDENTITY = RUN_IDENTITY
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
NO_FINAL_ANSWERS = "no sample answers of the final weights: "  # in log.txt, before the reason
HELD_OUT = "held-out.txt"  # the rows that data.hold_out drew: `file:line  how it begins`
LOG = "log.txt"
FAILURE = "failure.json"
STOPPED = "stopped.json"  # says that the run was stopped, and why
RUNNING = "running.json"  # is there while a start is at work, and after it was killed
BEST = "best.json"
LOCK = ".lock"
STOP_FILE = "stop"  # asks a run to save and end
FINAL = "final"
MANIFEST = "manifest.json"  # of final/ and of each checkpoint
SWEEP = "sweep.json"
EVALS = "evals"  # a folder of answers and scores of `eval`
SCORES = "*.scores.json"  # in it
PAIRS = "pairs in order"  # a score: the share of pairs whose chosen answer the model finds likelier


class RunState(StrEnum):
    """The state of a run, in the words of `status`, `watch`, `report` and their JSON."""

    QUEUED = "queued"  # it waits for a node or a container
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"  # by a request, or for want of memory; the same command resumes
    FAILED = "failed"  # by an error, which failure.json has
    KILLED = "killed"  # no process is at work, and none wrote how it ended
    UNKNOWN = "unknown"  # nothing of it can be read from here


class Phase(StrEnum):
    """The work of a run at the moment: in the bar of `train`, in failure.json and stopped.json."""

    JOINING = "joining the ranks"
    START = "start"
    LOADING = "loading the model"
    REFERENCE = "reference"  # the base scores the rows of preferences
    COMPARING = "comparing the base in 8 bits with bf16"
    FIRST_STEP = "first step"
    TRAINING = "training"
    VALIDATION = "validation"
    SAMPLES = "sample answers"
    SAVING = "saving"
    SAVING_FINAL = "saving final/"
    END = "end"


LARGEST = 1e100  # of a number: its square, and sums of them, are still finite
LARGEST_COUNT = 2**53  # of a step or a count: a browser's numbers are exact up to here
MAX_FILE_BYTES = 64 << 20  # of a JSON file: the largest manifests have a few MiB
_SURROGATE = re.compile("[\ud800-\udfff]")


class Part(NamedTuple, Generic[T_co]):
    """The part of a file that a reader may take.

    Attributes:
        fault: what is wrong with the file; empty for nothing.
        lines: that were skipped, of a file of lines.
    """

    value: T_co
    fault: str = ""
    lines: int | None = None


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, links followed; OSError for anything else, without waiting.

    Opening a pipe waits for a writer, and a device may do anything, so the kind is looked at first.
    O_NONBLOCK is for what takes the file's place in between.
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
        raise OSError(0, "it is not a regular file", str(path))


def read_bytes(path: Path) -> bytes:
    """The content of a regular file; OSError as `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def shown(path: str | Path) -> str:
    """A path as text that any file and page can hold.

    Bytes of a name that are not UTF-8 are replaced.
    """
    return os.fsencode(path).decode(errors="replace")


def name_a_run(path: Path) -> str:
    """The fix for a path that is no run's: the folder of nearly its name, if there is one."""
    near = None if path.is_dir() else near_path(path)
    if near and near.is_dir():
        return f"did you mean {from_here(near)}?"
    return "use the output_dir of a run"


def parse_json(text: str | bytes) -> object:
    """A JSON value.

    ValueError for what is not strict JSON, or holds a number that no run writes.
    """
    from pydantic_core import from_json

    value: object = from_json(text, allow_inf_nan=False)
    _check_numbers(value)
    return value


def _check_numbers(value: object) -> None:
    """ValueError for a number beyond LARGEST; the depth is bounded by the parser."""
    if isinstance(value, dict):
        for item in value.values():
            _check_numbers(item)
    elif isinstance(value, list):
        for item in value:
            _check_numbers(item)
    elif isinstance(value, int | float) and not -LARGEST <= value <= LARGEST:
        raise ValueError("a number in it is too large")


def is_number(value: object) -> bool:
    """A finite number up to LARGEST; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -LARGEST <= value <= LARGEST


def is_count(value: object) -> bool:
    """A whole number from 0 that a browser holds exactly."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT


Count = Annotated[int, Ge(0), Le(LARGEST_COUNT)]
Interval = Annotated[list[float], Len(3, 3)]  # a mean and the ends of its interval


def form_fault(value: object, form: object) -> str:
    """Say what about a value is not of a form, which is a type for pydantic; empty for nothing."""
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
    """Read a JSON file that holds an object of a form, with what the form does not name.

    OSError where it cannot be read, ValueError where it holds something else.
    """
    with open_regular(path) as file:
        text = file.read(MAX_FILE_BYTES + 1)
    if len(text) > MAX_FILE_BYTES:
        raise ValueError("it is larger than 64 MiB")
    values = parse_json(text)
    fault = form_fault(values, form)
    if fault:
        raise ValueError(fault)
    return cast("T", values)


def read_part(path: Path, read: Callable[[Path], T]) -> Part[T | None]:
    """Read a file of a run; None without it, or where it is damaged."""
    try:
        return Part(read(path))
    except FileNotFoundError:
        return Part(None)
    except (OSError, ValueError) as error:
        return Part(None, reason_of(error))


def _read_fields(path: Path, forms: Mapping[str, object]) -> Part[Fields | None]:
    """Read the object of a JSON file without the values of a wrong type.

    Return None if there is no file.
    """
    values, fault, _ = read_part(path, lambda file: read_object(file, Fields))
    if values is not None:
        fault = _drop_wrong_types(values, forms)
    return Part(values, fault)


def _drop_wrong_types(values: Fields, forms: Mapping[str, object]) -> str:
    """Remove the values that are not of their form, and say which these are."""
    wrong = []
    for name, form in forms.items():
        if values.get(name) is not None and form_fault(values[name], form):
            wrong.append(name)
            del values[name]
    return f"of the wrong type: {', '.join(wrong)}" if wrong else ""


def reason_of(error: OSError | ValueError) -> str:
    """Why a file was not read, as a clause."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)


_ENV_TEXTS = (
    *COMPUTE,
    "python",
    "cpu",
    "commit",
    "data_hash",
    "validation_hash",
    "model_hash",
    "recipe_hash",
)
_ENV_FORMS = {
    **dict.fromkeys(_ENV_TEXTS, str),
    "command": list[str],
    "validation_examples": Count,
}


class Failure(TypedDict, total=False):
    """failure.json: what ended the run, on which rank, at which of its work."""

    what: str
    where: str
    why: str
    cause: str
    rank: Count
    host: str
    phase: str
    collective: str
    last_step: Count
    next: str


class Stopped(TypedDict, total=False):
    """stopped.json: who asked for the stop, and the step that is saved."""

    signal: str
    reason: str
    step: Count
    what: str
    figures: dict[str, object]


class RunningNote(TypedDict):
    """running.json, of a start that is at work or was killed."""

    host: str
    boot: str
    began: str
    process: Count
    oom_kills: Count


def read_env(folder: Path) -> Part[Fields]:
    """env.json; empty where it is not there."""
    values, fault, _ = _read_fields(folder / IDENTITY, _ENV_FORMS)
    return Part(values or {}, fault)


def held_out_hash(folder: Path) -> str | None:
    """The hash of the rows that a run held out, by its env.json; None where it has none.

    UsageError where it is damaged: other rows must not pass for these.
    """
    values, fault, _ = read_env(folder)
    validation_hash: str | None = values.get("validation_hash")
    if fault and validation_hash is None:
        raise UsageError(
            "env.json is damaged, so the run's held-out rows are unknown",
            where=str(folder / IDENTITY),
            why=fault,
            fix="copy the run directory again from where it was trained; "
            "or name rows: tunesmith eval RUN --data FILE",
        )
    return validation_hash


def read_failure(folder: Path) -> Part[Failure | None]:
    part = _read_fields(folder / FAILURE, Failure.__annotations__)
    return cast("Part[Failure | None]", part)


def read_stopped(folder: Path) -> Part[Stopped | None]:
    part = _read_fields(folder / STOPPED, Stopped.__annotations__)
    return cast("Part[Stopped | None]", part)


def how_far(
    recorded: float | None,
    failure: Failure | None,
    stopped: Stopped | None,
    final: "Manifest | None",
) -> tuple[RunState, int]:
    """Tell how a run that no process is at work on has ended, and the steps that it has taken.

    These are those recorded or, of a stop, those that stopped.json says are saved: the record of a
    step whose validation was cut off is written once a resume has measured it.

    Args:
        recorded: the step of the newest record.
        failure, stopped: what the last start left.
        final: the manifest of final/, which may be of a shorter run.
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
    """The note of a start; None where it is not there or lacks something."""
    return read_part(folder / RUNNING, lambda path: read_object(path, RunningNote)).value


def read_recipe(folder: Path) -> Part[Fields]:
    """config.yaml as plain values, without sections of a wrong type.

    Empty where it is not there. It is not checked against the schema: the run may be of another
    version.
    """
    path = folder / RECIPE
    try:
        # A pipe of that name would be waited for; the reader of recipes opens the file itself.
        open_regular(path).close()
        values: Fields = read_file(path).plain()
    except FileNotFoundError:
        return Part({})
    except OSError as error:
        return Part({}, reason_of(error))
    except RecipeError as error:
        return Part({}, error.why or error.what)
    # A lone half of a surrogate pair cannot be written to any file or page.
    if _SURROGATE.search(json.dumps(values, ensure_ascii=False)):
        return Part({}, "it contains invalid Unicode")
    return Part(values, _drop_wrong_types(values, _SECTION_FORMS))


def share_done(recipe: Fields, steps: float, epochs: float, seconds: float = 0.0) -> float | None:
    """Compute the part of its duration that a run has trained, from 0 to 1.

    None where there is no recipe yet, or somebody edited it, and before the first step.
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
} | {"method": str | dict[str, object]}  # one without keys is written as its name


def with_earlier_runs(run: Run) -> tuple[list[Run], str]:
    """The recipes of a run and of those that it continues, by `adapter.from` or by a model that a
    run has written; and why not all of them are known.

    Where an adapter or a model on the Hub comes from is not asked.
    """
    runs = [run]
    fault = ""
    for later in runs:  # The list grows in the loop.
        model = later.model.name if Path(later.model.name, MANIFEST).is_file() else None
        for place in filter(None, (model, later.adapter.from_)):
            file = Path(place).parent / RECIPE
            try:
                earlier = load_recipe(file, trusts_code=True)
            except TunesmithError as error:
                fault = f"it continues {place}: {error.what}"
                continue
            # Two runs may have continued each other in turn.
            if earlier not in runs:
                runs.append(earlier)
    return runs, fault


class ManifestEntry(TypedDict):
    """A file of a checkpoint."""

    bytes: Count
    sha256: str


class Manifest(TypedDict):
    """manifest.json: the step of the weights, that of the run, and the files.

    `last_step` is written in final/ alone, whose weights may be of an earlier step.
    """

    step: Count
    last_step: NotRequired[Count]
    files: dict[str, ManifestEntry]


def read_manifest(folder: Path) -> Manifest | None:
    """manifest.json of final/ or of a checkpoint; None where it is not there.

    ValueError where it is damaged.
    """
    values, fault, _ = read_part(folder / MANIFEST, lambda path: read_object(path, Manifest))
    # No system opens a file whose name has a zero byte.
    if values is not None and any("\0" in name for name in values["files"]):
        fault = "a file's name in it contains a zero byte"
    if fault:
        raise ValueError(fault)
    if values is not None:
        values.setdefault("last_step", values["step"])
    return values


def weights_step(folder: Path | None) -> int | None:
    """The step of the weights in a folder of a run, by its manifest; None where unknown."""
    manifest = None
    with suppress(ValueError):
        manifest = read_manifest(folder) if folder else None
    return manifest["step"] if manifest else None


def describe_weights(step: int, last_step: int) -> str:
    """Which weights of a run these are, by the steps of its manifest."""
    if step == last_step:
        return f"of the last step, {step:,}"
    return f"of step {step:,} of {last_step:,}, the best saved validation"


class Sample(TypedDict):
    """A line of samples.jsonl; `expected` and `row` came later."""

    step: Count
    prompt: str
    answer: str
    expected: NotRequired[str | None]
    row: NotRequired[str | None]


def read_samples(folder: Path) -> Part[list[Sample]]:
    """The answers of samples.jsonl in the order of their steps.

    A last line without its end may still be written.
    """
    content, fault, _ = read_part(folder / SAMPLES, read_bytes)
    rows: list[Sample] = []
    skipped = 0
    for number, line in enumerate((content or b"").splitlines(keepends=True), start=1):
        try:
            row = parse_json(line)
            reason = form_fault(row, Sample)
        except ValueError as error:
            reason = str(error)
        if not reason:
            rows.append(cast("Sample", row))
        # A torn line in the middle is a fault; at the end it may still be written.
        elif line.endswith(b"\n"):
            skipped += 1
            fault = fault or f"line {number}: {reason}"
    rows.sort(key=lambda row: row["step"])
    return Part(rows, fault, skipped or None)


class RowLosses(TypedDict):
    """The loss of each row and its tokens; of a row whose loss is not finite it has none."""

    row_hash: str
    tokens: list[Count]
    tuned: list[float]
    base: NotRequired[list[float]]


class Score(TypedDict):
    """The numbers that a scorer measured of each model, their difference, and each row's score."""

    verdict: str
    tuned: Interval
    base: NotRequired[Interval | None]
    difference: NotRequired[Interval | None]
    by_row: NotRequired[dict[str, list[float]]]


class EvalScores(TypedDict):
    """The numbers of an `eval`.

    `losses`, by model, and `row_losses` are None of a task; `seen` counts rows that were trained
    on.
    """

    data: str
    rows: Count
    row_hash: str
    scores: dict[str, Score]
    step: Count | None
    seen: Count | None
    losses: dict[str, float] | None
    row_losses: RowLosses | None


def read_scores(path: Path) -> EvalScores:
    """Read a file of scores; OSError or ValueError where it is damaged."""
    values: Fields = {**dict.fromkeys(EvalScores.__annotations__), **read_object(path, Fields)}
    # A loss that is not finite is written as text.
    if isinstance(values["losses"], dict):
        losses = values["losses"].items()
        values["losses"] = {name: loss for name, loss in losses if is_number(loss)}
    rows = values["row_losses"]
    if form_fault(rows, RowLosses) or any(
        len(rows[name]) != len(rows["tokens"]) for name in ("tuned", "base") if name in rows
    ):
        values["row_losses"] = None
    fault = form_fault(values, EvalScores)
    if fault:
        raise ValueError(fault)
    return cast("EvalScores", {name: values[name] for name in EvalScores.__annotations__})
