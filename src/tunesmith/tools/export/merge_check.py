"""Comparison of the merged model's outputs with the outputs of the base model plus adapter.

The rules depend on the dtype of the written weights:

fp32    The outputs may differ only by rounding. The largest logit difference is at most 1e-4 for
        logits up to 10, and proportionally more for larger logits.
bf16    Every merged weight is rounded to 16 bits, and 16-bit matmuls add noise. Three rules apply:
fp16    1. In fp32 arithmetic the merge passes the fp32 rule.
        2. The written weights are the fp32 merge, rounded once.
        3. In the written dtype the mean KL divergence is small compared with the effect of the
           training, or with the noise of the dtype. The noise is the difference between two
           attention implementations on the merged model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tunesmith.answers.load_run import OpenedRun
from tunesmith.errors import CheckpointError, TunesmithError
from tunesmith.rows.formats import convert_sample
from tunesmith.rows.source.open_source import read_rows
from tunesmith.tools.export.tuned_weights import TunedModel
from tunesmith.units import count_of

FP32_LIMIT = 1e-4
# The KL between adapter and merged model must be at most KL_SHARE times the KL between base and
# adapter, or KL_NOISE times the noise of the dtype, or the floor, which is not noticeable.
KL_SHARE = 0.1
KL_NOISE = 4.0
MERGE_KL_FLOOR_NATS = 1e-4
PROBES = 6
# Maximum tokens per prompt. With a vocabulary of 128k, the logits of all prompts take 150 MB.
PROMPT_TOKENS = 48
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
    """Difference between the logits of two models at the same positions.

    Attributes:
        max_logit: largest absolute difference of a logit.
        mean_kl: KL divergence KL(reference || other) in nats, mean over positions.
        agreement: fraction of positions at which both models have the same most likely token.
        median_kl: KL divergence in nats, median over positions.
    """

    max_logit: float
    mean_kl: float
    agreement: float
    median_kl: float


@dataclass(frozen=True)
class ExactCheck:
    """Differences between the model with its adapter and the merged model, computed in fp32.

    Attributes:
        difference: difference between the logits of adapter and merge, both computed in fp32.
        largest: largest absolute logit of the adapter in fp32.
        tensors: number of written tensors.
        values: number of written values.
        off: number of values that differ from the fp32 merge by more than one rounding.
    """

    difference: Difference
    largest: float
    tensors: int
    values: int
    off: int


@dataclass(frozen=True)
class MergeCheck:
    """Result of the check of a merge: the comparisons, and the rules that the merge must pass.

    Attributes:
        dtype: dtype of the written weights. The logits of the written model are also computed in
            this dtype. Those of adapter and base are computed in the dtype of training, or in fp32
            if `dtype` is fp32.
        merged: difference between the adapter and the written model.
        base: difference between the adapter and the base model, which is the effect of the
            training.
        noise: difference between two attention implementations on the written model.
        largest: largest absolute logit of the adapter, with which `max_logit` is compared.
        positions: number of compared token positions.
        probes: the source of the prompts.
        exact: the comparison in fp32; None if the written weights are in fp32.
        rules: the result of `merge_rules`.
    """

    dtype: str
    merged: Difference
    base: Difference
    noise: Difference
    largest: float
    positions: int
    probes: str
    exact: ExactCheck | None
    rules: tuple[tuple[str, bool], ...] = ()

    @property
    def passed(self) -> bool:
        return all(holds for _, holds in self.rules)


def compare_logits(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Difference:
    """Compare the logits of two models.

    Both lists have one tensor per prompt: fp32 [tokens, vocabulary], on the CPU.

    Raise CheckpointError if a logit is not finite.
    """
    largest = 0.0
    agreeing = 0
    divergences = []
    for p, q in zip(reference, other, strict=True):
        for logits, model_name in ((p, "the tuned model"), (q, "the base or exported model")):
            if torch.isfinite(logits).all():
                continue
            raise CheckpointError(
                f"{model_name} computes logits that are infinite or NaN",
                where="prompts that tunesmith uses to compare the models",
                why="the adapter diverged, or the weights are too large for fp16",
                fix="use an earlier checkpoint, or use `tunesmith merge` with --dtype bf16 or fp32 "
                "if the weights are in fp16",
            )
        log_p = p.double().log_softmax(-1)
        log_q = q.double().log_softmax(-1)
        largest = max(largest, (p - q).abs().max().item())
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
    # Replace negative values by 0: rounding can make the KL divergence of equal models slightly
    # negative.
    kl = torch.cat(divergences).clamp_min(0.0)
    return Difference(largest, kl.mean().item(), agreeing / len(kl), kl.median().item())


def merge_rules(check: MergeCheck) -> tuple[tuple[str, bool], ...]:
    """Return the text of each rule for a merge, and whether the merge passes the rule.

    The module's docstring describes the rules.
    """
    dtype, merged, exact = check.dtype, check.merged, check.exact
    if dtype == "fp32":
        return (_fp32_rule("", merged, check.largest),)
    # The limit is the largest of three values: a fraction of the effect of the training, a multiple
    # of the noise of the dtype, and a constant.
    limit = max(KL_SHARE * check.base.mean_kl, KL_NOISE * check.noise.mean_kl, MERGE_KL_FLOOR_NATS)
    text = (
        f"in {dtype}, the mean KL divergence from the adapter is {merged.mean_kl:.2g} nats, and "
        f"the limit is {limit:.2g} nats: the largest of {KL_SHARE:.0%} of the divergence between "
        f"base and adapter, {KL_NOISE:g} times the rounding noise of {dtype}, and "
        f"{MERGE_KL_FLOOR_NATS:g} nats"
    )
    rules = [(text, merged.mean_kl <= limit)]
    if exact is not None:
        rules.append(_fp32_rule("in fp32, ", exact.difference, exact.largest))
        count = f"{exact.values:,} checked weights ({count_of(exact.tensors, 'tensor')})"
        text = f"of {count}, {exact.off} differ from the fp32 merge rounded to {dtype}"
        rules.append((text, exact.off == 0))
    return tuple(rules)


def _fp32_rule(prefix: str, difference: Difference, largest: float) -> tuple[str, bool]:
    limit = FP32_LIMIT * max(1.0, largest / 10)
    text = f"{prefix}the logits differ by up to {difference.max_logit:.1e}, and the limit is"
    return f"{text} {limit:.1e} for logits up to {largest:.0f}", difference.max_logit <= limit


def largest_logit(logits: Sequence[torch.Tensor]) -> float:
    return max(part.abs().max().item() for part in logits)


def probe_prompts(
    read: OpenedRun, *, rows: int = PROBES, tokens: int = PROMPT_TOKENS
) -> tuple[list[list[int]], str]:
    """Return a few prompts as token ids, and a description of their source.

    The prompts are validation rows of the run. If there are none, they are training rows. If the
    data is missing, they are SENTENCES.
    """
    run = read.location.run
    sources = []
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
        # The data may be missing on this machine. Try the next source.
        except TunesmithError:
            continue
        return prompts, count_of(len(prompts), f"{name} row")
    prompts = [read.files.tokenizer(text)["input_ids"][:tokens] for text in SENTENCES]
    return prompts, f"{len(prompts)} built-in sentences"


def count_misrounded(
    written: TunedModel, tuned: TunedModel, dtype: torch.dtype
) -> tuple[int, int, int]:
    """Compare the written 16-bit weights with the merge in fp32.

    Return the number of tensors, of values, and of values that differ by more than one rounding.
    """
    info = torch.finfo(dtype)
    values = 0
    off = 0
    for name, weight in tuned.weights.items():
        for band in weight.bands():
            exact = weight.rows(band.start, band.stop)
            rounded = written.weights[name].rows(band.start, band.stop)
            # The bound is the maximum rounding error of a normal number plus the distance between
            # two subnormal numbers. The factor 1.01 allows for sums in B A that were added in
            # another order on another machine.
            bound = exact.abs() * (1.01 * info.eps / 2) + info.smallest_normal * info.eps
            off += int(((rounded - exact).abs() > bound).sum())
            values += exact.numel()
    return len(tuned.weights), values, off
