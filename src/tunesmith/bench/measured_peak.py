"""The measured peak: the speed of a large dense matrix product, which a training step's speed is compared with.

A published peak is for a clock that few chips hold under load. This one is measured on the warm chip right after the
timed steps, on normal random numbers: zeros draw less power and would give a higher figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = {"cuda": 8192, "cpu": 1024}
ROUND_SECONDS = 0.2
ROUNDS = 5


def matmul_tflops(device: torch.device, dtype: torch.dtype, *, size: int | None = None) -> float:
    """TFLOP/s of a dense product [size, size] x [size, size] in `dtype`: the median of ROUNDS."""
    n = size or SIZE[device.type]
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _seconds(lambda: torch.mm(left, right, out=out), device) / 1e12


def fp8_matmul_tflops(device: torch.device, *, size: int | None = None) -> float | None:
    """The same with fp8 (e4m3) factors, scaled by rows, else by tensor; None where the device has neither."""
    if device.type != "cuda" or "scaled_mm" not in vars(F):  # public since torch 2.10
        return None
    n = size or SIZE["cuda"]
    left, right = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    left, right = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=device)
    rows, columns = torch.ones(n, 1, device=device), torch.ones(1, n, device=device)
    for kind, a, b in ((F.ScalingType.RowWise, rows, columns), (F.ScalingType.TensorWise, one, one)):

        def product(kind: F.ScalingType = kind, a: Tensor = a, b: Tensor = b) -> Tensor:
            return F.scaled_mm(left, right, a, kind, b, kind, output_dtype=torch.bfloat16, use_fast_accum=True)

        try:
            return 2 * n**3 / _seconds(product, device) / 1e12
        except (RuntimeError, ValueError, NotImplementedError):  # this chip lacks that product
            continue
    return None


def _seconds(product: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of one product: the median of ROUNDS rounds of about ROUND_SECONDS each, after one that is discarded."""
    once = _timed(product, 1, device)  # compiles or chooses a kernel
    once = min(once, _timed(product, 1, device))
    count = max(1, round(ROUND_SECONDS / max(once, 1e-6)))
    _timed(product, count, device)
    return statistics.median(_timed(product, count, device) for _ in range(ROUNDS)) / count


def _timed(product: Callable[[], Tensor], count: int, device: torch.device) -> float:
    """Seconds of `count` products in a row, by CUDA events or by the clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            product()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        product()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000.0
