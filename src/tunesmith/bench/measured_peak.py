"""The measured peak: the speed of a large dense matrix product, which a training step's speed is compared with.

A published peak is for a clock that few chips hold under load. This one is measured on the warm chip right after the
timed steps, on normal random numbers: zeros draw less power and would give a higher figure.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from tunesmith.private import scaled_mm

SIZE = {"cuda": 8192, "cpu": 1024}
ROUND_SECONDS = 0.2
ROUNDS = 5


def matmul_tflops(device: torch.device, dtype: torch.dtype, *, size: int | None = None) -> float:
    """TFLOP/s of a dense product [size, size] x [size, size] in `dtype`: the median of ROUNDS."""
    n = size or SIZE[device.type]
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _seconds(lambda: torch.mm(left, right, out=out)) / 1e12


def fp8_matmul_tflops(device: torch.device, *, size: int | None = None) -> float | None:
    """The same with fp8 (e4m3) factors, scaled by rows, else by tensor; None where the device has neither."""
    if device.type != "cuda":
        return None
    n = size or SIZE["cuda"]
    left, right = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    product = partial(scaled_mm, left, right.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    for rows in (n, 1):
        a, b = torch.ones(rows, 1, device=device), torch.ones(1, rows, device=device)
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):  # this chip lacks that product
            return 2 * n**3 / _seconds(partial(product, scale_a=a, scale_b=b)) / 1e12
    return None


def _seconds(product: Callable[[], Tensor]) -> float:
    """Seconds of one product: the median of ROUNDS rounds of about ROUND_SECONDS each, after a warm-up."""
    timer = Timer("product()", globals={"product": product}, num_threads=torch.get_num_threads())
    count = max(1, round(ROUND_SECONDS / timer.timeit(2).mean))  # on a GPU, waiting once per round costs nothing
    return statistics.median(timer.timeit(count).mean for _ in range(ROUNDS))
