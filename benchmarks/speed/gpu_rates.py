"""What kernels reach on an H200, an H100 and a GB10. Importable without torch.

forecast.py and count_kernels.py divide operations and bytes by these rates. Each has its source;
`with_measured` replaces those that a session's results.json has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

# Of micro.py: the rank of its adapters, the rows of its products unless its report says otherwise,
# and the widths of its 8-bit product.
RANK, MICRO_TOKENS = 8, 16384
HIDDEN, MLP = 4096, 14336
SHAPED = re.compile(r"(?P<product>.+), (?P<m>\d+) x (?P<k>\d+)")
# Each with the width of its large matrix.
SKINNY_OF_MICRO = {
    "x A^T": "k",
    "low B^T": "m",
    "d_low = dy B": "m",
    "dB = dy^T low": "m",
    "dA = d_low^T x": "k",
}
# Attention's time is noted for this many tokens, layers and channels.
ATTENTION_TOKENS, ATTENTION_LAYERS, ATTENTION_CHANNELS = 16384, 32, 4096
# Of the bounds that micro.py takes: the longest of the alpaca rows has some 750 tokens.
ATTENTION_BOUND = 768


@dataclass(frozen=True)
class Rates:
    """What one device reaches: operations/s, bytes/s (read and written), milliseconds.

    product: a large dense product in bf16, at the power that a whole step takes.
    eight_bit_speed: an 8-bit product beside one in bf16.
    copy: a copy on the device. memory_share, skinny_share: of it, what memory-bound kernels and
    skinny products reach.
    attention_ms: forward and backward of ATTENTION_TOKENS in ATTENTION_LAYERS.
    sources: where each figure is from.
    """

    product: float
    eight_bit_speed: float
    copy: float
    memory_share: float
    skinny_share: float
    attention_ms: tuple[float, float]
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def eight_bit_product(self) -> float:
        return self.eight_bit_speed * self.product

    @property
    def memory_bandwidth(self) -> float:
        return self.memory_share * self.copy

    @property
    def skinny_bandwidth(self) -> float:
        return self.skinny_share * self.copy

    def with_figures(self, source: str, **figures: Any) -> Rates:
        """With other figures, all from one source. Attention follows the product's rate."""
        sources = {**self.sources, **dict.fromkeys(figures, source)}
        if "product" in figures and "attention_ms" not in figures:
            slower = self.product / figures["product"]
            forward, backward = self.attention_ms
            figures["attention_ms"] = (slower * forward, slower * backward)
            sources["attention_ms"] = (
                f"scaled by the product's rate; {self.sources['attention_ms']}"
            )
        return replace(self, sources=sources, **figures)


_MICRO = "measured on an H200 by micro.py"
# With torch's FlashAttention 2, as on chips where ours is not taken.
H200_OF_TORCH = Rates(
    product=670e12,
    eight_bit_speed=1.97,
    copy=4.26e12,
    memory_share=0.88,
    skinny_share=0.709,
    attention_ms=(13.94, 48.97),
    sources={
        "product": "measured on an H200, 8192^3, held at its 700 W; single products reach 708",
        "eight_bit_speed": "an 8B layer's four shapes on an H200, with full sums, which the loss "
        "asked for: 1.83 to 2.07 (pairs.json)",
        "copy": "measured on an H200, device to device",
        "memory_share": "as 77 ms of an 8B's step on an H200 say",
        "skinny_share": _MICRO,
        "attention_ms": _MICRO,
    },
)
H200 = H200_OF_TORCH.with_figures(
    "measured on an H200, documents of 200 tokens", attention_ms=(32 * 0.193, 32 * 0.544)
)
H100 = H200.with_figures("assumed: the H200's share of 4.8 TB/s, of 3.35", copy=3.0e12)
GB10 = (
    H200_OF_TORCH.with_figures(
        "measured on a GB10, single products", product=92e12, eight_bit_speed=2.0
    )
    .with_figures("measured on a GB10, 218 to 234 GB/s", copy=226e9)
    # What was measured is taken for what kernels reach.
    .with_figures("assumed", memory_share=1.0)
)
RATES = {"h200": H200, "h100": H100, "gb10": GB10}
# As `tunesmith plan --on` calls the machine of each.
MACHINES = {"h200": "h200", "h100": "h100", "gb10": "dgx-spark"}


def figures_of_micro(report: Mapping[str, Any], copy: float, product: float) -> dict[str, Any]:
    """The figures of `Rates` that a report of micro.py has, beside a copy and a large product."""
    tokens = report.get("tokens", MICRO_TOKENS)
    timings = report.get("milliseconds", {})
    # What failed has its error in place of a number.
    seconds = {name: ms / 1e3 for name, ms in timings.items() if isinstance(ms, int | float)}
    figures: dict[str, Any] = {}
    skinny = sum_skinny_products(seconds, tokens)
    if skinny.seconds:
        figures["skinny_share"] = skinny.amount / skinny.seconds / copy
    eight_bit = seconds.get(f"fp8 product of {tokens} rows")
    if eight_bit:
        figures["eight_bit_speed"] = 2 * tokens * HIDDEN * MLP / eight_bit / product
    forward = seconds.get(f"varlen, bound {ATTENTION_BOUND}")
    both = seconds.get(f"varlen, bound {ATTENTION_BOUND}, both ways")
    if forward and both:
        layers_ms = 1e3 * ATTENTION_LAYERS * ATTENTION_TOKENS / tokens
        figures["attention_ms"] = (layers_ms * forward, layers_ms * (both - forward))
    return figures


class Total(NamedTuple):
    """Operations or bytes, and the seconds that they took."""

    amount: float
    seconds: float


def sum_skinny_products(seconds: Mapping[str, float], tokens: int) -> Total:
    """Bytes of micro.py's products with a factor of rank 8: a matrix [tokens, m] or [tokens, k],
    and two small ones."""
    moved, time = 0.0, 0.0
    for name, duration in seconds.items():
        match = SHAPED.fullmatch(name)
        if match and match["product"] in SKINNY_OF_MICRO:
            width = int(match[SKINNY_OF_MICRO[match["product"]]])
            moved += 2 * (tokens * width + RANK * (tokens + width))
            time += duration
    return Total(moved, time)


def with_measured(rates: Rates, results: Mapping[str, Any]) -> Rates:
    """The rates with those that a GPU session measured; `results` are those of `read_results`."""
    device = results["device"]
    figures: dict[str, Any] = {}
    if device.get("copy_tb_per_s"):
        figures["copy"] = 1e12 * device["copy_tb_per_s"]
    if device.get("product_tflops"):
        figures["product"] = 1e12 * device["product_tflops"]
    rates = rates.with_figures("measured in this session", **figures)
    report = results["steps"].get("micro", {}).get("report") or {}
    of_micro = figures_of_micro(report, rates.copy, rates.product)
    return rates.with_figures("measured by micro.py", **of_micro)


def read_results(files: Sequence[Path]) -> dict[str, Any]:
    """The device and the steps of several results.json of one device; later files win.

    Raises ValueError where the files are of different devices.
    """
    merged: dict[str, Any] = {"device": {}, "steps": {}}
    for file in files:
        results = json.loads(file.read_text(encoding="utf-8"))
        names = {merged["device"].get("name"), results["device"]["name"]} - {None}
        if len(names) > 1:
            raise ValueError(f"results of different devices: {', '.join(sorted(names))}")
        # A stage that did not measure the copy or the product has null there.
        measured = {name: value for name, value in results["device"].items() if value is not None}
        merged["device"] |= measured
        merged["steps"] |= results["steps"]
    return merged
