"""The Triton kernel of 8-bit products: right in Triton's interpreter, and taken by the assembler of each chip."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from packaging.version import Version

from quant.scripts import output_of
from ranks import run_ranks
from tunesmith.quant import eight_bit
from tunesmith.quant.scaled_matmul import FUSED, INT8, ROW_WISE


def test_scales_update_and_sum_are_applied_in_the_interpreter():
    triton = pytest.importorskip("triton", reason="Triton is for Linux")
    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.5"):
        pytest.skip("Triton 3.6 interprets no loop with NumPy 2.5: it makes a number of an array of one")
    assert output_of("interpreted.py", TRITON_INTERPRET="1") == "65 checks\n"


def test_the_assembler_takes_the_largest_tile_on_every_chip(tmp_path):
    """Without a GPU: the 8-bit instructions of Hopper and Blackwell, and no more shared memory than a block may have."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    from quant.assembled import compiled

    (lines,) = run_ranks(1, compiled, tmp_path)
    assert len(lines) == 4
    instruction = {90: "wgmma.mma_async", 100: "tcgen05.mma", 121: "mma.sync"}
    for chip, dtype, found, shared in lines:
        assert found == instruction[chip], (chip, dtype)
        assert shared <= (227 if chip in (90, 100) else 99) * 1024, (chip, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(("quantize", "plain"), [("fp8", ROW_WISE), ("int8", INT8)])
@pytest.mark.parametrize("n", [1, 16, 1000])
def test_the_gpu_has_the_kernel(quantize, plain, n):
    assert not eight_bit.matmul_fault(FUSED[quantize], torch.device("cuda"), (1024, 4096), n)
