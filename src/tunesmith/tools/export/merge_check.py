"""The check that a merged model answers like the adapter over its base: what is compared, and
what is required.

fp32    They differ by rounding only: the largest logit difference is at most 1e-4 for logits up to
        10, in proportion above.
bf16    Every merged weight is rounded once more, and 16-bit matmuls are noisy themselves. So three
fp16    things are required. In fp32 arithmetic the merge answers like the adapter (the rule above).
        The written weights are that merge, rounded once. In the written type the mean KL divergence
        is small beside what the training changed, or beside the noise of the type: the merged model
        against itself with another attention kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tunesmith.config.schema import Source
from tunesmith.data.rows.formats import convert_sample
from tunesmith.data.source.open_source import read_rows
from tunesmith.errors import CheckpointError, TunesmithError
from tunesmith.inference.load_run import OpenedRun
from tunesmith.tools.export.tuned_weights import TunedModel
from tunesmith.units import count_of

FP32_LIMIT = 1e-4
KL_SHARE = 0.1  # of what the training changed
KL_NOISE = 4.0  # times the noise of the type
MERGE_KL_FLOOR_NATS = 1e-4  # a token; nobody can tell such models apart
PROBES = 6
PROMPT_TOKENS = 48  # of each prompt: the logits of a vocabulary of 128k take 150 MB then
SENTENCES = (
    "The lighthouse keeper wrote down the weather every morning before breakfast.",
    "To bake bread you need flour, water, salt, yeast and some patience.",
    "def area(width, height):\n    return width * height\n",
    "Question: Which is heavier, a kilogram of iron or a kilogram of wool?\nAnswer:",
    "In 1969 two people walked on the Moon while a third waited in orbit.",
    "Name: Ada. City: Turin. Order: two lamps, blue, by Friday.",
)


@dataclass(frozen=True)
class Difference:
    """The distance of two sets of logits over the same positions.

    Attributes:
        max_logit: largest absolute difference of any logit.
        mean_kl: Kullback-Leibler divergence of the second from the first, in nats, mean over
            positions.
        agreement: share of positions where both have the same most likely token.
        median_kl: the same divergence, median over positions.
    """

    max_logit: float
    mean_kl: float
    agreement: float
    median_kl: float


@dataclass(frozen=True)
class ExactCheck:
    """The merge in fp32, and the written weights compared with it.

    Attributes:
        difference: adapter against merge, both in fp32 arithmetic.
        largest: largest absolute logit there.
        off: values further from the fp32 merge than one rounding explains.
    """

    difference: Difference
    largest: float
    tensors: int
    values: int
    off: int


@dataclass(frozen=True)
class MergeCheck:
    """The comparisons of a merged model, and the result.

    Attributes:
        dtype: of the written weights, and of the matmuls of the next three.
        merged: the written folder, loaded by Transformers, against the adapter over its base.
        base: the base against the adapter over it: the size of what the training changed.
        noise: the merged model with another attention kernel against itself.
        largest: largest absolute logit, the scale of `max_logit`.
        positions: token positions compared.
        probes: where the prompts came from.
        exact: None for fp32 itself.
        rules: each requirement in words, and whether it holds.
    """

    dtype: str
    merged: Difference
    base: Difference
    noise: Difference
    largest: float
    positions: int
    probes: str
    exact: ExactCheck | None
    rules: tuple[tuple[str, bool], ...]

    @property
    def passed(self) -> bool:
        return all(holds for _, holds in self.rules)


def compare_logits(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Difference:
    """Compare logits, prompt by prompt: fp32 [tokens, vocabulary] each, on the CPU; CheckpointError
    if not finite."""
    largest = 0.0
    agreeing = 0
    divergences = []
    for p, q in zip(reference, other, strict=True):
        for logits, whose in ((p, "the tuned model"), (q, "the model compared with it")):
            if torch.isfinite(logits).all():
                continue
            raise CheckpointError(
                "the logits are not finite",
                where=f"{whose}, on the prompts of the check",
                why="the adapter diverged, or the weights are too large for fp16",
                fix="use --dtype bf16 or fp32, or an earlier checkpoint",
            )
        log_p = p.double().log_softmax(-1)
        log_q = q.double().log_softmax(-1)
        largest = max(largest, (p - q).abs().max().item())
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
    # Rounding may leave the divergence of equal models a little below 0.
    kl = torch.cat(divergences).clamp_min(0.0)
    return Difference(largest, kl.mean().item(), agreeing / len(kl), kl.median().item())


def merge_rules(
    dtype: str,
    merged: Difference,
    base: Difference,
    noise: Difference,
    largest: float,
    exact: ExactCheck | None,
) -> tuple[tuple[str, bool], ...]:
    """List what is required of a merge, and whether it holds; see the module's docstring."""
    if dtype == "fp32":
        return (_fp32_rule("", merged, largest),)
    # Whichever is the largest: what training changed, what the type rounds, and a floor.
    limit = max(KL_SHARE * base.mean_kl, KL_NOISE * noise.mean_kl, MERGE_KL_FLOOR_NATS)
    parts = f"{KL_SHARE:.0%} of base against adapter, {KL_NOISE:g} x the noise of {dtype}"
    text = f"in {dtype}: mean KL {merged.mean_kl:.2g}, at most {limit:.2g}"
    rules = [(f"{text} (the largest of {parts}, {MERGE_KL_FLOOR_NATS:g})", merged.mean_kl <= limit)]
    if exact is not None:
        rules.append(_fp32_rule("in fp32: ", exact.difference, exact.largest))
        count = f"{exact.values:,} in {exact.tensors} tensors"
        text = f"written weights: {count} are the fp32 merge rounded once, except {exact.off}"
        rules.append((text, exact.off == 0))
    return tuple(rules)


def _fp32_rule(prefix: str, difference: Difference, largest: float) -> tuple[str, bool]:
    limit = FP32_LIMIT * max(1.0, largest / 10)
    text = f"{prefix}largest logit difference {difference.max_logit:.1e}, at most {limit:.1e}"
    return f"{text} (logits reach {largest:.0f})", difference.max_logit <= limit


def largest_logit(logits: Sequence[torch.Tensor]) -> float:
    return max(part.abs().max().item() for part in logits)


def probe_prompts(
    read: OpenedRun, *, rows: int = PROBES, tokens: int = PROMPT_TOKENS
) -> tuple[list[list[int]], str]:
    """A few prompts as token ids, and where they come from: the run's held-out or training rows,
    else SENTENCES."""
    run = read.location.run
    sources: list[tuple[str, Source]] = []
    if run is not None:
        sources += [("validation", source) for source in run.data.validation[:1]]
        sources.append(("training", run.data.train[0]))
    for name, source in sources:
        prompts = []
        try:
            source_rows = read_rows(source)
            for number in range(min(rows, len(source_rows))):
                where = source_rows.where(number)
                system = read.recipe.data.system
                sample = convert_sample(source_rows[number], source, where=where, system=system)
                example = read.template.encode(sample, read.recipe.data.train_on, where=where)
                prompts.append(example.ids[:tokens].tolist())
        # The data need not be on the machine that merges.
        except TunesmithError:
            continue
        return prompts, count_of(len(prompts), f"{name} row")
    prompts = [read.files.tokenizer(text)["input_ids"][:tokens] for text in SENTENCES]
    return prompts, f"{len(prompts)} built-in sentences"


def count_off(written: TunedModel, tuned: TunedModel, dtype: torch.dtype) -> tuple[int, int, int]:
    """Compare what was written in 16 bits with the merge in fp32: (tensors, values, values off by
    more than half a last bit)."""
    info = torch.finfo(dtype)
    values = 0
    off = 0
    for name, weight in tuned.weights.items():
        for band in weight.bands():
            exact = weight.rows(band.start, band.stop)
            rounded = written.weights[name].rows(band.start, band.stop)
            # 1.01: two machines may sum B A in another order before the rounding.
            bound = exact.abs() * (1.01 * info.eps / 2) + info.smallest_normal * info.eps
            off += int(((rounded - exact).abs() > bound).sum())
            values += exact.numel()
    return len(tuned.weights), values, off
