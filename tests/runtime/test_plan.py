"""The plan of a run: as few layers recompute as must be, and the micro batch costs the least time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from errors import refuses
from tunesmith.batches.schedule import StepSize
from tunesmith.config.schema import Adapter, Data, Model, Run, Source, Train
from tunesmith.errors import MachineError
from tunesmith.host.chips import CHIPS
from tunesmith.model.arch.spec import read_spec
from tunesmith.planning.calibrate import calibrate_recompute
from tunesmith.planning.machines import Cluster
from tunesmith.planning.memory import MemoryEstimator
from tunesmith.planning.micro_batch import MIN_ROW_LENGTHS
from tunesmith.planning.resolve import resolve_plan
from tunesmith.planning.run_plan import Machine, MemoryEstimate, RunPlan
from tunesmith.planning.savings import check_memory_fits
from tunesmith.planning.workload import measure_work
from tunesmith.train_model import MethodOutput
from tunesmith.units import Size

GIB = 2**30
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
WHOLE_STEPS = {"global_batch": Size(16384, "tokens")}  # every step has the same tokens


def recipe(*, quantize: str = "auto", **train: Any) -> Run:
    return Run(
        model=Model(name="m", dtype="bf16", quantize=quantize),
        data=Data(train=(Source(source="rows.jsonl"),)),
        train=Train(**train),
        adapter=Adapter(),
        output_dir="out",
    )


def gpu(gib: float, **found: Any) -> Machine:
    """A GPU with so much memory free, which this machine need not have."""
    parts = {"attention": ("varlen", "it runs"), "compiles": (True, "it runs")}
    parts |= {"card_bytes": int(gib * GIB)} | found
    return Machine("cuda:0", int(gib * GIB), **parts)


def planned(
    run: Run, gib: float, *, step: int = 16384, longest: int = 2000, before: str = "", **found: Any
) -> RunPlan:
    spec = read_spec(LLAMA, where="test")
    kept = Size.parse(before) if before else None
    machine = gpu(gib, **found)
    cluster = Cluster(CHIPS["dgx-spark" if machine.integrated else "h200"])
    work = measure_work(run, spec, None)._replace(step=StepSize(step, step), longest=longest)
    plan = resolve_plan(MemoryEstimator(run, spec, machine, 21_000_000), cluster, work, kept)
    check_memory_fits(run, plan, machine, resumed=kept is not None)
    return plan


def tokens(count: int) -> Size:
    return Size(count, "tokens")


@pytest.mark.parametrize(
    ("train", "gib", "found", "expected"),
    [
        (WHOLE_STEPS, 139, {}, (tokens(16384), 0)),
        (WHOLE_STEPS, 18, {}, (tokens(2048), 32)),
        ({}, 139, {"step": 3000}, (tokens(4096), 0)),  # no more tokens than a step has
        ({"recompute": "none"}, 32, {}, (None, 0)),
        ({"recompute": 5}, 32, {}, (None, 5)),
        ({"recompute": 99}, 32, {}, (None, 32)),
        # On resume the micro batch of the recipe stands, else that of the checkpoint if it fits.
        ({"micro_batch": tokens(4096)}, 139, {"before": "2048 tokens"}, (tokens(4096), None)),
        ({}, 139, {"before": "2 examples"}, (Size(2, "examples"), None)),
        (WHOLE_STEPS, 139, {"before": "4096 tokens"}, (tokens(4096), None)),
    ],
)
def test_the_micro_batch_and_the_recomputed_layers(train, gib, found, expected):
    plan = planned(recipe(**train), gib, **found)
    size, layers = expected
    assert size in (plan.layout.micro_batch, None)
    assert layers in (plan.recomputed_layers, None)
    by_checkpoint = "before" in found and "micro_batch" not in train
    assert ("checkpoint" in plan.why["micro batch"]) == by_checkpoint


def test_in_80_gib_some_layers_recompute_and_one_fewer_would_not_fit() -> None:
    plan = planned(recipe(micro_batch=tokens(16384)), 79)
    assert 0 < plan.recomputed_layers < 32
    assert plan.memory.total <= 0.9 * 79 * GIB
    one_fewer = recipe(micro_batch=tokens(16384), recompute=plan.recomputed_layers - 1)
    assert planned(one_fewer, 79).memory.total > 0.9 * 79 * GIB


@pytest.mark.parametrize("pack", [True, False])
def test_a_micro_batch_of_examples_is_as_long_as_they_are(pack: bool):
    """16 rows of at most 200 tokens fit where 16 of data.seq_len would be refused."""
    run = recipe(micro_batch=Size(16, "examples"), recompute="none")
    run = replace(run, data=replace(run.data, pack=pack))
    assert planned(run, 40, longest=200).memory.tokens == 16 * 200
    with refuses(MachineError, names=["GiB", "weights", "recompute"]):
        planned(run, 40, longest=2048)
    assert planned(run, 139, step=2500, longest=200).memory.tokens == (2500 if pack else 16 * 200)


def test_a_micro_batch_that_no_longer_fits_is_chosen_anew() -> None:
    anew = planned(recipe(), 24, before="16384 tokens").layout.micro_batch
    assert anew == planned(recipe(), 24).layout.micro_batch
    assert anew.amount < 16384


def test_an_integrated_gpu_which_cannot_expand_segments_has_few_row_lengths():
    run = recipe(micro_batch=tokens(16384), global_batch=Size(16, "examples"))
    discrete, integrated = (
        16384 // planned(run, 139, integrated=is_integrated).layout.multiple
        for is_integrated in (False, True)
    )
    assert integrated <= 2 * MIN_ROW_LENGTHS < discrete


def test_a_chip_without_fp8_keeps_the_base_in_its_dtype() -> None:
    run = recipe(quantize="fp8")
    assert planned(run, 139, scaling=("fp8 row-wise", "it runs")).base == "fp8 row-wise"
    plan = planned(run, 139, scaling=(None, "too old"))
    assert (plan.base, plan.why["base"]) == ("bf16", "too old")


def trial_plan(estimate: MemoryEstimate) -> RunPlan:
    return RunPlan("cuda:0", "varlen", "bf16", 2, memory=estimate)


class Small:
    """A device on which what autograd has saved counts, and more than `size` bytes are an error."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.now = self.most = self.tries = self.previous_peak = self.refused = 0

    def allocated(self) -> int:
        return self.now

    def peak(self) -> int:
        return self.most

    def restart(self) -> None:
        self.now, self.most, self.tries = 0, 0, self.tries + 1

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.now += tensor.numel() * tensor.element_size()
        self.most = max(self.most, self.now)
        if self.now > self.size:
            self.refused += 1
            raise torch.OutOfMemoryError("no room")
        return tensor


class Alike(torch.nn.Module):
    """Eight layers that each keep one vector of 400 bytes, on an input without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(100, 100) for _ in range(8))

    def step_context(self, batch: object) -> AbstractContextManager[None]:
        return nullcontext()

    def forward(self, batch: object) -> MethodOutput:
        hidden = torch.ones(1, 100, requires_grad=True)
        for layer in self.layers:
            hidden = layer(hidden).sin().cos()
        return MethodOutput(hidden.sum(), 1)


@pytest.mark.slow
@pytest.mark.parametrize("estimated", [0, 3, 8])
def test_a_trial_grows_from_few_kept_layers_and_never_runs_out(estimated):
    """Whatever the estimate says, on any size that holds the micro batch at all."""

    def trial(size: float, budget: float, tokens: int = 128) -> tuple[int, Small]:
        model, meter = Alike(), Small(int(size))
        batch = SimpleNamespace(input_ids=torch.zeros(1, tokens))
        estimate = MemoryEstimate(128, estimated, weights=int(budget), recomputed_layer=400)
        with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda t: t):
            plan = calibrate_recompute(
                model, trial_plan(estimate), batch, meter, budget=int(budget)
            )
        assert all(p.grad is None for p in model.parameters())
        assert [layer.recomputed for layer in model.layers] == [
            i < plan.recomputed_layers for i in range(8)
        ]
        return plan.recomputed_layers, meter

    least = trial(1e9, 1)[1].most
    counts = []
    for size in range(least, 8 * least, least // 4):
        count, meter = trial(size, 0.9 * size)
        assert meter.refused == 0
        assert meter.most <= max(least, 0.9 * size)
        counts.append(count)
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == ((8, 8) if estimated == 8 else (8, 0))
    assert {*range(1, 8)} < {*counts} or estimated == 8
    if estimated == 0:  # the first batch may be shorter than others, which keep more
        budget = 8 * least
        assert trial(1e9, budget)[0] == 0 < trial(1e9, budget, tokens=64)[0]
    with refuses(MachineError, where="train.micro_batch", names=["128 tokens"]):
        trial(1000, 900)
