"""A step asks nothing of the device: every value that the host would wait for goes through one operator, and none does.

On a CPU there is nothing to wait for, but the operator that hands a tensor's value to Python is the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recipes import make_run, write_rows
from tunesmith.checkpoint.resume import Start
from tunesmith.metrics.sink import Sinks
from tunesmith.signals import StopRequest
from tunesmith.training.build import build
from tunesmith.training.trainer import Trainer

ASKING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique", "aten::item"}
INSIDE = {"tunesmith_test::varlen", "tunesmith_test::varlen_backward"}  # what stands for the GPU's own kernel


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


def trainer_of(tiny: Path, folder: Path, **changes) -> Trainer:
    write_rows(folder / "train.jsonl", 24)
    write_rows(folder / "held.jsonl", 8)
    run = make_run(tiny, folder, held=False, train={"global_batch": "8 examples", "micro_batch": "4 examples"})
    train = replace(run.train, **changes.pop("train", {}))
    run = replace(run, train=train, adapter=replace(run.adapter, **changes.pop("adapter", {})))
    run = replace(run, model=replace(run.model, **changes.pop("model", {})))
    Path(run.output_dir).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(build(run, Start(), say=lambda text: None), Start(), Sinks([]), StopRequest())
    trainer.async_metrics, trainer.session.optimizer.checks_on_host = True, False  # as on CUDA
    trainer.session.model.train()
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"recompute": "full"}},
        {"train": {"clip_norm": None}},
        {"model": {"dtype": "bf16", "quantize": "fp8"}},
        {"model": {"dtype": "bf16", "quantize": "nf4"}},
        {"model": {"dtype": "bf16"}, "adapter": {"kind": "none"}},
    ],
    ids=["lora", "recompute", "no clipping", "fp8", "nf4", "full"],
)
def test_no_step_waits_for_the_device(tiny, tmp_path, varlen_on_cpu, changes):
    trainer = trainer_of(tiny, tmp_path, **changes)
    with trainer.session.loader(0) as loader:
        batches = [batch for batch, _ in zip(loader, range(2), strict=False)]
    before = [p.detach().clone() for _, p in trainer.session.model.trained_parameters()]
    with Asked() as asked:
        for batch in batches:
            assert len(batch.micro) == 2
            trainer.train_step(batch)
    after = [p.detach() for _, p in trainer.session.model.trained_parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True)), "the steps must have trained"
    assert asked.names == []
