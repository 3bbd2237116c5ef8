"""A CPU that emulates bf16 is named before a run crawls on it."""

from __future__ import annotations

import pytest
import torch

from logged import logged_lines
from recipes import make_run
from tunesmith.metrics import hardware
from tunesmith.training.build import check_machine

CPU = torch.device("cpu")


def test_the_products_are_compared():
    assert 0.01 < hardware.bf16_slowdown(CPU) < 1000


@pytest.mark.parametrize(
    ("slowdown", "dtype", "warned"),
    [(85.0, "bf16", True), (85.0, "fp32", False), (0.3, "bf16", False)],
)
def test_only_emulated_products_are_warned_of(slowdown, dtype, warned, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "bf16_slowdown", lambda device: slowdown)
    with logged_lines() as found:
        check_machine(make_run(tiny, tmp_path, model={"dtype": dtype}), CPU)
    assert [text for text in found if "85 times" in text and "model.dtype=fp32" in text] == found
    assert bool(found) == warned
