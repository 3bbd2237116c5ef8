"""The products of experts by one kernel are those of one expert after the other."""

from __future__ import annotations

import grouped_products
import pytest
import torch

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_all_experts_by_one_kernel(device: str) -> None:
    differences = grouped_products.compare(torch.device(device))
    assert len(differences) == 10
    assert not grouped_products.too_large(differences), differences


def test_a_difference_is_named() -> None:
    results = {"y": 1e-3, "dA": float("nan")}
    named = grouped_products.too_large({"bfloat16 dense": results, "float32 mxfp4": results})
    assert named == ["bfloat16 dense dA", "float32 mxfp4 y", "float32 mxfp4 dA"]


def test_weights_in_mxfp4_are_drawn_within_its_range() -> None:
    stack = grouped_products.stack_of("mxfp4", torch.float32, torch.device("cpu"))
    sizes = stack.dense(0, grouped_products.EXPERTS, torch.float32).abs()
    assert (sizes == sizes.max()).float().mean() < 0.1
    assert sizes.std() > 0
