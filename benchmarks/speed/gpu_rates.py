"""Rates that kernels reach on an H200, an H100 and a GB10. Does not import torch.

forecast.py and count_kernels.py divide operations and bytes by these rates. Each rate has a source.
`with_measured` replaces the rates that a GPU session measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

# Settings of micro.py: the rank of its adapters, the rows of its matmuls if its report does not
# contain `tokens`, and the widths of its 8-bit matmul.
RANK, MICRO_TOKENS = 8, 16384
HIDDEN, MLP = 4096, 14336
SHAPED = re.compile(r"(?P<product>.+), (?P<m>\d+) x (?P<k>\d+)")
# Names of skinny products in micro.py, and the dimension that is the width of the large matrix.
SKINNY_OF_MICRO = {
    "x A^T": "k",
    "low B^T": "m",
    "d_low = dy B": "m",
    "dB = dy^T low": "m",
    "dA = d_low^T x": "k",
}
# Numbers of tokens, layers and channels for which `Rates.attention_ms` is given.
ATTENTION_TOKENS, ATTENTION_LAYERS, ATTENTION_CHANNELS = 16384, 32, 4096
# The maximum document length of micro.py whose times are used, because the longest alpaca row has
# about 750 tokens.
ATTENTION_BOUND = 768


@dataclass(frozen=True)
class Rates:
    """The rates that one device reaches.

    Attributes:
        product: operations/s of a large dense matmul in bf16, at the power of an entire step.
        eight_bit_speed: speed of an 8-bit matmul, divided by the speed in bf16.
        copy: bytes/s that a copy on the device reads and writes together.
        memory_share: fraction of `copy` that memory-bound kernels reach.
        skinny_share: fraction of `copy` that skinny products reach.
        attention_ms: milliseconds of the forward and of the backward of ATTENTION_TOKENS tokens in
            ATTENTION_LAYERS layers.
        sources: the source of each rate, by the name of the attribute.
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
        """Return a copy with other figures from `source`.

        If `product` changes and `attention_ms` is not given, `attention_ms` is scaled with it.
        """
        sources = {**self.sources, **dict.fromkeys(figures, source)}
        if "product" in figures and "attention_ms" not in figures:
            slower = self.product / figures["product"]
            forward, backward = self.attention_ms
            figures["attention_ms"] = (slower * forward, slower * backward)
            sources["attention_ms"] = (
                f"scaled by the rate of matmuls; {self.sources['attention_ms']}"
            )
        return replace(self, sources=sources, **figures)


_MICRO = "measured on an H200 by micro.py"
# Rates with torch's FlashAttention 2, for chips on which our attention kernels are not used.
H200_OF_TORCH = Rates(
    product=670e12,
    eight_bit_speed=1.97,
    copy=4.26e12,
    memory_share=0.88,
    skinny_share=0.709,
    attention_ms=(13.94, 48.97),
    sources={
        "product": "measured on an H200 with 8192^3 at the power limit of 700 W; single matmuls "
        "reach 708 TFLOP/s",
        "eight_bit_speed": "measured on an H200 with the four shapes of an 8B layer, 1.83 to 2.07, "
        "with full accumulation, which the loss requires (pairs.json)",
        "copy": "measured on an H200, device to device",
        "memory_share": "derived from 77 ms of the step of an 8B model on an H200",
        "skinny_share": _MICRO,
        "attention_ms": _MICRO,
    },
)
H200 = H200_OF_TORCH.with_figures(
    "measured on an H200 with documents of 200 tokens", attention_ms=(32 * 0.193, 32 * 0.544)
)
H100 = H200.with_figures(
    "assumed: the same fraction of 3.35 TB/s that an H200 reaches of 4.8 TB/s", copy=3.0e12
)
GB10 = (
    H200_OF_TORCH.with_figures(
        "measured on a GB10 with single matmuls", product=92e12, eight_bit_speed=2.0
    )
    .with_figures("measured on a GB10, 218 to 234 GB/s", copy=226e9)
    # Assume that kernels reach the measured bandwidth of a copy.
    .with_figures("assumed", memory_share=1.0)
)
RATES = {"h200": H200, "h100": H100, "gb10": GB10}
# The names of the machines in `tunesmith plan --on`, by device key.
MACHINES = {"h200": "h200", "h100": "h100", "gb10": "dgx-spark"}


def figures_of_micro(report: Mapping[str, Any], copy: float, product: float) -> dict[str, Any]:
    """Return the figures of `Rates` that a report of micro.py contains.

    Args:
        copy: the device's rate `Rates.copy`.
        product: the device's rate `Rates.product`.
    """
    tokens = report.get("tokens", MICRO_TOKENS)
    timings = report.get("milliseconds", {})
    # A measurement that failed has an error text instead of a number.
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
    """A number of operations or bytes, and the seconds that they took."""

    amount: float
    seconds: float


def sum_skinny_products(seconds: Mapping[str, float], tokens: int) -> Total:
    """Sum the bytes and seconds of micro.py's matmuls with a factor of rank 8.

    Each matmul reads or writes a matrix [tokens, m] or [tokens, k] and two small matrices.
    """
    moved, time = 0.0, 0.0
    for name, duration in seconds.items():
        match = SHAPED.fullmatch(name)
        if match and match["product"] in SKINNY_OF_MICRO:
            width = int(match[SKINNY_OF_MICRO[match["product"]]])
            moved += 2 * (tokens * width + RANK * (tokens + width))
            time += duration
    return Total(moved, time)


def with_measured(rates: Rates, results: Mapping[str, Any]) -> Rates:
    """Return the rates, with those replaced that a GPU session measured.

    Args:
        results: the result of `read_results`.
    """
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
    """Merge the device and the steps of several results.json files of the same device.

    If several files have the same step, the last file is used. Raise ValueError if the files are
    from different devices.
    """
    merged: dict[str, Any] = {"device": {}, "steps": {}}
    for file in files:
        results = json.loads(file.read_text(encoding="utf-8"))
        names = {merged["device"].get("name"), results["device"]["name"]} - {None}
        if len(names) > 1:
            raise ValueError(
                f"the results are from different devices: {', '.join(sorted(names))}; "
                "use files from one device"
            )
        # The value of a copy or product that was not measured is null.
        measured = {name: value for name, value in results["device"].items() if value is not None}
        merged["device"] |= measured
        merged["steps"] |= results["steps"]
    return merged
