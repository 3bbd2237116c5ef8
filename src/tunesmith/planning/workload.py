"""The work of a run: tokens and operations of its steps, from the token cache or from
assumptions.
"""

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from tunesmith.batches.schedule import BatchSchedule, StepSize
from tunesmith.config.schema import Run
from tunesmith.model.arch.spec import ModelSpec, flops
from tunesmith.model.layers.documents import count_saved_probabilities
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning.measured_layers import count_active_adapter
from tunesmith.tokens.token_set import TokenSet
from tunesmith.units import ceil_div


class ExampleSource(NamedTuple):
    """Number and mean length of a run's examples, and where these figures come from.

    Attributes:
        rows: number of training examples. 0 if unknown.
        length: mean number of tokens per example.
        is_cached: whether the examples are in the token cache. In this case, both figures are
            exact.
        is_assumed: whether the length is unknown, so that examples are assumed to fill
            `data.seq_len`.
        is_estimated: whether `length` is estimated from characters.
        is_stated: whether the user stated the number of rows.
        held_out: number of examples that are held out.
    """

    rows: int
    length: float
    is_cached: bool = False
    is_assumed: bool = False
    is_estimated: bool = False
    is_stated: bool = False
    held_out: int = 0


class Workload(NamedTuple):
    """Numbers of tokens and operations of a run, for estimates of its memory and time.

    Attributes:
        steps: number of optimizer steps. None if unknown.
        operations: floating-point operations per computed token.
        attention, experts: fractions of `operations` that attention and the experts' matmuls need.
        probabilities: mean number of attention probabilities that a head saves per token on a CPU.
        whole: number of tokens of all sequences, divided by the number of computed tokens. It is
            more than 1 if the sequences of a pair share tokens.
        source: number and length of the examples, and where these figures come from.
        pictures: fraction of the tokens that are placeholders for pictures. None if unknown.
    """

    step: StepSize
    longest: int
    steps: int | None
    operations: float
    attention: float
    experts: float
    probabilities: float
    whole: float
    source: ExampleSource
    pictures: float | None = 0.0


class _Sequences(NamedTuple):
    """Numbers of tokens of the examples. If the rows are unknown, one example represents all.

    Attributes:
        lengths: int64 [n], tokens of all sequences of each example.
        shared: int64, tokens of each part that is not computed again, because sequences share it.
            For sampled answers it has one value for each sequence.
        documents: int64 [sequences], tokens of each sequence.
        supervised: number of supervised tokens.
    """

    lengths: np.ndarray
    shared: np.ndarray
    documents: np.ndarray
    supervised: int

    @property
    def computed(self) -> float:
        """Number of tokens that the model computes."""
        return float(self.lengths.sum() - self.shared.sum())


def measure_work(
    run: Run,
    spec: ModelSpec,
    tokens: TokenSet | None,
    length: int | None = None,
    schedule: BatchSchedule | None = None,
    *,
    rows: int = 0,
) -> Workload:
    """Compute the numbers of tokens and operations of a run.

    If `tokens` is None, each example has `length` tokens, or `data.seq_len` tokens by default. A
    sampled answer is assumed to have `method.answer_tokens` tokens.

    Args:
        rows: number of examples if `tokens` is None. 0 if it is unknown.
    """
    steps = None
    pictures = None if run.model.vision else 0.0
    if tokens is not None:
        lengths = tokens.lengths
        examples = _Sequences(
            lengths, tokens.shared, tokens.document_lengths(), tokens.counts.supervised
        )
        schedule = schedule or BatchSchedule(run, tokens)
        step = schedule.step_size()
        steps = schedule.steps(run.train.duration)
        longest = schedule.longest
        source = ExampleSource(len(lengths), float(lengths.mean()), is_cached=True)
        if run.model.vision:
            pictures = float(tokens.picture_tokens.sum() / lengths.sum())
    else:
        sequences = run.row_tokens // run.data.seq_len
        longest = min(length or run.row_tokens, run.row_tokens)
        documents = np.repeat(longest // sequences, sequences)
        examples = _Sequences(np.array([longest]), np.zeros(1, np.int64), documents, longest)
        step, steps = _steps_of_equal_rows(run, rows, longest)
        source = ExampleSource(rows, longest, is_assumed=not length)
    if run.samples_answers:
        answers = 0 if tokens is None else tokens.supervised
        groups, longest = _sample_answers(run, examples.lengths - answers)
        step = scale_step(step, groups.computed / examples.computed)
        examples = groups
    everything, attention, experts = _operations(run, spec, examples)
    shared = examples.shared if run.samples_answers else 0
    return Workload(
        step,
        longest=longest,
        steps=steps,
        operations=everything / examples.computed,
        attention=attention,
        experts=experts,
        probabilities=float(count_saved_probabilities(examples.documents, shared).sum())
        / examples.computed,
        whole=float(examples.lengths.sum()) / examples.computed,
        source=source,
        pictures=pictures,
    )


def _sample_answers(run: Run, prompts: np.ndarray) -> tuple[_Sequences, int]:
    """Return prompts with their groups of sampled answers, and the number of tokens of the longest
    prompt with an answer.

    Args:
        prompts: int64 [n], tokens of each prompt.
    """
    group = run.method.group
    answer = run.method.answer_tokens
    prompts = np.minimum(prompts, run.data.seq_len - answer)
    sequences = _Sequences(
        lengths=group * (prompts + answer),
        # The prompt is computed once, with the first of its answers.
        shared=np.outer(prompts, np.arange(group) > 0).flatten(),
        documents=np.repeat(prompts + answer, group),
        supervised=group * answer * len(prompts),
    )
    return sequences, int(prompts.max()) + answer


def _operations(run: Run, spec: ModelSpec, examples: _Sequences) -> tuple[float, float, float]:
    """Return the floating-point operations of all examples, and the fractions that attention and
    the experts' matmuls need.
    """
    is_adapter = run.adapter.kind == "lora"
    count = partial(
        flops,
        trained="lora" if is_adapter else "full",
        adapter_parameters=count_active_adapter(spec, run.adapter) if is_adapter else 0,
        forwards=run.extra_forwards,
    )

    def operations(spec: ModelSpec) -> float:
        return count(spec, examples.documents.tolist(), examples.supervised) - count(
            spec, examples.shared.tolist(), 0
        )

    everything = operations(spec)
    # Without heads there is no attention, so the remaining operations are those of the matmuls.
    without_heads = tuple(replace(layer, heads=0) for layer in spec.layers)
    products = operations(replace(spec, layers=without_heads))
    experts = (4 if is_adapter else 6) * spec.active_of_experts * examples.computed
    return everything, 1 - products / everything, experts / everything


def _steps_of_equal_rows(run: Run, rows: int, length: int) -> tuple[StepSize, int | None]:
    """Compute the tokens of a step and the number of steps for examples of equal length.

    Args:
        rows: number of examples, or 0 if it is unknown.
        length: tokens of each example.
    """
    duration = run.train.duration
    steps = int(duration.amount) if duration.unit == "steps" else None
    units_per_step = step_units(run)
    # A unit is an example, or a packed row if the recipe counts tokens.
    units, unit_tokens = rows, length
    counts_examples = run.train.global_batch.unit == "examples"
    if not counts_examples:
        units, unit_tokens = ceil_div(rows, run.row_tokens // length), run.row_tokens
    if not rows:
        tokens = units_per_step * unit_tokens
        return StepSize(tokens, tokens), steps
    steps_per_epoch = ceil_div(units, units_per_step)
    if duration.unit == "epochs":
        # Subtract a small number before rounding up, so that rounding errors of fractions do not
        # add a step.
        steps = max(1, math.ceil(duration.amount * steps_per_epoch - 1e-6))
    largest = min(units, units_per_step) * unit_tokens
    # The last step of an epoch may have fewer examples.
    mean = rows * length / steps_per_epoch if counts_examples else largest
    return StepSize(mean, largest), steps


def step_units(run: Run) -> int:
    """Return the number of units in an optimizer step. A unit cannot be divided between ranks.

    A unit is an example, or a packed row if the recipe counts tokens.
    """
    size = run.train.global_batch
    if size.unit == "examples":
        return size.amount
    return max(1, size.amount // run.row_tokens)


def rank_step(run: Run, step: StepSize, mesh: MeshShape) -> StepSize:
    """Return the tokens of a step (mean and maximum) on the data rank with the most tokens."""
    units = step_units(run)
    # Units cannot be divided, so the rank with the most units has the average number, rounded up.
    return scale_step(step, ceil_div(units, mesh.data) / units)


def scale_step(step: StepSize, factor: float) -> StepSize:
    return StepSize(step.mean * factor, math.ceil(step.largest * factor))
