"""What a measured run came to: one frozen record, its units in its names, and the rows of its table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tunesmith.metrics.record import StepRecord


@dataclass(frozen=True)
class Work:
    """What the timed steps computed, all of them together.

    Attributes:
        tokens: non-padding. supervised_tokens: positions whose label enters the loss. padded_tokens: all that were
            computed, padding counted. examples: rows of the data.
        model_flops: as `facts.flops`. hardware_flops: with what was computed twice to save memory.
    """

    tokens: int
    supervised_tokens: int
    padded_tokens: int
    examples: int
    model_flops: float
    hardware_flops: float


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Speeds are means over the timed steps, `seconds` long in all; a share lies between 0 and 1.

    Attributes:
        quantize: how the base was held in fact: none, nf4, an fp8 form, or bf16 where fp8 was given up.
        samples_times_seq_len_per_second: what others often quote as tokens/s: each example counted as if it filled
            `seq_len`. These tokens do not exist.
        fill_share: non-padding tokens of those computed.
        mfu_of_published_peak, mfu_of_ceiling: the model's FLOPs (no recomputation) per second over the data sheet's
            peak, and over the product measured in this run.
        hardware_share_of_ceiling: the same with recomputed layers counted. What attention's kernels recompute inside is
            not.
        mfu_of_fp8_ceiling: over the fp8 product, where the base is fp8.
        graphs_compiled: in all, by the build's trial of memory too; _after_step_3: those that came late, which a steady
            run has none of.
        build_seconds: from the recipe to a model that is ready: reading rows, weights, optimizer; on a GPU with a trial
            micro batch, and what that compiles.
        first_step_seconds: the first step alone, with what it compiles.
        peak_allocated_gib, peak_reserved_gib: on the GPU, from the build to the last timed step; peak_resident_gib:
            in RAM.
        checkpoint_stall_seconds: how long writing an adapter checkpoint held up the loop; first_...: the first of the
            process, which imports what it needs.
    """

    device: str
    dtype: str
    quantize: str
    micro_batch: str
    recomputed_layers: int
    steps: int
    warmup_steps: int
    seconds: float
    tokens: int
    supervised_tokens: int
    padded_tokens: int
    examples: int
    tokens_per_second: float
    supervised_tokens_per_second: float
    padded_tokens_per_second: float
    samples_times_seq_len_per_second: float
    fill_share: float
    model_tflops_per_second: float
    published_peak_tflops: float | None
    published_peak_source: str
    ceiling_tflops: float
    ceiling_fp8_tflops: float | None
    mfu_of_published_peak: float | None
    mfu_of_ceiling: float
    mfu_of_fp8_ceiling: float | None
    hardware_share_of_ceiling: float
    step_seconds_p50: float
    step_seconds_p95: float
    step_p95_over_p50: float
    data_wait_share: float
    build_seconds: float
    first_step_seconds: float
    graphs_compiled: int
    graphs_compiled_after_step_3: int
    peak_allocated_gib: float | None
    peak_reserved_gib: float | None
    peak_resident_gib: float
    power_mean_watts: float | None
    first_checkpoint_stall_seconds: float | None
    checkpoint_stall_seconds: float | None
    first_loss: float
    last_loss: float

    def values(self) -> dict[str, Any]:
        """Name -> value, for JSON."""
        return asdict(self)

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """(what, value with unit, remark) of each line of the table; what was not measured has no line."""
        yield "non-padding tokens", f"{self.tokens_per_second:,.0f} /s", f"{self.tokens:,} in {self.seconds:.1f} s"
        yield "supervised tokens", f"{self.supervised_tokens_per_second:,.0f} /s", "positions that enter the loss"
        yield (
            "computed tokens",
            f"{self.padded_tokens_per_second:,.0f} /s",
            f"padding counted; fill {self.fill_share:.2%}",
        )
        yield (
            "samples x seq_len",
            f"{self.samples_times_seq_len_per_second:,.0f} /s",
            "what others quote; counts tokens that do not exist",
        )
        yield from self._efficiency_rows()
        steps = f"p95 {self.step_seconds_p95:.3f} s, p95/p50 {self.step_p95_over_p50:.3f}, {self.steps} steps"
        yield "step time, median", f"{self.step_seconds_p50:.3f} s", steps
        yield "waiting for data", f"{self.data_wait_share:.2%}", "of the step"
        yield "first step", f"{self.first_step_seconds:.1f} s", f"after a build of {self.build_seconds:.1f} s"
        late = f"{self.graphs_compiled_after_step_3} after step 3"
        yield "graphs compiled", str(self.graphs_compiled), late
        if self.peak_allocated_gib is not None:
            reserved = f"{self.peak_reserved_gib:.1f} GiB reserved, {self.peak_resident_gib:.1f} GiB of RAM"
            yield "peak GPU memory", f"{self.peak_allocated_gib:.1f} GiB", reserved
        else:
            yield "peak memory", f"{self.peak_resident_gib:.1f} GiB", "resident in RAM"
        if self.power_mean_watts is not None:
            yield "power, mean", f"{self.power_mean_watts:.0f} W", ""
        if self.checkpoint_stall_seconds is not None:
            yield (
                "adapter checkpoint",
                f"{self.checkpoint_stall_seconds * 1000:.0f} ms",
                f"held up the loop; the first one {1000 * (self.first_checkpoint_stall_seconds or 0):.0f} ms",
            )
        yield "loss", f"{self.last_loss:.4f}", f"{self.first_loss:.4f} at the first timed step"

    def _efficiency_rows(self) -> Iterator[tuple[str, str, str]]:
        if self.mfu_of_published_peak is not None:
            of = f"of {self.published_peak_tflops:g} TFLOP/s ({self.published_peak_source})"
            yield "MFU, published peak", f"{self.mfu_of_published_peak:.1%}", of
        ceiling = f"of {self.ceiling_tflops:.3g} TFLOP/s, {self.dtype} products measured in this run"
        yield "MFU, measured ceiling", f"{self.mfu_of_ceiling:.1%}", ceiling
        again = f"{self.recomputed_layers} layers computed twice" if self.recomputed_layers else "nothing recomputed"
        yield "hardware share", f"{self.hardware_share_of_ceiling:.1%}", f"of the same; {again}"
        if self.mfu_of_fp8_ceiling is not None:
            of = f"of {self.ceiling_fp8_tflops:.3g} TFLOP/s, fp8 products measured in this run"
            yield "MFU, fp8 ceiling", f"{self.mfu_of_fp8_ceiling:.1%}", of


def timing(records: list[StepRecord]) -> dict[str, float]:
    """Seconds in all, percentiles of the step time and the share of waiting for data, of the timed steps."""
    seconds = [record.step_seconds for record in records]
    p50, p95 = (float(value) for value in np.percentile(seconds, [50, 95]))
    return {
        "seconds": sum(seconds),
        "step_seconds_p50": p50,
        "step_seconds_p95": p95,
        "step_p95_over_p50": p95 / p50,
        "data_wait_share": sum(record.data_seconds for record in records) / sum(seconds),
    }


def speeds(work: Work, seconds: float, seq_len: int) -> dict[str, float]:
    """Counts of the timed steps per second."""
    return {
        "tokens_per_second": work.tokens / seconds,
        "supervised_tokens_per_second": work.supervised_tokens / seconds,
        "padded_tokens_per_second": work.padded_tokens / seconds,
        "samples_times_seq_len_per_second": work.examples * seq_len / seconds,
        "fill_share": work.tokens / work.padded_tokens,
        "model_tflops_per_second": work.model_flops / seconds / 1e12,
    }


def shares(
    work: Work, seconds: float, *, peak: float | None, ceiling: float, ceiling_fp8: float | None
) -> dict[str, float | None]:
    """FLOPs per second over the published peak and the measured ceilings, all in TFLOP/s."""
    model, hardware = work.model_flops / seconds / 1e12, work.hardware_flops / seconds / 1e12
    return {
        "published_peak_tflops": peak,
        "ceiling_tflops": ceiling,
        "ceiling_fp8_tflops": ceiling_fp8,
        "mfu_of_published_peak": model / peak if peak else None,
        "mfu_of_ceiling": model / ceiling,
        "mfu_of_fp8_ceiling": model / ceiling_fp8 if ceiling_fp8 else None,
        "hardware_share_of_ceiling": hardware / ceiling,
    }
