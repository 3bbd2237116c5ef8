"""The work of a run: tokens and operations of its steps, by the token cache or as assumed."""

import math
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from tunesmith.config.schema import Run
from tunesmith.data.batches.schedule import BatchSchedule, StepSize
from tunesmith.data.tokens.token_set import TokenSet
from tunesmith.model.documents import count_saved_probabilities
from tunesmith.model.spec import ModelSpec, flops
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning.measured_layers import count_active_adapter
from tunesmith.units import ceil_div


class Workload(NamedTuple):
    """The tokens and operations of a run.

    Attributes:
        steps: None where unknown.
        operations: floating-point ones, of a token that is computed.
        attention, experts: the shares of attention and of the experts' products in them.
        probabilities: that a head keeps of a token on a CPU, on average.
        whole: tokens of sequences for each that is computed: more than 1 where the sequences of a
            pair share some.
        source: what the lengths of examples are from.
        pictures: the share of tokens that stand for pictures; None where unknown.
    """

    step: StepSize
    longest: int
    steps: int | None
    operations: float
    attention: float
    experts: float
    probabilities: float
    whole: float
    source: str
    pictures: float | None = 0.0


def measure_work(
    run: Run,
    spec: ModelSpec,
    tokens: TokenSet | None,
    length: int | None = None,
    schedule: BatchSchedule | None = None,
    *,
    rows: int = 0,
    source: str = "",
) -> Workload:
    """Measure the work of the recipe's tokens.

    Without tokens each example has `length` tokens, or fills `data.seq_len`.

    Args:
        rows: the number of such examples; 0 if it is unknown.
        source: the source of `length` and `rows`.
    """
    steps = None
    pictures = None if run.model.vision else 0.0
    shared = np.zeros(1, np.int64)
    if tokens is not None:
        lengths = tokens.lengths
        shared = tokens.shared
        documents = tokens.document_lengths()
        supervised = tokens.counts.supervised
        schedule = schedule or BatchSchedule.of(run, tokens)
        step = schedule.step_size()
        steps = schedule.steps(run.train.duration)
        source = f"{len(lengths):,} in the token cache, {lengths.mean():,.0f} tokens on average"
        if run.model.vision:
            pictures = float(tokens.picture_tokens.sum() / lengths.sum())
            source += f", {pictures:.1%} of them of pictures"
    else:
        sequences = run.row_tokens // run.data.seq_len
        supervised = min(length or run.row_tokens, run.row_tokens)
        lengths = np.array([supervised])
        documents = np.repeat(supervised // sequences, sequences)
        step, steps = _steps_of_equal_rows(run, rows, supervised)
    trained: Literal["full", "lora"] = "full"
    adapter_weights = 0
    if run.adapter.kind == "lora":
        trained = "lora"
        adapter_weights = count_active_adapter(spec, run.adapter)

    def operations(spec: ModelSpec) -> float:
        count = partial(
            flops,
            spec,
            trained=trained,
            adapter_parameters=adapter_weights,
            forwards=run.extra_forwards,
        )
        return count(documents.tolist(), supervised) - count(shared.tolist(), 0)

    everything = operations(spec)
    # Without heads no attention is counted: what is left is products.
    without_heads = tuple(replace(layer, heads=0) for layer in spec.layers)
    products = operations(replace(spec, layers=without_heads))
    total = float(lengths.sum() - shared.sum())
    experts = (6 if trained == "full" else 4) * spec.active_of_experts * total
    return Workload(
        step,
        longest=int(lengths.max()) if schedule is None else schedule.longest,
        steps=steps,
        operations=everything / total,
        attention=1 - products / everything,
        experts=experts / everything,
        probabilities=float(count_saved_probabilities(documents).sum()) / total,
        whole=float(lengths.sum()) / total,
        source=source,
        pictures=pictures,
    )


def _steps_of_equal_rows(run: Run, rows: int, length: int) -> tuple[StepSize, int | None]:
    """Compute what a step has, and the steps of the run, with `rows` examples of `length` tokens
    each; 0: their number is not known.
    """
    duration = run.train.duration
    steps = int(duration.amount) if duration.unit == "steps" else None
    units_per_step = step_units(run)
    counts_examples = run.train.global_batch.unit == "examples"
    unit_tokens = length if counts_examples else run.row_tokens
    if not rows:
        return StepSize(units_per_step * unit_tokens, units_per_step * unit_tokens), steps
    units = rows if counts_examples else ceil_div(rows, run.row_tokens // length)
    steps_per_epoch = ceil_div(units, units_per_step)
    if duration.unit == "epochs":
        # The small term removes what binary fractions add.
        steps = max(1, math.ceil(duration.amount * steps_per_epoch - 1e-6))
    largest = min(units, units_per_step) * unit_tokens
    # The last step of an epoch may have fewer examples.
    mean = rows * length / steps_per_epoch if counts_examples else largest
    return StepSize(mean, largest), steps


def step_units(run: Run) -> int:
    """Count what an optimizer step has, and no rank shares with another.

    Examples, or packed rows where the recipe counts tokens.
    """
    size = run.train.global_batch
    if size.unit == "examples":
        return size.amount
    return max(1, size.amount // run.row_tokens)


def rank_step(run: Run, step: StepSize, mesh: MeshShape) -> StepSize:
    """Find what the busiest data rank takes of a step."""
    units = step_units(run)
    # Examples and rows are not divided: the busiest rank's share is rounded up.
    share = ceil_div(units, mesh.data) / units
    return StepSize(step.mean * share, math.ceil(step.largest * share))
