"""Measurement of the time of each matmul in a step of Llama 3.1 8B.

    python benchmarks/speed/micro.py out.json [--tokens 16384] [--divide 1] [--repeat 20]

The script measures matmuls of the base, of LoRA and in fp8, base and LoRA joined to one wider
matmul, weight gradients in fp32, groups of layers forward and backward, attention, and the
dequantization of nf4. If a measurement fails, the report contains its error, and the other
measurements continue. --divide makes all widths smaller, to test the script on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.formats.base import FrozenWeight
from tunesmith.formats.dense import DENSE_FORMAT
from tunesmith.formats.fp8 import Fp8, select_scaling
from tunesmith.formats.matmul import grouped_matmul
from tunesmith.host.packages import bnb_functional
from tunesmith.model.layers.attention import attend, select_attention_backend
from tunesmith.model.layers.documents import Documents
from tunesmith.model.layers.packed_attention import spans_if_chosen

RANK = 8
HIDDEN, MLP, KV = 4096, 14336, 1024
BF16 = torch.bfloat16


class Timings:
    """Measurement of calls. `found` has the milliseconds or the error of each call by name.

    The time is the median of `repeat` calls after a first call that compiles and allocates.
    """

    def __init__(self, device: torch.device, repeat: int) -> None:
        self.device, self.repeat = device, repeat
        self.found: dict[str, float | str] = {}

    def __call__(self, name: str, call: Callable[[], Any]) -> None:
        try:
            call()
            self.found[name] = statistics.median(
                self._milliseconds(call) for _ in range(self.repeat)
            )
        except Exception as error:  # measure the other kernels even if one kernel raises any error
            self.found[name] = repr(error)[:300]
        print(f"{name:44} {self.found[name]}", flush=True)

    def _milliseconds(self, call: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            began = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - began)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def dense_products(timed: Timings, draw: Callable[..., Tensor], n: int, k: int, m: int) -> None:
    """Measure each matmul of y = x W^T + (x A^T) B^T and its gradients, for x [n, k], W [m, k]."""
    x, w, y, dy = draw(n, k), draw(m, k), draw(n, m), draw(n, m)
    a, b, low = draw(RANK, k), draw(m, RANK), draw(n, RANK)
    shape = f"{m} x {k}"
    timed(f"x W^T, {shape}", lambda: x @ w.T)
    timed(f"x W^T added to y, {shape}", lambda: y.addmm_(x, w.T))
    timed(f"dy W, {shape}", lambda: dy @ w)
    timed(f"x A^T, {shape}", lambda: x @ a.T)
    timed(f"low B^T, {shape}", lambda: low @ b.T)
    timed(f"d_low = dy B, {shape}", lambda: dy @ b)
    timed(f"dB = dy^T low, {shape}", lambda: dy.T @ low)
    timed(f"dA = d_low^T x, {shape}", lambda: low.T @ x)
    wide_x, wide_w = torch.cat([x, low], 1), torch.cat([w, b], 1)
    timed(f"[x | low] [W | B]^T, {shape}", lambda: wide_x @ wide_w.T)
    timed(f"dW = dy^T x in bf16, {shape}", lambda: dy.T @ x)
    timed(f"dW = dy^T x in fp32, {shape}", lambda: torch.mm(dy.T, x, out_dtype=torch.float32))


def weights_of(base: str, dense: list[Tensor], device: torch.device) -> list[FrozenWeight]:
    """Return frozen weights in bf16, or in fp8 with the scaling that works on this device.

    Args:
        base: "bf16" or "fp8".
    """
    if base == "bf16":
        return [FrozenWeight(DENSE_FORMAT, [w], (w.shape[0], w.shape[1])) for w in dense]
    recipe, why = select_scaling(device)
    if recipe is None:
        raise RuntimeError(why)
    return [Fp8(recipe).round(w) for w in dense]


def groups(
    timed: Timings, draw: Callable[..., Tensor], n: int, names: dict[str, tuple[int, list[int]]]
) -> None:
    """Measure layers with the same input as they are computed in training, forward and backward.

    Args:
        n: number of tokens.
        names: in_features, and the out_features of each layer, by the name of the group.
    """
    for base in ("bf16", "fp8"):
        for name, (k, rows) in names.items():
            x, dense = draw(n, k).requires_grad_(), [draw(m, k) for m in rows]
            a = [draw(RANK, k).float().requires_grad_() for _ in rows]
            b = [draw(m, RANK).float().requires_grad_() for m in rows]
            dys = [draw(n, m) for m in rows]
            try:
                weights = weights_of(base, dense, x.device)
            except RuntimeError as error:
                print(f"{base} {name} is not measured: {error}")
                continue

            def both(
                x: Tensor = x,
                weights: list[FrozenWeight] = weights,
                a: list[Tensor] = a,
                b: list[Tensor] = b,
                dys: list[Tensor] = dys,
            ) -> None:
                ys = grouped_matmul(x, weights, [None] * len(weights), a, b)
                torch.autograd.grad(ys, [x, *a, *b], dys)

            timed(f"{base} {name}, forward and backward", both)


def main() -> None:
    """Run all measurements, on the GPU if there is one."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("json")
    p.add_argument("--tokens", type=int, default=16384)
    p.add_argument("--divide", type=int, default=1)
    p.add_argument("--repeat", type=int, default=20)
    args = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n, hidden, mlp, kv = args.tokens, *(width // args.divide for width in (HIDDEN, MLP, KV))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=BF16)

    timed = Timings(device, args.repeat)
    for k, m in ((hidden, hidden), (hidden, kv), (hidden, mlp), (mlp, hidden)):
        dense_products(timed, draw, n, k, m)
    groups(
        timed,
        draw,
        n,
        {
            "q/k/v": (hidden, [hidden, kv, kv]),
            "gate/up": (hidden, [mlp, mlp]),
            "down": (mlp, [hidden]),
        },
    )
    for rows in (n, 256, 1):
        try:
            (weight,), x = weights_of("fp8", [draw(hidden, mlp)], device), draw(rows, mlp)
        except RuntimeError as error:
            print(f"fp8 is not measured: {error}")
            break
        timed(f"fp8 quantize {rows} rows", lambda w=weight, x=x: w.format.quantize_input(x))
        ready = weight.format.quantize_input(x)
        timed(
            f"fp8 product of {rows} rows",
            lambda w=weight, x=x, ready=ready: w.format.forward_matmul(w, x, ready, None),
        )
    edges = torch.arange(0, n + 1, 256, device=device, dtype=torch.int32)
    heads = (
        [draw(n, h, 128).requires_grad_() for h in (32, 8, 8)]
        if args.divide == 1
        else [draw(n, 2, 16) for _ in "qkv"]
    )
    backend = select_attention_backend(device, BF16, heads[0].shape[-1])[0]
    for bound in (256, 768, 2048):
        documents = Documents(edges, bound, backend, spans=spans_if_chosen(edges, n, bound))
        timed(f"{backend}, bound {bound}", lambda d=documents: attend(*heads, d).sum())
        if args.divide == 1:
            timed(
                f"{backend}, bound {bound}, both ways",
                lambda d=documents: attend(*heads, d).sum().backward(),
            )
    try:
        nf4 = bnb_functional("nf4", "this script")
        packed = nf4.quantize_4bit(
            draw(28672 // args.divide, 8192 // args.divide), quant_type="nf4"
        )
        timed("nf4 28672 x 8192 made dense", lambda: nf4.dequantize_4bit(*packed))
    except Exception as error:  # bitsandbytes is missing or has no kernel for the device
        print(f"nf4 is not measured: {error}")
    Path(args.json).write_text(
        json.dumps({"milliseconds": timed.found, "device": device_name(device)}, indent=1) + "\n"
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
