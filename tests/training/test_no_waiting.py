"""A step asks nothing of the device: every value that the host would wait for goes through one
operator, and none does.

On a CPU there is nothing to wait for, but the operator that hands a tensor's value to Python is the
same. On a GPU torch itself refuses whatever waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from devices import cpu_and_gpu
from recipes import make_run, merge, write_rows
from tunesmith.checkpoint.resume import Start
from tunesmith.data.batches.loader import GlobalBatch
from tunesmith.host.signals import StopRequest
from tunesmith.metrics.sink import Sinks
from tunesmith.training.build import build
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer

pytestmark = pytest.mark.slow

ASKING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique",
    "aten::item",
}
# What stands for the GPU's own kernel
INSIDE = {
    "tunesmith_test::varlen",
    "tunesmith_test::varlen_backward",
}


class Asked(TorchDispatchMode):
    """Notes each operator by which the host would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        if name in ASKING:
            self.names.append(name)
        if name in INSIDE:
            with self._paused():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        kept = list(self.names)
        yield
        self.names[:] = kept


@contextlib.contextmanager
def nothing_waits(device: torch.device) -> Iterator[None]:
    """Fails where the host waits for the device in the block."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with Asked() as asked:
        yield
    assert asked.names == []


def trainer_of(tiny: Path, folder: Path, **changes) -> Trainer:
    write_rows(folder / "train.jsonl", 24)
    write_rows(folder / "held.jsonl", 8)
    batches = {"global_batch": "8 examples", "micro_batch": "4 examples", "compile": "off"}
    base = {"train": batches, "checkpoint": {"every": None}}
    run = make_run(tiny, folder, held=False, **merge(base, changes))
    Path(run.output_dir).mkdir(parents=True, exist_ok=True)
    session = build(run, Start())
    trainer = Trainer(session, Start(), Sinks([]), StopControl(StopRequest(), Path(run.output_dir)))
    trainer.metrics.reads_late = True  # this and the next line: as on CUDA
    trainer.session.optimizer.checks_on_host = False
    trainer.session.model.train()
    return trainer


def assert_no_step_waits(trainer: Trainer, device: torch.device) -> None:
    """Two steps in which the host waits for nothing, and which train."""
    on_gpu = device.type == "cuda"
    with trainer.session.loader(0) as loader:
        batches = [batch for batch, _ in zip(loader, range(5 if on_gpu else 2), strict=False)]
    steps = trainer.steps(batches)

    def step(batch: GlobalBatch) -> None:
        """On a GPU the loop's, with the metrics of the step before; on a CPU reading them is what
        asks.
        """
        if on_gpu:
            next(steps)
        else:
            trainer.train_step(batch)

    for batch in batches[:-2]:  # the first ones compile and allocate
        step(batch)
    before = [p.detach().clone() for _, p in trainer.session.model.trained_parameters()]
    with nothing_waits(device):
        for batch in batches[-2:]:
            assert len(batch.micro) == 2 or trainer.session.plan.compiled
            step(batch)
    after = [p.detach() for _, p in trainer.session.model.trained_parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True)), (
        "the steps must have trained"
    )


BF16 = {"dtype": "bf16"}  # FlashAttention takes no fp32


@cpu_and_gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"model": BF16},
        {"model": BF16, "train": {"recompute": "full"}},
        {"model": BF16, "train": {"clip_norm": None}},
        {"model": {**BF16, "quantize": "fp8"}},
        {"model": {**BF16, "quantize": "nf4"}},
        {"model": BF16, "adapter": {"kind": "none"}},
    ],
    ids=["lora", "recompute", "no clipping", "fp8", "nf4", "full"],
)
def test_no_step_waits_for_the_device(device, tiny, tmp_path, changes):
    if changes["model"].get("quantize") == "nf4":
        pytest.importorskip("bitsandbytes")
    assert_no_step_waits(trainer_of(tiny, tmp_path, **changes), device)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no CUDA GPU: waiting for one cannot be seen"
)
def test_no_compiled_step_waits_for_the_device(tiny, tmp_path):
    trainer = trainer_of(tiny, tmp_path, model=BF16, train={"compile": "on"})
    assert_no_step_waits(trainer, torch.device("cuda"))
