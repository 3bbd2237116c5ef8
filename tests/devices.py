"""Tests that run on the CPU and, under `pytest -m gpu`, on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

# Beside an empty cache Inductor compiles a program for each set of vector instructions, and runs it
# in a process of its own, to learn what the processor's own list says.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]
cpu_and_gpu = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=gpu)], indirect=True
)


def run_interpreted(file: str) -> None:
    """Run a test file as a program whose Triton kernels the interpreter runs, on the CPU."""
    pytest.importorskip("triton")
    # Triton reads the first as it is imported.
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, file], check=True, env=os.environ | environment)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device that a run takes. On the CPU attention goes the way of CUDA (`varlen.py`)."""
    found = torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")
    monkeypatch.setattr("tunesmith.start.plan.choose_device", lambda: found)
    if found.type == "cpu":
        request.getfixturevalue("varlen_on_cpu")
    return found


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of 8 tokens at most: a random model ends none of them by itself."""
    from tunesmith.answers.decoding import Decoding

    config = Decoding.config

    def short(self: Decoding, **tokens: Any) -> Any:
        return config(replace(self, max_new_tokens=min(8, self.max_new_tokens)), **tokens)

    monkeypatch.setattr(Decoding, "config", short)


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run what is compiled as it is traced, without the seconds of a C++ compiler."""
    compiler = torch.compile

    def traced(*args: Any, **options: Any) -> Any:
        return compiler(*args, **options | {"backend": "eager"})

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", traced)
    yield
    torch.compiler.reset()


def graphs_compiled() -> int:
    """Count the graphs that torch.compile has built in this process so far."""
    # A slow import, for tests that compile only.
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
