"""Run by test_one_pass.py in a process of its own: the kernel in Triton's interpreter, on the CPU.

The interpreter has no product of bf16, so what is bf16 on a GPU is fp32 here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tunesmith.adapter import lora
from tunesmith.config.schema import Adapter
from tunesmith.quant import one_pass as kernel
from tunesmith.quant.one_pass import COLUMNS, SPAN, kernel_fault, lora_gradients


def main() -> None:
    checked = 0
    for n, m, rank in ((1, 16, 1), (130, 300, 8), (SPAN + 70, COLUMNS, 24), (2 * SPAN, 2 * COLUMNS + 48, 16)):
        dy, b, wide = torch.randn(n, m), torch.randn(m, rank), torch.randn(n, rank + 5)
        xa = wide[:, 3 : 3 + rank]  # columns of the stacked xa of a group
        got = lora_gradients(dy, b, xa)
        for found, expected in zip(got, (dy.double() @ b.double(), dy.double().T @ xa.double()), strict=True):
            assert found.shape == expected.shape
            assert (found - expected).norm() / expected.norm() < 1e-5, (n, m, rank)
            checked += 1
        again = lora_gradients(dy, b, xa)
        assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))
    assert not kernel_fault(torch.device("cpu"), torch.float32)
    print(checked + check_layers(), "checks")


def check_layers() -> int:
    """A group of layers with the kernel and without: outputs and gradients, eager and compiled."""
    layers = []
    for width in (48, 16, 16):
        layers.append(lora.LoraLinear(nn.Linear(64, width, bias=False).requires_grad_(False), Adapter(rank=4)))
        nn.init.normal_(layers[-1].lora_A)
        nn.init.normal_(layers[-1].lora_B)  # with B = 0 the gradient of A is zero and proves nothing
    x = torch.randn(130, 64, requires_grad=True)
    leaves = [x, *(p for m in layers for p in (m.lora_A, m.lora_B))]

    def step(x: Tensor) -> Sequence[Tensor]:
        return lora.project(x, layers)

    def gradients(run: Callable[[Tensor], Sequence[Tensor]], one_pass: bool) -> tuple[Tensor, ...]:
        layers[0].one_pass = one_pass
        return torch.autograd.grad(sum(y.square().sum() for y in run(x)), leaves)

    expected, checked = gradients(step, False), 0
    launches = []
    kernel.lora_gradients = lambda *given: launches.append(given) or lora_gradients(*given)
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        for found, plain in zip(gradients(run, True), expected, strict=True):
            assert (found - plain).norm() / plain.norm() < 1e-5
            checked += 1
    assert len(launches) == 2 * len(layers)
    return checked


if __name__ == "__main__":
    main()
