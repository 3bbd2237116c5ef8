"""Execution of a sweep: all candidates train on the same base model.

Each candidate has a run directory in the sweep's output_dir. The file sweep.json in output_dir
holds the recipe and keys of the sweep, the values that are determined once for all candidates, and
the results. The run directory of a candidate shows whether the candidate is finished, so the same
command resumes the sweep.
"""

import json
import logging
import math
import os
import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tunesmith.checkpoint.claim import claim_run_dir, is_run
from tunesmith.checkpoint.manifest import last_step_of
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
from tunesmith.run_dir import (
    FINAL,
    METRICS,
    SWEEP,
    read_failure,
    read_object,
    reason_of,
    weights_step,
)
from tunesmith.start.run import StartOptions, joined, start_run
from tunesmith.tools.sweep.shared_base import SharedBase
from tunesmith.tools.sweep.space import Space
from tunesmith.tools.sweep.sweep_file import CandidateResult, FixedValues, SweepResult
from tunesmith.training.stop_control import StopControl
from tunesmith.units import Size

log = logging.getLogger(__name__)


def run_sweep(recipe: str | Path, space: Space, *, argv: list[str] | None = None) -> SweepResult:
    """Train all candidates on one base model, and return the content of sweep.json.

    The same call resumes a sweep. If the loss of a candidate is not finite, the candidate counts as
    diverged, and the sweep continues. Any other error ends the sweep. The errors are those of
    `train`.

    Args:
        recipe: the file or the name of the recipe.
        space: the candidates.
        argv: the command line, which is stored in each run directory.
    """
    base = load_recipe(recipe, space.fixed)
    check_sweep(base, space)
    if started_as() is None:
        require_one_process("sweep")
    folder = Path(base.output_dir)
    runs = []
    candidates = []
    # Load all recipes first, so that a wrong value is reported before the model is loaded.
    for number, values in enumerate(space.grid(), 1):
        words = [f"{key}={value}" for key, value in values.items()]
        label = "-".join(f"{key.rpartition('.')[2]}-{value}" for key, value in values.items())
        # Replace characters that are not safe in a folder name, and limit its length.
        name = f"{number:02d}-" + re.sub(r"[^\w.+-]+", "_", label)[:80]
        run_dir = str(folder / name)
        runs.append(replace(load_recipe(recipe, [*space.fixed, *words]), output_dir=run_dir))
        candidates.append(
            CandidateResult(
                name=name, run_dir=run_dir, values=values, state="waiting", step=0, loss=None
            )
        )
    # Plan the memory with the largest rank and dropout, so that every candidate fits.
    rank = max(run.adapter.rank for run in runs)
    dropout = max(run.adapter.dropout for run in runs)
    widest = replace(base, adapter=replace(base.adapter, rank=rank, dropout=dropout))
    # Convert to JSON and back, so that `asked` can be compared with the value in sweep.json. For
    # example, tuples become lists.
    asked = json.loads(json.dumps({"recipe": to_mapping(base), "keys": dict(space.choices)}))
    with joined(base) as (stop, ranks), ExitStack() as stack:
        fixed: FixedValues | None = None
        with ranks.raise_on_all_ranks():
            if ranks.is_main_process:
                if is_run(folder):
                    raise UsageError(
                        "output_dir contains a run, but a sweep needs its own folder",
                        where=folder,
                        fix=f"set {shell_word(f'output_dir={folder}-sweep')}",
                    )
                stack.enter_context(claim_run_dir(folder, inputs_of(base).values()))
                fixed = read_fixed(folder / SWEEP, asked)
        # All ranks use the values that rank 0 has read.
        fixed = ranks.broadcast_object(fixed)
        shared = SharedBase(pinned(widest, fixed) if fixed else widest, ranks)
        result: SweepResult = {
            "asked": asked,
            "fixed": fixed
            or {
                "steps": shared.first.total_steps or 0,
                "micro_batch": str(shared.first.plan.layout.micro_batch),
                "dtype": shared.first.recipe.model.dtype,
            },
            "compared_by": "val_loss" if base.data.validation or base.data.hold_out else "loss",
            "stopped": "",
            "best": None,
            "candidates": candidates,
        }
        train_candidates(runs, result, shared, stop, argv)
    return result


def check_sweep(run: Run, space: Space) -> None:
    """Raise RecipeError if the candidates cannot share a base model or cannot be compared."""
    varies_seed = "train.seed" in space.choices
    draws_rows = run.data.hold_out and run.data.hold_out_seed is None
    for is_refused, where, what, fix in (
        (
            run.adapter.kind != "lora",
            "adapter.kind",
            "a sweep needs a frozen base",
            "set adapter.kind=lora",
        ),
        (
            run.samples_answers,
            "method.name",
            "a sweep does not support grpo: each candidate would sample its own answers",
            "start one run for each candidate",
        ),
        (
            run.parallel.tensor != 1,
            "parallel.tensor",
            "a sweep does not support tensor parallelism",
            "set parallel.tensor=1",
        ),
        (
            run.train.duration.seconds,
            "train.duration",
            "a sweep needs a duration in steps or epochs",
            "set train.duration='500 steps'",
        ),
        (
            varies_seed and draws_rows,
            "train.seed",
            "a sweep cannot vary the seed, because the seed also selects the held-out rows",
            f"set data.hold_out_seed={run.train.seed}",
        ),
        (
            varies_seed and run.model.added_tokens,
            "train.seed",
            "a sweep cannot vary the seed, because the seed also initializes the added tokens",
            "give train.seed only one value",
        ),
    ):
        if is_refused:
            raise RecipeError(what, where=where, fix=fix)


def read_fixed(file: Path, asked: dict[str, object]) -> FixedValues | None:
    """Read the fixed values from the sweep.json of an earlier start of this sweep.

    Return None if the file does not exist. Raise UsageError if the file belongs to another sweep.

    Args:
        asked: the recipe and the keys of this sweep.
    """
    # Use lexists, because it is also True for a broken symbolic link, which must not be
    # overwritten.
    if not os.path.lexists(file):
        return None
    try:
        previous = read_object(file, SweepResult)
        if previous["asked"] == asked:
            return previous["fixed"]
        why = "the other sweep has a different recipe or different keys"
    except (OSError, ValueError) as error:
        why = reason_of(error)
    raise UsageError(
        "this folder contains another sweep",
        where=file,
        why=why,
        fix=f"set {shell_word(f'output_dir={file.parent}-2')}, or delete the folder",
    )


def pinned(run: Run, fixed: FixedValues) -> Run:
    """Return the recipe with the dtype and the micro batch that are fixed for all candidates.

    Therefore `train` with a candidate's recipe uses the same values, even on another machine.
    """
    return replace(
        run,
        model=replace(run.model, dtype=fixed["dtype"]),
        train=replace(run.train, micro_batch=Size.parse(fixed["micro_batch"])),
    )


def train_candidates(
    runs: list[Run],
    result: SweepResult,
    shared: SharedBase,
    stop: StopRequest,
    argv: list[str] | None,
) -> None:
    """Train all candidates that are neither finished nor diverged.

    The results are written to `result` and to sweep.json after each candidate.
    """
    ranks = shared.ranks
    candidates = result["candidates"]
    fixed = result["fixed"]
    compared_by = result["compared_by"]

    def write() -> None:
        losses = {c["name"]: c["loss"] for c in candidates if c["loss"] is not None}
        result["best"] = min(losses, key=losses.__getitem__, default=None)
        if ranks.is_main_process:
            file = Path(runs[0].output_dir).with_name(SWEEP)
            write_atomically(file, json.dumps(result, indent=1))

    # Write sweep.json before the first candidate trains, so that the sweep can be resumed.
    write()
    for number, (run, candidate) in enumerate(zip(runs, candidates, strict=True), 1):
        name = candidate["name"]
        outcome = read_outcome(Path(run.output_dir), compared_by, ranks)
        if outcome is None:
            log.info(
                f"{name}: training candidate {number} of {len(runs)} up to step {fixed['steps']}"
            )
            control = StopControl(stop, Path(run.output_dir), ranks)
            options = StartOptions(quiet=True, argv=argv, build_session=shared.build)
            try:
                # Print only messages of the sweep and of stop signals. The messages of a candidate
                # are written to the candidate's log.txt.
                with stderr_only_from(log.name, signals.__name__):
                    start_run(pinned(run, fixed), control, ranks, options)
            except StoppedError as error:
                if isinstance(error, LowMemoryError):
                    error.fix = (
                        f"{FREE_MEMORY_FIX}, then start the same command again; the micro batch"
                        f" remains {fixed['micro_batch']}, as for all candidates"
                    )
                result["stopped"] = error.what
                write()
                raise
            except NonFiniteError:
                pass  # the candidate has diverged
            except OtherRankError as error:
                # Rank 0 raises NonFiniteError. The other ranks raise an OtherRankError with this
                # cause.
                if not isinstance(error.__cause__, NonFiniteError):
                    raise
            outcome = read_outcome(Path(run.output_dir), compared_by, ranks)
            assert outcome is not None
        candidate["step"], loss = outcome
        candidate["state"] = "finished" if math.isfinite(loss) else "diverged"
        # Store None for an infinite loss, because JSON has no infinity.
        candidate["loss"] = loss if math.isfinite(loss) else None
        write()
        log.info(f"{name}: step {outcome[0]}  {compared_by} {loss:.4f}  {candidate['state']}")


def read_outcome(folder: Path, compared_by: str, ranks: Ranks) -> tuple[int, float] | None:
    """Return the last step and the loss of a candidate. This is a collective call.

    The loss is the val_loss of the weights in final/. If there is no validation, it is the mean
    training loss at the end. It is infinite if the candidate has diverged. Return None if the
    candidate is neither finished nor diverged.

    Args:
        folder: the run directory of the candidate.
        compared_by: `val_loss` or `loss`.
    """
    outcome: tuple[int, float] | None = None
    with ranks.raise_on_all_ranks():
        step = last_step_of(folder / FINAL) if ranks.is_main_process else None
        failure = read_failure(folder).value or {}
        if step is not None:
            records = read_records(folder / METRICS)
            # final/ may contain the weights of an earlier step that had a lower val_loss. Return
            # the val_loss of that step.
            losses = {record.step: record.val_loss for record in records}
            loss = losses.get(weights_step(folder / FINAL) or step)
            if compared_by == "loss":
                loss = RunFigures.of(records).loss
            if loss is None:
                raise RunError(
                    f"the records of a candidate have no {compared_by} of step {step}",
                    where=folder / METRICS,
                    why="the records were edited",
                    fix=f"run `rm -r {shell_path(folder)}`, then run the same command again",
                )
            outcome = step, loss
        elif failure.get("cause") == NonFiniteError.cause:
            outcome = failure.get("last_step") or 0, math.inf
    return ranks.broadcast_object(outcome)
