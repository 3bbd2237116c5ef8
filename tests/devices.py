"""Tests whose body runs on the CPU and, under `pytest -m gpu`, on a GPU: what only a GPU can fail is known to run."""

from __future__ import annotations

import pytest
import torch

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")]
cpu_and_gpu = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device that a run takes. On the CPU attention goes the way of CUDA, by an operator of varlen's signature."""
    found = torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")
    monkeypatch.setattr("tunesmith.training.build.choose_device", lambda: found)
    if found.type == "cpu":
        request.getfixturevalue("varlen_on_cpu")
    return found
