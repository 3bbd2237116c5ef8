"""A run directory as a reader sees it: the files of a running, finished, failed or copied run, and
the figures that follow from them.

It reads what was appended since the last look, needs no torch, and takes a directory as it is:
files that are not there yet, a last line that is still being written, fields of another version.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import pydantic_core

from tunesmith.checkpoint.previous_crash import find_previous_crash
from tunesmith.config.dump import leaves
from tunesmith.errors import RunError, UsageError
from tunesmith.host.shell import shell_path
from tunesmith.launch.jobs import holds_run, is_at_work
from tunesmith.metrics.conversations import conversations_of, whole_characters
from tunesmith.metrics.record import checked_values
from tunesmith.metrics.run_figures import Columns, RunFigures
from tunesmith.run_dir import (
    EVALS,
    FAILURE,
    FINAL,
    IDENTITY,
    LOG,
    MANIFEST,
    METRICS,
    NO_FINAL_ANSWERS,
    PROFILES,
    RECIPE,
    SAMPLES,
    SCORES,
    STOP_FILE,
    STOPPED,
    Failure,
    Fields,
    Part,
    RunState,
    how_far,
    name_a_run,
    open_regular,
    parse_json,
    read_env,
    read_failure,
    read_manifest,
    read_part,
    read_profile,
    read_recipe,
    read_samples,
    read_scores,
    read_stopped,
    reason_of,
    share_done,
    shown,
)
from tunesmith.units import count_of

T = TypeVar("T")

LOG_LINES = 40  # the newest
WARNINGS = 20  # the newest
FINAL_MANIFEST = f"{FINAL}/{MANIFEST}"
_RANK_METRICS_NAME = re.compile(r"metrics-rank(\d+)\.jsonl")

# The small files of a run.
PARTS = (RECIPE, IDENTITY, FAILURE, STOPPED, SAMPLES, FINAL_MANIFEST, f"{EVALS}/{SCORES}", PROFILES)


class DamagedFile(NamedTuple):
    """A file of a run that is not read as a whole: how many of its lines were skipped (None: all of
    it is), and why."""

    file: str
    lines: int | None
    why: str

    def __str__(self) -> str:
        if self.lines is None:
            return f"{self.file}: {self.why}"
        return f"{self.file}: {count_of(self.lines, 'line')} skipped; {self.why}"


class AppendedLines:
    """The lines added to a file that grows. One that was replaced or cut back is read anew.

    Attributes:
        fault: why a file that is there cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fault = ""
        self._offset = 0
        self._inode = 0

    def read(self) -> tuple[bool, list[bytes]]:
        """Tell whether the lines of before no longer count, and read whole ones of those since."""
        anew = self._offset > 0
        text = b""
        self.fault = ""
        try:
            with open_regular(self.path) as file:
                status = os.fstat(file.fileno())
                is_replaced = status.st_ino != self._inode
                anew = anew and (is_replaced or status.st_size < self._offset)
                self._inode = status.st_ino
                file.seek(0 if anew else self._offset)
                text = file.read()
        # It may not be there yet, or no longer.
        except FileNotFoundError:
            pass
        except OSError as error:
            self.fault = reason_of(error)
        # A last line that is still being written is left to the next look.
        text = text[: text.rfind(b"\n") + 1]
        if anew:
            self._offset = 0
        self._offset += len(text)
        return anew, text.splitlines()


class JsonlColumns:
    """The numbers of a .jsonl file of records, by name; each list has one entry a record, None
    where it has no such number.

    A line that is no record is skipped: `skipped` counts them, `reason` says what is wrong with the
    first.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._lines = AppendedLines(path)
        self._forget()

    def _forget(self) -> None:
        self.figures = RunFigures()
        self.skipped = 0
        self.reason = ""

    @property
    def fault(self) -> str:
        """Why the file, or its first line that was skipped, was not read; empty for nothing."""
        return self._lines.fault or self.reason

    def read(self) -> None:
        """Read what was appended."""
        anew, lines = self._lines.read()
        if anew:
            self._forget()
        if lines:
            # What was computed is of the records before.
            self.figures = RunFigures(self.figures.columns)
        for line in lines:
            try:
                self.figures.add(checked_values(parse_json(line)))
            except ValueError as error:
                self.skipped += 1
                self.reason = self.reason or f"line {self.figures.rows + self.skipped}: {error}"


class RunFiles:
    """A run directory and what it holds now. Figures are in the units of the records.

    Attributes:
        label: the folder's name, or where runs side by side share it the whole path.
        recipe, env: config.yaml and env.json as plain values; empty if not there yet.
        samples: in the order of the steps; step 0 is before training.
        failure, stopped: failure.json and stopped.json, None without one.
        final: the manifest of final/; None: it is not there, or damaged.
        evals: of each `eval` what its file of scores says.
        profiles: the summaries of `profile/`, by name.
        state: where it stands; steps: optimizer steps that were taken.
        revision: goes up when a file changes that is no table of records and no log.
        log_tail, warnings: the last lines of log.txt; the newest warnings of all of it, each once.
        no_final_answers: the line of log.txt that says why the final weights have no answers.
    """

    def __init__(self, folder: str | Path) -> None:
        """UsageError if `folder` holds nothing of a run."""
        self.folder = Path(folder)
        self.name = shown(self.folder.absolute().name)
        self.label = self.name
        self.log_tail: list[str] = []
        self.warnings: list[str] = []
        self.no_final_answers = ""
        self.revision = 0
        self._records = JsonlColumns(self.folder / METRICS)
        self._ranks: dict[int, JsonlColumns] = {}
        self._log = AppendedLines(self.folder / LOG)
        # What the small files looked like, the oldest first.
        self._looks: list[tuple[tuple[int, int, int], Path]] | None = None
        self._parts: dict[str, Part[object]] = {}
        if not holds_run(self.folder):
            what = f"there is no {folder}"
            why = ""
            if self.folder.exists():
                what = "this is not a run directory"
                why = "it has no metrics.jsonl, config.yaml, env.json or log.txt"
            raise UsageError(what, where=str(folder), why=why, fix=name_a_run(Path(folder)))
        self.refresh()

    @property
    def figures(self) -> RunFigures:
        """The figures of metrics.jsonl."""
        return self._records.figures

    @property
    def ranks(self) -> dict[int, Columns]:
        """The columns of metrics-rank<r>.jsonl, by rank."""
        return {rank: table.figures.columns for rank, table in self._ranks.items()}

    @property
    def damaged(self) -> list[DamagedFile]:
        """List what could not be read, by file; empty for a run whose files are whole."""
        damaged = [
            DamagedFile(table.name, table.skipped or None, table.fault)
            for table in (self._records, *self._ranks.values())
        ]
        damaged.append(DamagedFile(LOG, None, self._log.fault))
        for name, part in self._parts.items():
            damaged.append(DamagedFile(name, part.lines, part.fault))
        return [file for file in damaged if file.why]

    def refresh(self) -> None:
        """Read what was written since the last look."""
        for path in self.folder.glob("metrics-rank*.jsonl"):
            match = _RANK_METRICS_NAME.fullmatch(path.name)
            if match and int(match[1]) not in self._ranks:
                self._ranks[int(match[1])] = JsonlColumns(path)
        for table in (self._records, *self._ranks.values()):
            table.read()
        self._read_log()
        self._read_parts()
        state, self.steps = how_far(
            self.figures.last("step"), self.failure, self.stopped, self.final
        )
        self.state = RunState.RUNNING if is_at_work(self.folder) else state

    def _read_parts(self) -> None:
        """Read the small files if one is new or was written again."""
        files = [path for pattern in PARTS for path in self.folder.glob(pattern)]
        # The oldest first: of two evals of the same rows the newer counts.
        looks = sorted((signature_of(path), path) for path in files)
        if looks == self._looks:
            return
        self._looks = looks
        self.revision += 1
        paths = [path for _, path in looks]
        recipe = read_recipe(self.folder)
        env = read_env(self.folder)
        failure = read_failure(self.folder)
        stopped = read_stopped(self.folder)
        samples = read_samples(self.folder)
        final = read_part(self.folder / FINAL, read_manifest)
        evals = self._read_each(paths, EVALS, read_scores)
        profiles = self._read_each(paths, str(Path(PROFILES).parent), read_profile)
        self._parts = {
            RECIPE: recipe,
            IDENTITY: env,
            FAILURE: failure,
            STOPPED: stopped,
            SAMPLES: samples,
            FINAL_MANIFEST: final,
            **evals,
            **profiles,
        }
        self.recipe = recipe.value
        self.env = env.value
        self.failure = failure.value
        self.stopped = stopped.value
        self.samples = samples.value
        self.final = final.value
        self.evals = [part.value for part in evals.values() if part.value]
        self.profiles = {
            Path(name).stem.removeprefix("summary-"): part.value
            for name, part in profiles.items()
            if part.value
        }

    def _read_each(
        self, paths: Sequence[Path], folder: str, read: Callable[[Path], T]
    ) -> dict[str, Part[T | None]]:
        """The files in a folder of the run, by name."""
        inner = [path for path in paths if path.parent == self.folder / folder]
        return {shown(path.relative_to(self.folder)): read_part(path, read) for path in inner}

    def _read_log(self) -> None:
        anew, new = self._log.read()
        lines = [line.decode(errors="replace") for line in new]
        # A log that became shorter was written anew.
        if anew:
            self.log_tail = []
            self.warnings = []
            self.no_final_answers = ""
        self.log_tail = [*self.log_tail, *lines][-LOG_LINES:]
        warnings = [line.partition("warning: ")[2].strip() for line in lines if "warning: " in line]
        self.warnings = list(dict.fromkeys([*self.warnings, *warnings]))[-WARNINGS:]
        for line in lines:
            if NO_FINAL_ANSWERS in line:
                self.no_final_answers = line[line.index(NO_FINAL_ANSWERS) :].strip()

    @property
    def final_step(self) -> int | None:
        """The step of the weights in final/; None: there are none, or that is not known."""
        return self.final["step"] if self.final else None

    @property
    def described_state(self) -> str:
        """The state, the last step, and the step in final/ where that is an earlier one."""
        text = f"{self.state} at step {self.steps}"
        if self.state is RunState.FINISHED and self.final_step not in (None, self.steps):
            text += f", {FINAL}/ is of step {self.final_step}"
        return text

    @property
    def validation_hash(self) -> str | None:
        """The hash of the held-out rows as tokens."""
        return self.env.get("validation_hash")

    @property
    def held_out(self) -> int | None:
        """Count the examples that were held out, as env.json has it."""
        return self.env.get("validation_examples") or None

    def key(self, section: str, name: str) -> object:
        """The value of a key of the recipe; None where it is not there."""
        value: object = (self.recipe.get(section) or {}).get(name)
        return value

    @property
    def max_examples(self) -> int | None:
        """Return how many of the held-out rows were measured; None: all."""
        return cast("int | None", self.key("validate", "max_examples"))

    @property
    def method(self) -> str:
        """The name of the method, which says what val_loss is the loss of."""
        return str(self.method_keys.get("name"))

    @property
    def method_keys(self) -> Fields:
        """The section of the recipe; a method without keys is written as its name."""
        method = self.recipe.get("method", "sft")
        return method if isinstance(method, dict) else {"name": method}

    @property
    def seed(self) -> int | None:
        return cast("int | None", self.key("train", "seed"))

    @property
    def hold_out_seed(self) -> object:
        """Return the seed that drew the rows of `data.hold_out`; None without or if unknown."""
        if not self.key("data", "hold_out"):
            return None
        seed = self.key("data", "hold_out_seed")
        return self.seed if seed is None else seed

    def status(self) -> Fields:
        """Say where it stands: state, progress, newest figures, warnings, and how it ended."""
        recorded = self.figures
        epochs = recorded.last("epoch") or 0.0
        progress = share_done(self.recipe, self.steps, epochs, recorded.seconds)
        total_steps = self.steps / progress if progress else 0.0
        seconds_per_step = recorded.recent_mean("step_seconds")
        seconds_left = None
        if self.state is RunState.RUNNING and total_steps and seconds_per_step:
            seconds_left = (total_steps - self.steps) * seconds_per_step
        figures = {name: recorded.last(name) for name in recorded.columns}
        # Means of the last steps: one alone would flicker.
        if "tokens_per_second" in figures:
            figures["tokens_per_second"] = recorded.recent_mean("tokens_per_second")
        data_seconds = recorded.recent_mean("data_seconds")
        if seconds_per_step and data_seconds is not None:
            figures["data_share"] = data_seconds / seconds_per_step
        return {
            "name": self.name,
            "place": shown(self.folder),
            "state": self.state,
            "step": self.steps,
            "final_step": self.final_step,
            "steps": round(total_steps) if total_steps else None,
            "done": progress,
            "seconds_left": seconds_left,
            "figures": {name: value for name, value in figures.items() if value is not None},
            "warnings": self.warnings,
            "end": how_it_ended(self),
            "log": self.log_tail,
            "texts": self.revision,
            "damaged": [file._asdict() for file in self.damaged],
        }

    def texts(self) -> Fields:
        """The samples, the turns of their prompts (role, text), and the system prompt of all."""
        samples = []
        for row in self.samples:
            place = row.get("row")
            answer = whole_characters(row["answer"])
            samples.append({**row, "answer": answer, "row": shown(place) if place else None})
        conversations, system = conversations_of(row["prompt"] for row in self.samples)
        return {
            "samples": samples,
            "conversations": conversations,
            "system": system,
            "missing": self.missing_answers(),
        }

    def missing_answers(self) -> str:
        """Return why there are no answers of the final weights; empty if there are some."""
        if self.final_step is None or any(row["step"] == self.final_step for row in self.samples):
            return ""
        reason = "log.samples is 0" if self.key("log", "samples") == 0 else "see log.txt"
        return self.no_final_answers or NO_FINAL_ANSWERS + reason


def label_apart(runs: Sequence[RunFiles]) -> None:
    """Label runs that share a name by their folders."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.label = shown(run.folder)


def how_it_ended(run: RunFiles) -> Fields:
    """Find what a run that neither goes on nor finished left behind to tell why, and what to do
    next; else nothing.
    """
    fields: Fields = {}
    # failure.json of an earlier start stays; only the state says whether it counts.
    if run.failure and run.state is RunState.FAILED:
        fields = {name: run.failure.get(name) for name in Failure.__annotations__}
    elif run.state is RunState.STOPPED and run.stopped:
        fields = leaves(run.stopped)
        if fields.get("reason") == "file":
            fields["reason"] = f"`tunesmith stop`, or the file `{STOP_FILE}` in its directory"
    elif run.state is RunState.KILLED:
        command = f"tunesmith train {shell_path(shown(run.folder / RECIPE))}"
        end = find_previous_crash(run.folder) or RunError(
            "no process is running here, and it wrote no failure record",
            why="it was killed, or this is a copy of a running run",
            fix=f"{command}   # resumes from the newest checkpoint",
        )
        fields = {"what": end.what, "where": end.where, "why": end.why, "cause": end.cause}
        fields["next"] = end.fix
    return {name: value for name, value in fields.items() if value not in (None, "")}


def signature_of(path: Path) -> tuple[int, int, int]:
    """The time, size and inode of a file; zeros without one."""
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return status.st_mtime_ns, status.st_size, status.st_ino


def to_json(value: object) -> str:
    """Strict JSON: what is not finite is null there."""
    return pydantic_core.to_json(value, inf_nan_mode="null").decode()
