"""A sweep: candidates over one base, each a run directory of its own below the recipe's output_dir.

sweep.json there holds what was fixed at the start (steps of the rungs, micro batch, interval of validation) and what came
out. Where a candidate stands is read from its own directory: the command that is started again finds what is done.
"""

import json
import math
import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tunesmith.checkpoint.claim import claim_run_dir, is_run
from tunesmith.checkpoint.manifest import find_damage, list_checkpoints, step_of
from tunesmith.checkpoint.resume import Progress
from tunesmith.config.dump import to_mapping
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Run
from tunesmith.distributed.ranks import Ranks, refuse_many_ranks, started_as
from tunesmith.errors import (
    NonFiniteError,
    OtherRankError,
    RecipeError,
    RunError,
    ShortOfMemoryError,
    StoppedError,
    UsageError,
)
from tunesmith.host.files import write_atomically
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.host.signals import StopRequest
from tunesmith.metrics.record import read_records
from tunesmith.metrics.terminal import format_seconds
from tunesmith.optim.lr_schedule import warmup_steps
from tunesmith.run_dir import FINAL, METRICS, SWEEP, read_sweep, reason_of
from tunesmith.sweep.search import Search, halve, rung_steps
from tunesmith.sweep.shared_base import SharedBase
from tunesmith.sweep.space import Space, check_count
from tunesmith.training.run import joined, start_run
from tunesmith.training.stop_control import StopControl
from tunesmith.units import Cadence, Length, Size

# How candidates of a range are drawn and stopped, in sweep.json beside the search: others were to be had once.
METHOD = {"sampler": "random", "pruner": "halving"}


@dataclass
class SweepRun:
    """One candidate of a sweep, and what is known of it: `losses` by step, infinite where it diverged."""

    name: str
    values: dict[str, str]
    run: Run
    losses: dict[int, float] = field(default_factory=dict)
    state: str = "waiting"  # then stopped, finished or diverged
    step: int = 0

    @property
    def loss(self) -> float:
        return self.losses[max(self.losses)] if self.losses else math.inf

    def plain(self) -> dict[str, Any]:
        losses = {
            str(step): loss if math.isfinite(loss) else None for step, loss in self.losses.items()
        }
        about = {
            "name": self.name,
            "run_dir": self.run.output_dir,
            "values": self.values,
            "state": self.state,
        }
        return {**about, "step": self.step, "loss": losses.get(str(self.step)), "losses": losses}


def run_sweep(
    recipe: str | Path,
    space: Space,
    search: Search,
    *,
    say: Callable[[str], None],
    argv: list[str] | None = None,
) -> dict[str, Any]:
    """Train the candidates of `space` over one base; what sweep.json holds. Errors are those of `train`.

    A candidate whose loss is not finite is out; any other error ends the sweep, which the same command goes on with.
    """
    check_count(space, search.candidates)
    base = load_recipe(recipe, space.fixed, say=say)
    check_sweep(base, space, search)
    if started_as() is None:
        refuse_many_ranks("sweep")
    ends = [{key: str(end)} for key, span in space.ranges.items() for end in (span.low, span.high)]
    for values in [*space.grid(), *ends]:  # a wrong value is found before anything is loaded
        load_recipe(recipe, [*space.fixed, *(f"{key}={value}" for key, value in values.items())])
    with joined(base) as (stop, ranks), ExitStack() as stack:
        with ranks.together():
            if ranks.leads:
                if is_run(folder := Path(base.output_dir)):
                    what = "output_dir holds a run, and a sweep has its runs below it"
                    raise UsageError(
                        what, where=str(folder), fix=shell_word(f"output_dir={folder}-sweep")
                    )
                stack.enter_context(claim_run_dir(folder))
        sweep = Sweep(recipe, base, space, search, stop, ranks, say, argv)
        sweep.search_best()
        return sweep.outcome()


def check_sweep(run: Run, space: Space, search: Search) -> None:
    """RecipeError where the recipe cannot be swept over one base."""
    train, data, seeds = run.train, run.data, "train.seed" in {*space.choices, *space.ranges}
    for wrong, where, what, fix in (
        (run.adapter.kind != "lora", "adapter.kind", "full fine-tuning has no base that stays", "adapter.kind=lora"),
        (run.parallel.tensor != 1, "parallel.tensor", "a sweep cuts no adapter over a group", "parallel.tensor=1"),
        (train.duration.seconds, "train.duration", "a sweep counts steps, not time", "train.duration='500 steps'"),
        (seeds and data.hold_out, "train.seed", "the seed draws the held-out rows too", "data.validation in place of hold_out"),
        (seeds and run.model.added_tokens, "train.seed", "the seed draws the added tokens too", "one train.seed"),
        (not (data.validation or data.hold_out or search.rungs == 0), "data.validation",
         "no rows are held out, and val_loss stops candidates",
         "data.hold_out='5 %', or --to-the-end, which compares training losses"),
    ):  # fmt: skip
        if wrong:
            raise RecipeError(what, where=where, fix=fix)


@dataclass(eq=False)
class Sweep:
    """The state of one sweep, alike on every rank."""

    recipe: str | Path
    base: Run
    space: Space
    search: Search
    stop: StopRequest
    ranks: Ranks
    say: Callable[[str], None]
    argv: list[str] | None

    def __post_init__(self) -> None:
        self.folder, self.candidates, self.stopped = (
            Path(self.base.output_dir),
            list[SweepRun](),
            "",
        )
        asked = {
            "recipe": to_mapping(self.base),
            "keys": self.space.plain(),
            "search": {**vars(self.search), **METHOD},
        }
        self.asked: dict[str, Any] = json.loads(json.dumps(asked))  # as it is read back
        with self.ranks.together():
            before = self._read() if self.ranks.leads else {}
        before = self.ranks.share(before)
        self.diverged = {
            c["name"]: c["step"] for c in before.get("candidates", ()) if c["state"] == "diverged"
        }
        self.fixed: dict[str, Any] = before.get("fixed") or {}
        self.fixed = self.fixed or self._fix()

    def _read(self) -> dict[str, Any]:
        """What an earlier start of the same sweep wrote; UsageError where it was another one."""
        file = self.folder / SWEEP
        known: dict[str, Any] = {}
        try:
            known = read_sweep(file) if os.path.lexists(file) else {}
        except (OSError, ValueError) as error:
            what = "sweep.json is damaged, or no sweep wrote it"
            fix = f"{shell_word(f'output_dir={self.folder}-2')}, or delete that folder"
            raise UsageError(what, where=str(file), why=reason_of(error), fix=fix) from error
        search = known["asked"].get("search") if known else None
        if isinstance(search, dict) and not self.space.ranges:
            search.update(METHOD)  # of lists nothing is drawn, whatever an earlier version noted
        if differ := [
            name
            for name, value in self.asked.items()
            if known and known["asked"].get(name) != value
        ]:
            what, fix = (
                "this folder holds another sweep",
                f"{shell_word(f'output_dir={self.folder}-2')}, or delete that folder",
            )
            raise UsageError(what, where=str(file), why=f"its {', '.join(differ)} differ", fix=fix)
        return known

    @cached_property
    def shared(self) -> SharedBase:
        """The base, loaded when the first candidate has steps to train."""
        wide = [
            word for key in ("adapter.rank", "adapter.dropout") for word in self.space.widest(key)
        ]
        widest = load_recipe(self.recipe, [*self.space.fixed, *wide])
        return SharedBase(self._pinned(widest) if self.fixed else widest, self.ranks, self.say)

    def _fix(self) -> dict[str, Any]:
        """What all candidates share, and a sweep that goes on must find as it was."""
        first, run = self.shared.first, self.base
        total, every = first.total_steps or 0, run.validate.every
        count = self.search.candidates if self.space.ranges else len(self.space.grid())
        per_epoch = first.data.schedule.steps_per_epoch(0)
        interval = Cadence(every, total=total, steps_per_epoch=per_epoch, seconds=0.0).interval
        warmups = [Length.parse(text) for text in self.space.choices.get("train.warmup", ())] or [
            run.train.warmup
        ]
        warmup = max(
            warmup_steps(replace(run.train, warmup=one), total, per_epoch) for one in warmups
        )
        rungs = rung_steps(total, count, interval, self.search.rungs, warmup)
        if not rungs and self.search.rungs is None:
            self.say(
                "every candidate trains to its end: too few of them, or of steps, to stop some (see --rungs)"
            )
        if rungs and (not interval or rungs[0] % interval):
            every = Length(rungs[0], "steps")
            self.say(
                f"validate.every is {every} in the recipe of each candidate: they are compared there"
            )
        micro_batch = str(first.plan.layout.micro_batch)
        return {
            "steps": total,
            "rungs": rungs,
            "micro_batch": micro_batch,
            "validate_every": every and str(every),
        }

    def _pinned(self, run: Run) -> Run:
        """The recipe with what the sweep has fixed, so that `train` alone gives the same bits anywhere."""
        every, size = self.fixed["validate_every"], Size.parse(self.fixed["micro_batch"])
        validate = replace(run.validate, every=every and Length.parse(every))
        return replace(run, validate=validate, train=replace(run.train, micro_batch=size))

    def add(self, values: dict[str, str]) -> SweepRun:
        """Make a candidate; its folder's name tells its number and values."""
        values = self.ranks.share(values)
        run = load_recipe(
            self.recipe, [*self.space.fixed, *(f"{key}={value}" for key, value in values.items())]
        )
        words = "-".join(f"{key.rpartition('.')[2]}-{value}" for key, value in values.items())
        name = f"{len(self.candidates) + 1:02d}-" + re.sub(r"[^\w.+-]+", "_", words)[:80]
        self.candidates.append(
            SweepRun(name, values, replace(self._pinned(run), output_dir=str(self.folder / name)))
        )
        return self.candidates[-1]

    def search_best(self) -> None:
        """Train the candidates, as far as the search asks for."""
        if self.space.ranges:
            values = self.space.draw(self.search.candidates, self.base.train.seed)
        else:
            values = self.space.grid()
        candidates = [self.add(of_one) for of_one in values]
        self.write()
        halve(candidates, self.fixed["rungs"], self.measure)

    def measure(self, candidate: SweepRun, until: int | None) -> float:
        """The loss of a candidate after step `until`, or at its end, trained as far as it has to be; infinite where it
        diverged."""
        began, out_at = time.perf_counter(), self.diverged.get(candidate.name, math.inf)
        out = (until or self.fixed["steps"], math.inf, "diverged")
        found = out if out[0] >= out_at else self._reached(candidate, until)
        if found is None:
            stop = StopControl(
                self.stop,
                Path(candidate.run.output_dir),
                self.ranks,
                announce=self.say,
                retry_with_smaller_batch=False,  # all candidates share one micro batch
            )
            base = self.shared.build
            try:
                start_run(
                    candidate.run,
                    stop,
                    self.ranks,
                    say=None,
                    argv=self.argv,
                    build=base,
                    pause_after=until,
                )
                found = self._reached(candidate, until)
            except StoppedError as error:
                if isinstance(error, ShortOfMemoryError):
                    error.fix += f"; the micro batch stays at {self.fixed['micro_batch']}, as for all candidates"
                self.stopped = error.what
                self.write()
                raise
            except (NonFiniteError, OtherRankError) as error:
                if not isinstance(error, NonFiniteError) and not isinstance(
                    error.__cause__, NonFiniteError
                ):
                    raise
                found = out
            assert found is not None
        candidate.step, loss, candidate.state = found
        candidate.losses[candidate.step] = loss
        self.write()
        seconds = format_seconds(time.perf_counter() - began)
        self.say(
            f"{candidate.name}: step {candidate.step}  {self.compared} {loss:.4f}  {candidate.state}  {seconds}"
        )
        return loss

    @property
    def compared(self) -> str:
        return "val_loss" if self.base.data.validation or self.base.data.hold_out else "loss"

    def _reached(self, candidate: SweepRun, until: int | None) -> tuple[int, float, str] | None:
        """Step, loss and state of a candidate that has come so far, by rank 0's directory; a collective call."""
        found: tuple[int, float, str] | None = None
        with self.ranks.together():
            if self.ranks.leads:
                found = self._read_loss(Path(candidate.run.output_dir), until)
        return self.ranks.share(found)

    def _read_loss(self, folder: Path, until: int | None) -> tuple[int, float, str] | None:
        final = step_of(folder / FINAL)
        checkpoints = list_checkpoints(folder)
        saved = [c.step for c in checkpoints if find_damage(c.path, contents=False) is None]
        newest = max(saved, default=0)
        if final is None and (until is None or newest < until):
            return None
        records = {record.step: record for record in read_records(folder / METRICS)}
        step = final if final is not None and (until is None or final < until) else until
        assert step is not None
        # A signal may have cut off the validation: the next start measures and writes the record.
        if step == newest and step not in records and not _is_validated(folder, step):
            return None
        if step not in records or (self.compared == "val_loss" and records[step].val_loss is None):
            what = f"a candidate's records hold no {self.compared} of step {step}"
            fix = f"rm -r {shell_path(folder)}   # the same command trains this candidate again"
            raise RunError(what, where=str(folder / METRICS), why="somebody changed them", fix=fix)
        if self.compared == "loss":
            last = list(records.values())[-max(1, len(records) // 10) :]
            return step, sum(record.loss for record in last) / len(last), "finished"
        loss = records[step].val_loss
        assert loss is not None
        if not math.isfinite(loss):
            return step, math.inf, "diverged"
        return step, loss, "finished" if step == final else "stopped"

    def write(self) -> None:
        """Write sweep.json."""
        if self.ranks.leads:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / SWEEP, json.dumps(self.outcome(), indent=1))

    def outcome(self) -> dict[str, Any]:
        """What came out so far: plain values, the best candidate's name among them."""
        ended = [candidate for candidate in self.candidates if candidate.state == "finished"]
        best = min(ended, key=lambda candidate: candidate.loss, default=None)
        candidates = [candidate.plain() for candidate in self.candidates]
        about = {
            "asked": self.asked,
            "fixed": self.fixed,
            "compared_by": self.compared,
            "stopped": self.stopped,
        }
        return {**about, "best": best and best.name, "candidates": candidates}


def _is_validated(folder: Path, step: int) -> bool:
    """Whether the validation due at a checkpoint's step was done before it was written."""
    return Progress.read(folder / f"checkpoint-{step}").validated
