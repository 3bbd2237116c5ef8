"""Comparison of the experts' matrix products on a GPU with those on a CPU: the output, and the
gradients of the rows and of an adapter's `lora_A` and `lora_B`.

    python benchmarks/parity/grouped_products.py [--output FILE]

A GPU multiplies all experts with one call of `grouped_mm`, a CPU multiplies one expert after the
other. Both get the same values in small shapes, and some experts have no rows. The cases, each in
bf16 and fp32, are: dense stacks of shape [experts, out, in] and [experts, in, out], a stack in
MXFP4, rows that are gathered from tokens, and rows that are summed into tokens. If torch sees no
GPU, `grouped_mm` runs on the CPU instead.

Differences are relative to the largest value. The exit code is 1 if a difference is larger than the
rounding of its dtype.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tunesmith.formats.base import FrozenStack
from tunesmith.formats.dense import dense_stack
from tunesmith.formats.form import ShippedForm
from tunesmith.formats.linear import empty_tensors
from tunesmith.formats.mxfp4 import Mxfp4
from tunesmith.quant import expert_matmul, expert_rows
from tunesmith.quant.expert_rows import ExpertRows

EXPERTS, IN, OUT, RANK = 8, 128, 192, 4
# Number of rows per expert. The first expert, one in the middle and the last one have no rows.
ROWS = (0, 3, 70, 0, 1, 129, 16, 0)
# Maximum relative differences. The sums of 128 to 192 products have another order on the GPU, and
# are rounded to the dtype once more.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 2e-5}
STACKS = ("dense", "transposed", "mxfp4", "gathers", "sums")


def stack_of(kind: str, dtype: torch.dtype, device: torch.device) -> FrozenStack:
    """Return a random stack with the same values on each device."""
    if kind == "mxfp4":
        mxfp4 = Mxfp4(ShippedForm("mxfp4"))
        codes = empty_tensors(mxfp4.stack_forms(EXPERTS, OUT, IN, 1), torch.device("cpu"))
        mxfp4.draw(codes)
        return FrozenStack(mxfp4, [tensor.to(device) for tensor in codes], (EXPERTS, IN, OUT))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(EXPERTS, OUT, IN, generator=generator) / IN**0.5
    if kind == "transposed":
        weight = weight.mT.contiguous()
    return dense_stack(weight.to(device, dtype), is_transposed=kind == "transposed")


def results_of(
    kind: str, dtype: torch.dtype, device: torch.device, *, grouped: bool
) -> dict[str, Tensor]:
    """Compute the output and the gradients. Return them in fp32 on the CPU."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator)
        return values.to(device, dtype).requires_grad_()

    chosen = torch.repeat_interleave(torch.tensor(ROWS)).unsqueeze(1)
    options = {}
    if kind in ("gathers", "sums"):
        options[kind] = True
        # Each token selects three of the experts 1 to 5.
        chosen = torch.rand(sum(ROWS), 5, generator=generator).topk(3).indices + 1
    copies = chosen.numel()
    x = draw(len(chosen) if kind == "gathers" else copies, IN)
    lora_A = draw(EXPERTS, RANK, IN)
    lora_B = draw(EXPERTS, RANK, OUT)
    dy = draw(len(chosen) if kind == "sums" else copies, OUT).detach()
    with patch.object(expert_rows, "uses_grouped_mm", lambda *_: grouped):
        rows = ExpertRows.of(chosen.to(device), EXPERTS, dtype)
        stack = stack_of(kind, dtype, device)
        y = expert_matmul.expert_matmul(x, stack, rows.row_index, lora_A, lora_B, **options)
        gradients = torch.autograd.grad(y, (x, lora_A, lora_B), dy)
    tensors = {"y": y.detach(), **dict(zip(("dx", "dA", "dB"), gradients, strict=True))}
    return {name: tensor.float().cpu() for name, tensor in tensors.items()}


def compare(device: torch.device) -> dict[str, dict[str, float]]:
    """Return the largest difference of each result, by dtype and stack."""
    differences = {}
    for dtype in TOLERANCE:
        for kind in STACKS:
            ours = results_of(kind, dtype, device, grouped=True)
            cpu = results_of(kind, dtype, torch.device("cpu"), grouped=False)
            name = f"{str(dtype).removeprefix('torch.')} {kind}"
            differences[name] = {
                result: float((ours[result] - value).abs().max() / value.abs().max())
                for result, value in cpu.items()
            }
    return differences


def too_large(differences: dict[str, dict[str, float]]) -> list[str]:
    """Return the names of the results that differ by more than the rounding of their dtype."""
    names = []
    for name, results in differences.items():
        tolerance = TOLERANCE[getattr(torch, name.partition(" ")[0])]
        names += [f"{name} {result}" for result, error in results.items() if not error <= tolerance]
    return names


def main(words: Sequence[str] | None = None) -> int:
    """Print a line for each dtype and stack. Return 1 if a difference is too large."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    differences = compare(device)
    for name, results in differences.items():
        print(f"{name:20}", *(f"{result} {error:.1e}" for result, error in results.items()))
    failed = too_large(differences)
    report: dict[str, Any] = {"device": str(device), "differences": differences, "failed": failed}
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name in failed:
        print(f"error: {name} differs too much from the CPU")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
