"""A sweep: candidates over one base, each a run directory of its own below the recipe's output_dir.

sweep.json there holds what was fixed at the start (steps of the rungs, micro batch, interval of
validation) and what came out. Where a candidate stands is read from its own directory, so that the
command that is started again continues.
"""

import json
import logging
import math
import os
import re
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from tunesmith.checkpoint.claim import claim_run_dir, is_run
from tunesmith.checkpoint.manifest import find_damage, last_step_of, list_checkpoints
from tunesmith.checkpoint.resume import Progress
from tunesmith.config.dump import to_mapping
from tunesmith.config.load import load_recipe
from tunesmith.config.paths import inputs_of
from tunesmith.config.schema import Run
from tunesmith.distributed.ranks import Ranks, require_one_process, started_as
from tunesmith.errors import (
    LowMemoryError,
    NonFiniteError,
    OtherRankError,
    RecipeError,
    RunError,
    StoppedError,
    UsageError,
)
from tunesmith.host import signals
from tunesmith.host.files import write_atomically
from tunesmith.host.logger import stderr_only_from
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.host.signals import FREE_MEMORY_FIX, StopRequest
from tunesmith.metrics.record import read_records
from tunesmith.metrics.run_figures import RunFigures
from tunesmith.optim.lr_schedule import warmup_steps
from tunesmith.run_dir import (
    FINAL,
    METRICS,
    SWEEP,
    reason_of,
    weights_step,
)
from tunesmith.tools.sweep.search import Search, halve, rung_steps
from tunesmith.tools.sweep.shared_base import SharedBase
from tunesmith.tools.sweep.space import Space, check_count
from tunesmith.tools.sweep.sweep_file import (
    CandidateResult,
    FixedValues,
    SweepResult,
    read_sweep,
)
from tunesmith.training.run import joined, start_run
from tunesmith.training.stop_control import StopControl
from tunesmith.units import Cadence, Length, Size, count_of, format_seconds

log = logging.getLogger(__name__)


class Candidate(NamedTuple):
    """One candidate of a sweep: its recipe, and what sweep.json holds of it."""

    run: Run
    result: CandidateResult


class Standing(NamedTuple):
    """The progress of a candidate: its loss after `step`, infinite where it diverged."""

    step: int
    loss: float
    state: str


def run_sweep(
    recipe: str | Path,
    space: Space,
    search: Search,
    *,
    argv: list[str] | None = None,
) -> SweepResult:
    """Train the candidates of `space` over one base; what sweep.json holds. Errors are of `train`.

    A candidate whose loss is not finite is out; any other error ends the sweep, which the same
    command goes on with.
    """
    check_count(space, search.candidates)
    base = load_recipe(recipe, space.fixed, announce=True)
    check_sweep(base, space, search)
    if started_as() is None:
        require_one_process("sweep")
    # A wrong value is an error before anything is loaded.
    combinations = space.grid()
    for key, span in space.ranges.items():
        combinations += [{key: str(span.low)}, {key: str(span.high)}]
    for values in combinations:
        load_candidate(recipe, space, values)
    with joined(base) as (stop, ranks), ExitStack() as stack:
        with ranks.raise_on_all_ranks():
            if ranks.is_main_process:
                folder = Path(base.output_dir)
                if is_run(folder):
                    raise UsageError(
                        "output_dir contains a run, but a sweep needs its own folder",
                        where=str(folder),
                        fix=shell_word(f"output_dir={folder}-sweep"),
                    )
                stack.enter_context(claim_run_dir(folder, inputs_of(base).values()))
        sweep = Sweep(recipe, base, space, search, stop, ranks, argv)
        sweep.search_best()
        return sweep.result()


def load_candidate(recipe: str | Path, space: Space, values: dict[str, str]) -> Run:
    """The recipe with the fixed words of the sweep, and with these values of the keys that vary."""
    words = [f"{key}={value}" for key, value in values.items()]
    return load_recipe(recipe, [*space.fixed, *words])


def check_sweep(run: Run, space: Space, search: Search) -> None:
    """RecipeError where the recipe cannot be swept over one base."""
    has_validation = run.data.validation or run.data.hold_out
    varies_seed = "train.seed" in space.choices or "train.seed" in space.ranges
    if run.adapter.kind != "lora":
        what = "a sweep needs a frozen base"
        raise RecipeError(what, where="adapter.kind", fix="adapter.kind=lora")
    if run.parallel.tensor != 1:
        what = "a sweep does not support tensor parallelism"
        raise RecipeError(what, where="parallel.tensor", fix="parallel.tensor=1")
    if run.train.duration.seconds:
        what = "a sweep needs a duration in steps or epochs"
        raise RecipeError(what, where="train.duration", fix="train.duration='500 steps'")
    if varies_seed and run.data.hold_out and run.data.hold_out_seed is None:
        what = "the seed also selects the held-out rows"
        raise RecipeError(what, where="train.seed", fix=f"data.hold_out_seed={run.train.seed}")
    if varies_seed and run.model.added_tokens:
        what = "the seed also initializes the added tokens"
        raise RecipeError(what, where="train.seed", fix="one train.seed")
    if not has_validation and search.rungs != 0:
        what = "no rows are held out, but early stopping uses val_loss"
        fix = "data.hold_out='5 %', or --to-the-end, which compares training losses"
        raise RecipeError(what, where="data.validation", fix=fix)


@dataclass(eq=False)
class Sweep:
    """The state of one sweep, alike on every rank."""

    recipe: str | Path
    base: Run
    space: Space
    search: Search
    stop: StopRequest
    ranks: Ranks
    argv: list[str] | None

    def __post_init__(self) -> None:
        self.folder = Path(self.base.output_dir)
        self.candidates: list[Candidate] = []
        self.stopped = ""
        request = {
            "recipe": to_mapping(self.base),
            "keys": self.space.plain(),
            "search": vars(self.search),
        }
        # As it is read back: a tuple becomes a list.
        self.request: dict[str, object] = json.loads(json.dumps(request))
        previous: SweepResult | None = None
        with self.ranks.raise_on_all_ranks():
            if self.ranks.is_main_process:
                previous = self._read()
        # All ranks go on from what rank 0 read.
        previous = self.ranks.broadcast_object(previous)
        self.diverged: dict[str, int] = {}
        # A run that diverged is not trained again.
        for candidate in previous["candidates"] if previous else ():
            if candidate["state"] == "diverged":
                self.diverged[candidate["name"]] = candidate["step"]
        self._fixed = previous["fixed"] if previous else None

    def _read(self) -> SweepResult | None:
        """Read what an earlier start of this sweep wrote; UsageError where it was another one."""
        file = self.folder / SWEEP
        # A link that leads nowhere is not overwritten either.
        if not os.path.lexists(file):
            return None
        fix = f"{shell_word(f'output_dir={self.folder}-2')}, or delete that folder"
        try:
            previous = read_sweep(file)
        except (OSError, ValueError) as error:
            what = "sweep.json is damaged, or not from a sweep"
            raise UsageError(what, where=str(file), why=reason_of(error), fix=fix) from error
        request = previous["asked"]
        differences = [name for name, value in self.request.items() if request.get(name) != value]
        if differences:
            what = "this folder contains another sweep"
            why = f"its {', '.join(differences)} differ"
            raise UsageError(what, where=str(file), why=why, fix=fix)
        return previous

    @cached_property
    def shared(self) -> SharedBase:
        """The base, loaded when the first candidate has steps to train."""
        # Rank and dropout are what a candidate's memory depends on.
        words = [*self.space.widest("adapter.rank"), *self.space.widest("adapter.dropout")]
        widest = load_recipe(self.recipe, [*self.space.fixed, *words])
        if self._fixed is not None:
            widest = self._pinned(widest)
        return SharedBase(widest, self.ranks)

    @property
    def fixed(self) -> FixedValues:
        """The values that all candidates share, and a sweep that goes on must find as they were."""
        if self._fixed is None:
            self._fixed = self._fix()
        return self._fixed

    def _fix(self) -> FixedValues:
        first = self.shared.first
        run = self.base
        total = first.total_steps or 0
        count = self.search.candidates if self.space.ranges else len(self.space.grid())
        per_epoch = first.data.schedule.steps_per_epoch(0)
        # The longest warmup of all candidates: none is stopped in its warmup.
        warmups = [run.train.warmup]
        if "train.warmup" in self.space.choices:
            warmups = [Length.parse(text) for text in self.space.choices["train.warmup"]]
        longest_warmup = max(
            warmup_steps(replace(run.train, warmup=warmup), total, per_epoch) for warmup in warmups
        )
        every = run.validate.every
        interval = Cadence(every, total=total, steps_per_epoch=per_epoch, seconds=0.0).interval
        rungs = rung_steps(total, count, interval, self.search.rungs, longest_warmup)
        if not rungs and self.search.rungs is None:
            few = "too few candidates or steps for early stopping (see --rungs)"
            log.info(f"every candidate trains to the end: {few}")
        # A rung must fall on a validation.
        if rungs and (not interval or rungs[0] % interval):
            every = Length(rungs[0], "steps")
            where = "in the recipe of each candidate: they are compared there"
            log.info(f"validate.every is {every} {where}")
        return {
            "steps": total,
            "rungs": rungs,
            "micro_batch": str(first.plan.layout.micro_batch),
            "validate_every": str(every) if every else None,
            "dtype": first.run.model.dtype,
        }

    def _pinned(self, run: Run) -> Run:
        """The recipe with what the sweep has fixed.

        So `train` alone, with a candidate's recipe, gives the same bits anywhere.
        """
        every = self.fixed["validate_every"]
        micro_batch = Size.parse(self.fixed["micro_batch"])
        return replace(
            run,
            model=replace(run.model, dtype=self.fixed["dtype"]),
            validate=replace(run.validate, every=Length.parse(every) if every else None),
            train=replace(run.train, micro_batch=micro_batch),
        )

    def add(self, values: dict[str, str]) -> None:
        """Add a candidate; its folder's name holds its number and values."""
        values = self.ranks.broadcast_object(values)
        run = load_candidate(self.recipe, self.space, values)
        words = "-".join(f"{key.rpartition('.')[2]}-{value}" for key, value in values.items())
        label = re.sub(r"[^\w.+-]+", "_", words)[:80]
        name = f"{len(self.candidates) + 1:02d}-{label}"
        run = replace(self._pinned(run), output_dir=str(self.folder / name))
        result = CandidateResult(
            name=name,
            run_dir=run.output_dir,
            values=values,
            state="waiting",
            step=0,
            loss=None,
            losses={},
        )
        self.candidates.append(Candidate(run, result))

    def search_best(self) -> None:
        """Train the candidates, as far as the search asks for."""
        if self.space.ranges:
            combinations = self.space.draw(self.search.candidates, self.base.train.seed)
        else:
            combinations = self.space.grid()
        for values in combinations:
            self.add(values)
        self.write()
        halve(self.candidates, self.fixed["rungs"], self.measure)

    def measure(self, candidate: Candidate, until: int | None) -> float:
        """The loss of a candidate after step `until` (None: at its end); infinite if it diverged.

        It is trained as far as it has to be for that.
        """
        began = time.perf_counter()
        result = candidate.result
        end = until or self.fixed["steps"]
        found: Standing | None = None
        # Below the step at which it diverged it still has a loss.
        if end < self.diverged.get(result["name"], math.inf):
            # The loss may be there from an earlier start.
            found = self._standing(candidate, until)
            if found is None and self._train(candidate, until):
                found = self._standing(candidate, until)
                assert found is not None
        standing = found or Standing(end, math.inf, "diverged")
        # JSON has no infinity.
        loss = standing.loss if math.isfinite(standing.loss) else None
        result["step"], result["state"], result["loss"] = standing.step, standing.state, loss
        result["losses"][str(standing.step)] = loss
        self.write()
        seconds = format_seconds(time.perf_counter() - began)
        shown = f"{self.compared} {standing.loss:.4f}  {standing.state}  {seconds}"
        log.info(f"{result['name']}: step {standing.step}  {shown}")
        return standing.loss

    def _train(self, candidate: Candidate, until: int | None) -> bool:
        """Train a candidate up to step `until`, or to its end; False where its loss diverged."""
        stop = StopControl(self.stop, Path(candidate.run.output_dir), self.ranks)
        build = self.shared.build
        number = self.candidates.index(candidate) + 1
        candidates = count_of(len(self.candidates), "candidate")
        end = until or self.fixed["steps"]
        log.info(f"{candidate.result['name']}: {number} of {candidates}, trains to step {end}")
        try:
            # Its lines are in its own log.txt; a stop concerns the sweep.
            with stderr_only_from(log.name, signals.__name__):
                start_run(
                    candidate.run,
                    stop,
                    self.ranks,
                    quiet=True,
                    argv=self.argv,
                    build=build,
                    pause_after=until,
                )
        except StoppedError as error:
            if isinstance(error, LowMemoryError):
                error.fix = (
                    f"{FREE_MEMORY_FIX}, then start the same command again; the micro batch remains"
                    f" {self.fixed['micro_batch']}, as for all candidates"
                )
            self.stopped = error.what
            self.write()
            raise
        except (NonFiniteError, OtherRankError) as error:
            # All ranks see such a loss; those but rank 0 raise an OtherRankError from it.
            if not any(isinstance(e, NonFiniteError) for e in (error, error.__cause__)):
                raise
            return False
        return True

    @property
    def compared(self) -> str:
        return "val_loss" if self.base.data.validation or self.base.data.hold_out else "loss"

    def _standing(self, candidate: Candidate, until: int | None) -> Standing | None:
        """Read where a candidate stands, or None if it has not come so far; a collective call."""
        standing: Standing | None = None
        with self.ranks.raise_on_all_ranks():
            if self.ranks.is_main_process:
                standing = self._read_standing(Path(candidate.run.output_dir), until)
        return self.ranks.broadcast_object(standing)

    def _read_standing(self, folder: Path, until: int | None) -> Standing | None:
        """Read where the run directory of a candidate stands, or None if it has not come so far."""
        final = last_step_of(folder / FINAL)
        newest = 0
        for saved_step, checkpoint in list_checkpoints(folder).items():
            if find_damage(checkpoint, contents=False) is None:
                newest = saved_step
                break
        step = until
        if until is None or (final is not None and final < until):
            step = final
        if step is None or (final is None and newest < step):
            return None
        records = {record.step: record for record in read_records(folder / METRICS)}
        record = records.get(step)
        if record is None and step == newest:
            # A signal may have cut off the validation, and the next start measures and writes the
            # record.
            progress = Progress.read(folder / f"checkpoint-{step}")
            if not progress.validated:
                return None
        if record is not None and self.compared == "loss":
            loss = RunFigures.of(records.values()).loss
            return Standing(step, loss.mean if loss else math.inf, "finished")
        if step == final:
            # A finished candidate is as good as the weights in its final/.
            record = records.get(weights_step(folder / FINAL) or step)
        if record is None or record.val_loss is None:
            what = f"a candidate's records contain no {self.compared} of step {step}"
            fix = f"rm -r {shell_path(folder)}   # the same command then retrains this candidate"
            raise RunError(what, where=str(folder / METRICS), why="they were edited", fix=fix)
        if not math.isfinite(record.val_loss):
            return Standing(step, math.inf, "diverged")
        return Standing(step, record.val_loss, "finished" if step == final else "stopped")

    def write(self) -> None:
        """Write sweep.json."""
        if self.ranks.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / SWEEP, json.dumps(self.result(), indent=1))

    def result(self) -> SweepResult:
        """Return what came out so far: plain values, the best candidate's name among them."""
        results = [candidate.result for candidate in self.candidates]
        losses = {
            result["name"]: result["loss"]
            for result in results
            if result["state"] == "finished" and result["loss"] is not None
        }
        return {
            "asked": self.request,
            "fixed": self.fixed,
            "compared_by": self.compared,
            "stopped": self.stopped,
            "best": min(losses, key=losses.__getitem__, default=None),
            "candidates": results,
        }
