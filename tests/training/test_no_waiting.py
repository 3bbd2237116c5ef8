"""A step asks nothing of the device: every value that the host would wait for goes through one
operator, and none does.

On a CPU there is nothing to wait for, but the operator that hands a tensor's value to Python is the
same. On a GPU torch itself refuses whatever waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from devices import cpu_and_gpu, gpu
from picture_runs import picture_run, write_mixed, write_vision_model
from recipes import make_run, merge, write_rows
from tunesmith.batches.loader import GlobalBatch
from tunesmith.checkpoint.resume import Start
from tunesmith.config.schema import Run
from tunesmith.host.signals import StopRequest
from tunesmith.metrics.sink import Sinks
from tunesmith.start.build import build
from tunesmith.start.request import Request
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer

pytestmark = pytest.mark.slow

ASKING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique", "aten::item"}  # fmt: skip
# Those that wait if an index is a mask: the host asks how many elements it chooses.
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}
# What stands for the GPU's own kernel
INSIDE = {"tunesmith_test::varlen", "tunesmith_test::varlen_backward"}


class Asked(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        by_mask = name in INDEXING and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        # Without its output size the host asks for the sum of the repeats.
        sizes = name == "aten::repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in ASKING or by_mask or sizes:
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


def test_what_makes_the_host_wait_is_seen() -> None:
    x, mask, repeats = torch.arange(4.0), torch.tensor([True, False] * 2), torch.tensor([1, 2] * 2)
    waits: list[Callable[[], object]] = [
        x[0].item,
        mask.nonzero,
        lambda: x[mask],
        lambda: x.repeat_interleave(repeats),
    ]
    for function in waits:
        with pytest.raises(AssertionError), nothing_waits(torch.device("cpu")):
            function()
    with nothing_waits(torch.device("cpu")):
        x.masked_fill(mask, 0.0)[repeats].repeat_interleave(repeats, output_size=6)


def trainer_of(tiny: Path, folder: Path, **changes) -> Trainer:
    write_rows(folder / "train.jsonl", 24)
    write_rows(folder / "held.jsonl", 8)
    batches = {"global_batch": "8 examples", "micro_batch": "4 examples", "compile": "off"}
    base = {"train": batches, "checkpoint": {"every": None}}
    return trainer_of_run(make_run(tiny, folder, held=False, **merge(base, changes)))


def trainer_of_run(run: Run) -> Trainer:
    """A trainer that reads the metrics of a step during the next one, as on CUDA."""
    Path(run.output_dir).mkdir(parents=True, exist_ok=True)
    session = build(Request(run))
    trainer = Trainer(session, Start(), Sinks([]), StopControl(StopRequest(), Path(run.output_dir)))
    trainer.metrics.reads_late = True
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
NIGHTLY = pytest.mark.nightly


@cpu_and_gpu
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"train": {"recompute": "full"}}, id="lora, recomputed"),
        pytest.param({"train": {"clip_norm": None}}, id="no clipping", marks=NIGHTLY),
        pytest.param({"model": {**BF16, "quantize": "fp8"}}, id="fp8", marks=NIGHTLY),
        pytest.param({"model": {"quantize": "nf4"}}, id="nf4"),
        pytest.param({"adapter": {"kind": "none"}}, id="full"),
    ],
)
def test_no_step_waits_for_the_device(device, tiny, tmp_path, changes):
    if changes.get("model", {}).get("quantize") == "nf4":
        pytest.importorskip("bitsandbytes")
    changes = merge({"model": BF16 if device.type == "cuda" else {"dtype": "fp32"}}, changes)
    assert_no_step_waits(trainer_of(tiny, tmp_path, **changes), device)


# On a CPU waiting for it cannot be seen.
ON_GPU = pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)], indirect=True)


@ON_GPU
def test_no_compiled_step_waits_for_the_device(device, tiny, tmp_path):
    trainer = trainer_of(tiny, tmp_path, model=BF16, train={"compile": "on"})
    assert_no_step_waits(trainer, device)


@ON_GPU
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_no_step_on_pictures_waits(device, family, tmp_path):
    model = write_vision_model(tmp_path / "model", family)
    batches = {"global_batch": "8 examples", "micro_batch": "4 examples", "compile": "off"}
    changes = {"model": BF16, "train": batches, "checkpoint": {"every": None}}
    trainer = trainer_of_run(picture_run(model, write_mixed(tmp_path, 24, "P"), **changes))
    assert_no_step_waits(trainer, device)
