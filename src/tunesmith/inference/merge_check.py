"""Whether a merged model answers like the adapter over its base: what is compared, and what is demanded.

fp32    The two differ by rounding only: the largest logit difference is at most 1e-4 for logits up to 10, and in
        proportion above.
bf16    Every merged weight is rounded once more, which no merge can avoid, and bf16 products are noisy by themselves.
fp16    So three things are asked. In fp32 arithmetic, the merge of this adapter answers like the adapter (the rule
        above). The written weights are that merge, rounded once. And in the written type, the mean KL divergence is
        small beside what the training taught, or beside the noise of the type: that of the merged model with itself
        under another attention kernel, one and the same formula in another order of sums.

The first two need room for the model in fp32; where there is none, that is said and the third stands alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tunesmith.errors import CheckpointError, TunesmithError
from tunesmith.inference.prompts import first_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.inference.load_run import LoadedModel

FP32_LIMIT = 1e-4
KL_SHARE = 0.1  # of what the training taught
KL_NOISE = 4.0  # times the noise of the type
KL_FLOOR = 1e-4  # nats a token; nobody can tell such models apart
PROBES = 6
PROBE_TOKENS = 48  # of each prompt: the logits of 128k tokens take 150 MB then
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
    """How far two sets of logits over the same positions are apart.

    Attributes:
        max_logit: largest absolute difference of any logit.
        mean_kl: Kullback-Leibler divergence of the second from the first, in nats, mean over positions.
        agreement: share of positions where both have the same most likely token.
    """

    max_logit: float
    mean_kl: float
    agreement: float


@dataclass(frozen=True)
class ExactCheck:
    """The merge in fp32, and the written weights beside it.

    Attributes:
        difference: adapter against merge, both in fp32 arithmetic.
        largest: largest absolute logit there.
        tensors, values: how many were compared.
        off: values further from the fp32 merge than rounding explains.
    """

    difference: Difference
    largest: float
    tensors: int
    values: int
    off: int


@dataclass(frozen=True)
class MergeCheck:
    """What was compared, and the verdict.

    Attributes:
        dtype: of the written weights and of the products below.
        merged: written folder, loaded by Transformers, against the unmerged model.
        base: the base against the unmerged model: the size of what was taught.
        noise: the merged model under another attention kernel against itself.
        largest: largest absolute logit, the scale of `max_logit`.
        positions: token positions compared.
        probes: where the prompts came from.
        exact: the comparison in fp32; None for fp32 itself, or where there is no room.
        rules: what was demanded, in words, each with whether it holds.
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


def difference(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Difference:
    """Compare logits, prompt by prompt.

    Args:
        reference, other: fp32 [tokens, vocabulary] each, on the CPU, of the same shapes.

    Raises:
        CheckpointError: NaN or Inf among them; a comparison with NaN would pass every limit.
    """
    largest, kl, same, positions = 0.0, 0.0, 0, 0
    for p, q in zip(reference, other, strict=True):
        if not (torch.isfinite(p).all() and torch.isfinite(q).all()):
            raise CheckpointError(
                "the logits are not finite",
                why="the adapter diverged, or the weights are too large for fp16",
                fix="merge with --dtype bf16 or fp32, or take an earlier checkpoint",
            )
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        largest = max(largest, (p - q).abs().max().item())
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        positions += len(p)
    return Difference(largest, max(kl / positions, 0.0), same / positions)


def check_rules(
    dtype: str, merged: Difference, base: Difference, noise: Difference, largest: float, exact: ExactCheck | None
) -> tuple[tuple[str, bool], ...]:
    """What is demanded of a merge, in words, and whether it holds; see this file's opening text."""
    if dtype == "fp32":
        return (_fp32_rule("", merged, largest),)
    limit = max(KL_SHARE * base.mean_kl, KL_NOISE * noise.mean_kl, KL_FLOOR)
    parts = f"{KL_SHARE:.0%} of base against adapter, {KL_NOISE:g} x the noise of {dtype}, {KL_FLOOR:g}"
    found = [
        (f"in {dtype}: mean KL {merged.mean_kl:.2g}, at most {limit:.2g} (most of {parts})", merged.mean_kl <= limit)
    ]
    if exact is not None:
        found.append(_fp32_rule("in fp32: ", exact.difference, exact.largest))
        text = f"written weights: {exact.values:,} in {exact.tensors} tensors are that merge rounded once, {exact.off} are not"
        found.append((text, exact.off == 0))
    return tuple(found)


def _fp32_rule(prefix: str, found: Difference, largest: float) -> tuple[str, bool]:
    limit = FP32_LIMIT * max(1.0, largest / 10)
    text = f"{prefix}largest logit difference {found.max_logit:.1e}, at most {limit:.1e} (logits reach {largest:.0f})"
    return text, found.max_logit <= limit


@torch.no_grad()
def logits_of(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits of each prompt alone, no padding: fp32 [tokens, vocabulary] on the CPU."""
    return [
        model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0].float().cpu()
        for ids in prompts
    ]


def largest_of(logits: Sequence[torch.Tensor]) -> float:
    return max(part.abs().max().item() for part in logits)


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """Transformers' plain attention in place of sdpa: the same formula, its sums in another order."""
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def probes_of(opened: LoadedModel) -> tuple[list[list[int]], str]:
    """A handful of prompts as token ids, at most PROBE_TOKENS each: the run's held-out or training rows, else ours."""
    if opened.run is not None:
        for name, sources in (("validation", opened.run.data.validation), ("training", opened.run.data.train)):
            try:
                rows = first_examples(sources, opened.run.data, opened.template, PROBES)
            except TunesmithError:
                continue  # the data need not be on the machine that merges
            if rows:
                return [row.ids[:PROBE_TOKENS].tolist() for row in rows], f"{len(rows)} {name} rows"
    ids = [opened.tokenizer(text)["input_ids"][:PROBE_TOKENS] for text in SENTENCES]
    return ids, f"{len(ids)} built-in sentences"


@torch.no_grad()
def rounded_once(written: PreTrainedModel, merge: PreTrainedModel) -> tuple[int, int, int]:
    """Compare the weights of a written 16-bit model with a merge in fp32.

    Returns:
        (tensors, values, values that are off by more than half a unit in the last place).
    """
    tensors, values, off = 0, 0, 0
    for name, weight in merge.named_parameters():
        found = written.get_parameter(name)
        kind = torch.finfo(found.dtype)
        # 1.01: two machines may sum B A in another order before the rounding.
        bound = weight.abs() * (1.01 * kind.eps / 2) + kind.smallest_normal * kind.eps
        off += int(((found.cpu().float() - weight).abs() > bound).sum())
        tensors, values = tensors + 1, values + weight.numel()
    return tensors, values, off


def memory_available() -> int:
    """Bytes that can be had without swapping, as Linux estimates it; 0 where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
