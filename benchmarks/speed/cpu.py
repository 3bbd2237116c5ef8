"""Where the time of a step goes on a CPU: its products, the parts between them, and how its threads
wait.

    python benchmarks/speed/cpu.py --model SMOLLM2 --data rows.json --dtype fp32 --json out.json

`products`: GFLOP/s of the measured peak's own product and of each product of one layer, on one
thread and on all. `parts`: milliseconds of norm, rotary embedding, SwiGLU and score, forward and
backward, as they are and compiled. `waiting`: tokens/s of the same steps beside 0, 1 and 2
processes that compute without end, with OpenMP threads that wait in a loop and with threads that
sleep. Rows are alpaca-like JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from against_trl import neighbours

from tunesmith.loss import loss_and_grad
from tunesmith.metrics.hardware import matmul_tflops, seconds_of
from tunesmith.model.fused_functions import rms_norm, rotate, swiglu

WIDTH, MLP, HEADS, KV_HEADS, VOCABULARY, LAYERS = 576, 1536, 9, 3, 49152, 30  # SmolLM2-135M
HEAD = WIDTH // HEADS
PRODUCTS = {
    "q, o": (WIDTH, WIDTH),
    "k, v": (WIDTH, KV_HEADS * HEAD),
    "gate, up": (WIDTH, MLP),
    "down": (MLP, WIDTH),
}


def products(dtype: torch.dtype, tokens: int) -> dict[str, dict[str, float]]:
    """GFLOP/s by threads and product."""
    found: dict[str, dict[str, float]] = {}
    threads = torch.get_num_threads()
    for count in dict.fromkeys((1, threads)):
        torch.set_num_threads(count)
        rates = {"measured peak": matmul_tflops(torch.device("cpu"), dtype) * 1e3}
        for name, (inside, outside) in PRODUCTS.items():
            x, weight = (
                torch.randn(tokens, inside, dtype=dtype),
                torch.randn(outside, inside, dtype=dtype),
            )
            seconds = seconds_of(lambda x=x, weight=weight: x @ weight.t())
            rates[name] = 2 * tokens * inside * outside / seconds / 1e9
        found[f"{count} threads"] = rates
    torch.set_num_threads(threads)
    return found


def parts(dtype: torch.dtype, tokens: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each part in a whole step, forward and backward, "as it is" and "compiled"."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    x, gate, up, raw = (
        draw(tokens, WIDTH),
        draw(tokens, MLP),
        draw(tokens, MLP),
        torch.randn(tokens, VOCABULARY),
    )
    q, k = draw(1, HEADS, tokens, HEAD), draw(1, KV_HEADS, tokens, HEAD)
    weight, cos, sin = (
        torch.ones(WIDTH, dtype=dtype),
        *(torch.randn(1, 1, tokens, HEAD, dtype=dtype) for _ in range(2)),
    )
    targets = torch.randint(VOCABULARY, (tokens,))
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...], int]] = {
        "norm": (rms_norm, (x, weight, 1e-5), 2 * LAYERS + 1),
        "rotary embedding of q": (rotate, (q, cos, sin), LAYERS),
        "rotary embedding of k": (rotate, (k, cos, sin), LAYERS),
        "SwiGLU": (swiglu, (gate, up), LAYERS),
        "score": (loss_and_grad, (raw.to(dtype), targets, None, None, 1.0), 1),
    }

    def milliseconds(function: Callable[..., Any], given: tuple[Any, ...], times: int) -> float:
        def both() -> None:
            made = function(*given)
            if isinstance(made, torch.Tensor):
                made.backward(torch.ones_like(made))

        return 1e3 * times * seconds_of(both)

    return {
        name: {
            "as it is": milliseconds(f, given, times),
            "compiled": milliseconds(torch.compile(f), given, times),
        }
        for name, (f, given, times) in calls.items()
    }


def waiting(a: argparse.Namespace) -> dict[str, dict[str, float]]:
    """tokens/s by neighbours and how threads wait."""
    source = json.dumps({"source": str(Path(a.data).resolve()), "format": "alpaca"})
    words = [
        f"model.name={Path(a.model).resolve()}", f"model.dtype={a.dtype}", f"data.train={source}", "data.validation=[]",
        "data.seq_len=512", "train.global_batch=4 examples",
    ]  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    for count in range(3):
        with neighbours(count), tempfile.TemporaryDirectory() as folder:
            rates = {}
            for name, policy in (("in a loop", "ACTIVE"), ("asleep", "PASSIVE")):
                out = Path(folder) / f"{policy}.json"
                command = [sys.executable, "-m", "tunesmith", "bench", "smollm2-135m-lora", *words]
                command += ["--steps", str(a.steps), "--warmup", "1", "--json", str(out)]
                env = os.environ | {
                    "OMP_WAIT_POLICY": policy,
                    "OMP_NUM_THREADS": str(torch.get_num_threads()),
                }
                subprocess.run(
                    command,
                    env=env,
                    check=True,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                rates[name] = json.loads(out.read_text())["figures"]["tokens_per_second"]
            found[f"{count} neighbours"] = rates
            print(f"{count} neighbours  {rates}", flush=True)
    return found


def main() -> None:
    """Measure all three and print them."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="SmolLM2-135M as a Transformers folder")
    p.add_argument("--data", required=True, help="alpaca-like rows, a JSON array")
    p.add_argument(
        "--dtype", default="bf16", choices=["bf16", "fp32"], help="fp32 where a CPU emulates bf16"
    )
    p.add_argument("--tokens", type=int, default=620, help="of the products and parts")
    p.add_argument("--steps", type=int, default=3, help="timed steps beside neighbours")
    p.add_argument("--json", help="write the figures here")
    a = p.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[a.dtype]
    found = {"products_gflops": products(dtype, a.tokens), "parts_ms": parts(dtype, a.tokens)}
    for rows in found.values():
        for name, row in rows.items():
            print(f"{name:24}", "  ".join(f"{key} {value:.1f}" for key, value in row.items()))
    figures = {"command": sys.argv, **found, "tokens_per_second": waiting(a)}
    if a.json:
        Path(a.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
