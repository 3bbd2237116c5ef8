"""The figures of a measured run: one frozen record with units in its names, and the rows of its table."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Speeds are means over the timed steps, which took `seconds` together; shares are between 0 and 1."""

    device: str
    dtype: str
    quantize: str  # how the base was stored: none, nf4, an fp8 form, or bf16 where fp8 was given up
    micro_batch: str
    recomputed_layers: int  # decoder layers whose forward runs again in the backward
    steps: int
    seconds: float
    tokens: int  # non-padding tokens of the timed steps
    tokens_per_second: float
    supervised_tokens_per_second: float
    samples_times_seq_len_per_second: float  # often called tokens/s: each example counted as if it filled `seq_len`
    fill_share: float  # non-padding tokens of all computed ones
    padding: str  # where the other tokens come from; empty below 1 %
    published_peak_tflops: float | None
    mfu_of_published_peak: float | None  # FLOPs of the model a second (no recomputation), over the data sheet's peak
    measured_peak_tflops: float
    mfu_of_measured_peak: float  # the same, over the dense product measured in this run
    mfu_of_fp8_peak: float | None  # the same, over the measured fp8 product, where the base is fp8
    step_seconds_p50: float
    step_seconds_p95: float
    data_wait_share: float  # of the step time, spent waiting for data
    # From the recipe to a model that is ready: rows, weights, optimizer; on a GPU also a trial micro batch, compiled.
    build_seconds: float
    first_step_seconds: float  # the first step alone, with what it compiles
    graphs_compiled: int  # in build and steps
    graphs_compiled_after_step_3: int  # of them in later steps, where a steady run has none
    # Allocated on the GPU from the build, with its trial of memory, to the last timed step; on a CPU resident in RAM.
    peak_memory_gib: float
    checkpoint_stall_seconds: float | None  # how long an adapter's checkpoint holds up the loop; None for full runs
    gpu_power_watts: float | None
    first_loss: float
    last_loss: float

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """(name, value with unit, remark) of each line of the table; what was not measured has no line."""
        yield "non-padding tokens", f"{self.tokens_per_second:,.0f} /s", f"{self.tokens:,} in {self.seconds:.1f} s"
        yield "supervised tokens", f"{self.supervised_tokens_per_second:,.0f} /s", "positions that enter the loss"
        quoted = f"{self.samples_times_seq_len_per_second:,.0f} /s"
        yield "samples x seq_len", quoted, "what others quote; counts tokens that do not exist"
        yield "fill", f"{self.fill_share:.2%}", self.padding or "of the computed tokens are no padding"
        if self.mfu_of_published_peak is not None:
            peak = f"of {self.published_peak_tflops:g} TFLOP/s"
            yield "MFU, published peak", f"{self.mfu_of_published_peak:.1%}", peak
        again = f"; {self.recomputed_layers} layers recomputed, not counted" if self.recomputed_layers else ""
        measured = f"of {self.measured_peak_tflops:.3g} TFLOP/s, {self.dtype} products in this run{again}"
        yield "MFU, measured peak", f"{self.mfu_of_measured_peak:.1%}", measured
        if self.mfu_of_fp8_peak is not None:
            yield "MFU, fp8 peak", f"{self.mfu_of_fp8_peak:.1%}", "of the fp8 products in this run"
        ratio = self.step_seconds_p95 / self.step_seconds_p50
        steps = f"p95 {self.step_seconds_p95:.3f} s, p95/p50 {ratio:.3f}, {self.steps} steps"
        yield "step time, median", f"{self.step_seconds_p50:.3f} s", steps
        yield "waiting for data", f"{self.data_wait_share:.2%}", "of the step"
        yield "first step", f"{self.first_step_seconds:.1f} s", f"after a build of {self.build_seconds:.1f} s"
        yield "graphs compiled", str(self.graphs_compiled), f"{self.graphs_compiled_after_step_3} after step 3"
        where = "resident in RAM" if self.device == "cpu" else "allocated on the GPU"
        yield "peak memory", f"{self.peak_memory_gib:.1f} GiB", where
        if self.gpu_power_watts is not None:
            yield "power, mean", f"{self.gpu_power_watts:.0f} W", ""
        if self.checkpoint_stall_seconds is not None:
            yield "adapter checkpoint", f"{self.checkpoint_stall_seconds * 1000:.0f} ms", "holds up the loop"
        yield "loss", f"{self.last_loss:.4f}", f"{self.first_loss:.4f} at the first timed step"
