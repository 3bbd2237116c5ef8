"""The kernel that makes NF4 codes dense beside bitsandbytes: on a GPU, and here in Triton's
interpreter.
"""

from __future__ import annotations

import pytest
import torch

from devices import gpu, run_interpreted
from tunesmith.formats import nf4
from tunesmith.formats.base import FrozenStack, FrozenWeight
from tunesmith.formats.linear import empty_tensors
from tunesmith.formats.nf4 import Nf4


def compare(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Matrices with and without double quantization, of an odd number of weights, and experts."""
    torch.manual_seed(0)
    functional = nf4.nf4_functions()
    for rows, columns, is_nested in ((96, 320, True), (7, 9, True), (64, 65, False)):
        dense = torch.randn(rows, columns).to(device, dtype)
        options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": is_nested}
        codes, state = functional.quantize_4bit(dense, **options)
        tensors = [codes, state.absmax, state.code]
        if is_nested:
            tensors += [state.state2.absmax, state.state2.code, state.offset]
        kind = Nf4(dtype, 64, 256 if is_nested else 0)
        weight = FrozenWeight(kind, tensors, (rows, columns))
        expected = functional.dequantize_4bit(codes, state)
        found = kind._decode_by_kernel(*tensors[:3], tensors[3:], (rows, columns))
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        if device == "cuda":
            assert torch.equal(weight.dense(dtype), found)

    kind = Nf4(dtype)
    tensors = empty_tensors(kind.stack_forms(3, 24, 40, 1), torch.device(device))
    for tensor in tensors:
        tensor.random_(1, 200) if tensor.dtype == torch.uint8 else tensor.uniform_(0.5, 1)
    tensors[2].copy_(
        functional.get_4bit_type("nf4", device=device)
    )  # which bitsandbytes has built in
    stack = FrozenStack(kind, tensors, (3, 40, 24))
    results = []
    for has_kernel in (False, True):
        nf4._has_kernel = lambda _, answer=has_kernel: answer  # type: ignore[misc]
        results.append(kind.decode_experts(stack, slice(1, 3), dtype))
    assert (results[0] - results[1]).abs().max() <= tolerance * results[0].abs().max()


@pytest.mark.slow
def test_the_kernel_in_the_interpreter() -> None:
    pytest.importorskip("bitsandbytes")
    run_interpreted(__file__)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_the_kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "_has_kernel", nf4._has_kernel)  # as it is afterwards
    compare(device, torch.bfloat16, 0.0)


if __name__ == "__main__":
    compare("cpu", torch.float32, 1e-6)
