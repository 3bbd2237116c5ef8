"""The kernels that move rows of experts: on a GPU, and here in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from devices import gpu, run_interpreted

WIDTH = 1100  # more than a program has columns


def compare(device: str, dtype: torch.dtype) -> None:
    """Each kernel beside torch."""
    from tunesmith.quant import row_kernels

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        # Small whole numbers: their sums are exact, in any order and in bf16.
        return torch.randint(-3, 4, shape, generator=generator).to(device, dtype)

    x = draw(60, WIDTH)
    rows = torch.randint(60, (77,), generator=generator).to(device)
    assert torch.equal(row_kernels.copy_rows(x, rows), x[rows])
    places = torch.randperm(60, generator=generator).view(20, 3).to(device)
    assert torch.equal(row_kernels.add_chosen_rows(x, places), x[places].sum(1))
    # Experts without rows, with a tile, with more, with one row; a number that is no power of two.
    for ends in ([0, 128, 128, 301, 302], [7], [5, 5]):
        offsets = torch.tensor(ends, dtype=torch.int32, device=device)
        y, low, factors = draw(ends[-1], WIDTH), draw(ends[-1], 4), draw(len(ends), 4, WIDTH)
        expected = y.clone()
        start = 0
        for end, factor in zip(ends, factors, strict=True):
            expected[start:end] += low[start:end] @ factor
            start = end
        row_kernels.add_low_product(y, low, factors, offsets)
        assert torch.equal(y, expected), ends


def test_factors_of_a_rank_that_was_not_measured_are_multiplied_by_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    from tunesmith.quant import expert_rows, row_kernels

    taken = []
    monkeypatch.setattr(expert_rows, "_has_kernels", lambda _: True)
    monkeypatch.setattr(row_kernels, "add_low_product", lambda *_: taken.append(True))
    offsets = torch.tensor([3], dtype=torch.int32)
    for rank in (16, 24):
        y = torch.zeros(3, 16)
        expert_rows.add_low(y, torch.ones(3, rank), torch.ones(1, rank, 16), offsets)
        assert len(taken) == 1
        assert (y == (0 if rank == 16 else rank)).all()


@pytest.mark.slow
def test_the_kernels_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_the_kernels(device: str) -> None:
    compare(device, torch.bfloat16)


if __name__ == "__main__":
    compare("cpu", torch.float32)  # in the interpreter a `tl.dot` of bf16 is wrong
