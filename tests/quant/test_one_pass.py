"""The kernel of one-pass gradients: right in Triton's interpreter, and taken by the assembler of each chip."""

from __future__ import annotations

import pytest
import torch

from quant.scripts import output_of
from ranks import run_ranks
from tunesmith.adapter import lora
from tunesmith.config.schema import Adapter


def test_the_kernel_is_right_in_the_interpreter():
    assert output_of("one_pass_interpreted.py", TRITON_INTERPRET="1") == "22 checks\n"


def test_the_assembler_takes_the_kernel_on_every_chip(tmp_path):
    pytest.importorskip("triton", reason="Triton is for Linux")
    from quant.one_pass_assembled import compiled

    (found,) = run_ranks(1, compiled, tmp_path)
    assert len(found) == 2
    for chip, _, shared in found:  # bytes of shared memory that a block may have
        assert 0 < shared <= (227 if chip == 90 else 99) * 1024


def test_on_a_cpu_it_has_no_effect_and_says_so():
    model = torch.nn.Sequential(torch.nn.Linear(32, 32, dtype=torch.bfloat16))
    lora.attach_lora(model, Adapter(rank=4), seed=0)
    assert "it needs a GPU" in lora.use_one_pass(model, torch.device("cpu"), torch.bfloat16)
    assert not any(layer.one_pass for _, layer in lora.loras(model))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(("n", "m", "rank"), [(1, 48, 1), (1000, 4096, 8), (4096, 6144, 24)])
def test_the_gpu_has_the_kernel(n, m, rank):
    from tunesmith.quant.one_pass import kernel_fault, lora_gradients

    cuda = torch.device("cuda")
    assert not kernel_fault(cuda, torch.bfloat16)
    dy, b, xa = (torch.randn(size, device=cuda).bfloat16() for size in ((n, m), (m, rank), (n, rank)))
    got, again = lora_gradients(dy, b, xa), lora_gradients(dy, b, xa)
    for found, same, expected in zip(got, again, (dy.double() @ b.double(), dy.double().T @ xa.double()), strict=True):
        assert torch.equal(found, same)
        assert (found - expected).norm() <= 0.005 * expected.norm()  # rounded once to bf16: 2^-9
