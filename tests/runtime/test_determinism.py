"""`train.deterministic`: on while a run lasts, equal numbers, and what cannot be is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from devices import cpu_and_gpu
from errors import refuses
from recipes import make_run
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, RunError, StoppedError
from tunesmith.methods.sft import SupervisedFineTuning
from tunesmith.metrics.record import StepRecord
from tunesmith.runtime.determinism import WORKSPACE, deterministic_algorithms
from tunesmith.start.run import train


def state() -> tuple[bool, ...]:
    fills = torch.utils.deterministic.fill_uninitialized_memory
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        fills,
    )


@pytest.mark.parametrize("before", [(False, False), (True, True)])
def test_it_is_on_inside_and_as_before_afterwards(before: tuple[bool, bool]) -> None:
    mode, warns = before
    torch.use_deterministic_algorithms(mode, warn_only=warns)
    was = state()
    try:
        with deterministic_algorithms(True):
            assert state() == (True, False, False)
        assert state() == was
        with pytest.raises(ZeroDivisionError), deterministic_algorithms(True):
            raise ZeroDivisionError
        assert state() == was
        with deterministic_algorithms(False):
            assert state() == was
    finally:
        torch.use_deterministic_algorithms(False)


def test_cublas_is_told_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA: only :4096:8 and :16:8 are deterministic. The environment is read once."""
    monkeypatch.setenv(WORKSPACE, ":0:0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with deterministic_algorithms(True):
        pass
    assert os.environ[WORKSPACE] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with deterministic_algorithms(True):
        assert state()[0]
    monkeypatch.delenv(WORKSPACE)
    with (
        refuses(MachineError, names=["cuBLAS"], fix=[f"{WORKSPACE}=:4096:8"]),
        deterministic_algorithms(True),
    ):
        pytest.fail("a product would raise in the middle of a step")


def losses(run: Run, then: Callable[[StepRecord], object] = lambda record: None) -> list[float]:
    return [record.loss for record in train(run, on_record=then, quiet=True).records]


@pytest.mark.slow
def test_an_operator_that_cannot_is_named_with_the_key(tiny, tmp_path, monkeypatch):

    def scattered(*args: object, **options: object) -> None:
        torch.zeros(3).put_(torch.tensor([1]), torch.tensor([2.0]))
        raise ZeroDivisionError("not reached with train.deterministic")

    monkeypatch.setattr(SupervisedFineTuning, "__call__", scattered)
    run = make_run(tiny, tmp_path, held=False, train={"deterministic": True})
    with refuses(
        RunError, names=["put_", "train.deterministic"], fix=["train.deterministic=false"]
    ):
        losses(run)


@pytest.mark.slow
@cpu_and_gpu
def test_resumed_steps_are_equal_bit_for_bit(device, tiny, tmp_path):
    on_gpu = device.type == "cuda"
    steps = 20 if on_gpu else 4  # a CPU's are equal, or differ in the first one
    changes = {"duration": f"{steps} steps", "deterministic": True}
    runs, modes = {}, []
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
        model = {"dtype": "bf16" if on_gpu else "fp32"}
        runs[name] = make_run(tiny, tmp_path / name, held=False, model=model, train=changes)

    def stop(record: StepRecord) -> None:
        if record.step == steps // 2:
            os.kill(os.getpid(), 15)

    with pytest.raises(StoppedError):
        losses(runs["resumed"], stop)
    found = losses(runs["resumed"], lambda record: modes.append(state()[0]))
    assert len(found) in (steps // 2 - 1, steps // 2), (
        "a GPU's record comes one step late, and so does the stop that it asks for"
    )
    assert {*modes} == {True}
    assert not state()[0]
    assert found == losses(runs["whole"])[-len(found) :]
    whole, resumed = (
        load_file(Path(run.output_dir) / "final" / "adapter_model.safetensors")
        for run in runs.values()
    )
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
