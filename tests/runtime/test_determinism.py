"""`train.deterministic`: on while a run lasts, off after it; equal numbers; what cannot be
deterministic is named.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from devices import cpu_and_gpu
from errors import holds
from recipes import make_run
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, RunError, StoppedError
from tunesmith.metrics.record import StepRecord
from tunesmith.runtime.determinism import WORKSPACE, deterministic_algorithms
from tunesmith.training.run import train

pytestmark = pytest.mark.slow

ON = {"deterministic": True}


def state() -> tuple[bool, ...]:
    fills = torch.utils.deterministic.fill_uninitialized_memory
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        fills,
    )


@pytest.mark.parametrize("before", [(False, False), (True, True), (True, False)])
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
    """NVIDIA: only :4096:8 and :16:8 are deterministic.

    The environment is read once, so it stays for the next run.
    """
    monkeypatch.setenv(WORKSPACE, ":0:0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with deterministic_algorithms(True):
        pass
    assert os.environ[WORKSPACE] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with deterministic_algorithms(True):
        assert state()[0]
    monkeypatch.delenv(WORKSPACE)
    with pytest.raises(MachineError, match="cuBLAS") as caught, deterministic_algorithms(True):
        pytest.fail("a product would raise in the middle of a step")
    assert f"{WORKSPACE}=:4096:8" in caught.value.fix


def losses(run: Run, then: Callable[[StepRecord], object] = lambda record: None) -> list[float]:
    return [record.loss for record in train(run, on_record=then, quiet=True).records]


def trained(run: Run) -> dict[str, torch.Tensor]:
    return load_file(Path(run.output_dir) / "final" / "adapter_model.safetensors")


def stopped_and_resumed(run: Run, step: int) -> list[float]:
    """Losses of the second start, after a stop that `step` asks for."""

    def stop(record: StepRecord) -> None:
        if record.step == step:
            os.kill(os.getpid(), 15)

    with pytest.raises(StoppedError):
        losses(run, stop)
    return losses(run)


def test_a_run_with_it_is_one_without_and_resumes_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    seen: list[bool] = []
    runs = {name: tmp_path / name for name in ("plain", "whole", "resumed")}
    for folder in runs.values():
        folder.mkdir()
    plain = losses(make_run(tiny, runs["plain"]), lambda record: seen.append(state()[0]))
    whole = make_run(tiny, runs["whole"], train=ON)
    assert losses(whole, lambda record: seen.append(state()[0])) == plain, (
        "no operator of a CPU step has a second form"
    )
    assert seen == [False] * 8 + [True] * 8
    assert not state()[0]
    resumed = make_run(tiny, runs["resumed"], train=ON)
    assert stopped_and_resumed(resumed, 3) == plain[3:]
    for name, tensor in trained(whole).items():
        assert torch.equal(trained(resumed)[name], tensor), name
    env = json.loads((runs["whole"] / "run" / "env.json").read_text())
    assert env["choices"]["kernels"]["taken"] == "deterministic"
    assert "kernels" not in json.loads((runs["plain"] / "run" / "env.json").read_text())["choices"]


def test_an_operator_that_cannot_is_named_with_the_key(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Tensor.put_` is on torch's list for every device."""
    from tunesmith.methods.sft import SupervisedFineTuning

    call = SupervisedFineTuning.__call__

    def scattered(self: SupervisedFineTuning, *args: object, **options: object) -> object:
        torch.zeros(3).put_(torch.tensor([1]), torch.tensor([2.0]))
        return call(self, *args, **options)

    monkeypatch.setattr(SupervisedFineTuning, "__call__", scattered)
    assert losses(make_run(tiny, tmp_path, held=False, output_dir=str(tmp_path / "without")))
    with pytest.raises(RunError) as caught:
        losses(make_run(tiny, tmp_path, held=False, train=ON))
    text = caught.value.text()
    assert holds(text, "put_", "train.deterministic")
    assert "train.deterministic=false" in text


@cpu_and_gpu
@pytest.mark.parametrize("deterministic", [True, False])
def test_steps_resumed(
    deterministic: bool, device: torch.device, tiny: Path, tmp_path: Path
) -> None:
    """Bitwise with the key. Without it, on a GPU, FlashAttention's backward sums in any order:
    gradients differ by bf16's rounding, 2**-8 of the largest, which 10 steps of rate 1e-3 turn into
    a thousandth of the loss.
    """
    steps = 20 if device.type == "cuda" else 4  # a CPU's are equal, or differ in the first one
    changes = {"duration": f"{steps} steps", "deterministic": deterministic}
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    whole, resumed = (
        make_run(tiny, tmp_path / name, model={"dtype": "bf16"}, train=changes)
        for name in ("whole", "resumed")
    )
    found = stopped_and_resumed(resumed, steps // 2)
    assert len(found) in (steps // 2 - 1, steps // 2), (
        "a GPU's record comes one step late, and so does the stop that it asks for"
    )
    expected = losses(whole)[-len(found) :]
    if deterministic:
        assert found == expected
        assert all(
            torch.equal(trained(resumed)[name], tensor) for name, tensor in trained(whole).items()
        )
    else:
        assert found == pytest.approx(expected, rel=1e-3)
