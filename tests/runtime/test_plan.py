"""The plan of a run: as few layers recompute as must be, and the micro batch costs the least time."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from errors import refuses
from recipes import built_model, make_run
from tunesmith.build_model import count_trained, define_model
from tunesmith.config.schema import Adapter, Data, Model, Run, Source, Train
from tunesmith.data.batches.batch import Batch, collate
from tunesmith.data.batches.schedule import StepSize
from tunesmith.data.text.example import Example
from tunesmith.errors import MachineError
from tunesmith.host.chips import CHIPS
from tunesmith.hub.model_files import read_model_files
from tunesmith.methods.base import MethodOutput
from tunesmith.model.spec import read_spec
from tunesmith.planning.calibrate import MemoryMeter, calibrate_recompute, revise_recomputed
from tunesmith.planning.machines import Cluster
from tunesmith.planning.memory import MemoryEstimator, min_recomputed
from tunesmith.planning.micro_batch import MIN_ROW_LENGTHS
from tunesmith.planning.resolve import resolve_plan
from tunesmith.planning.run_plan import Machine, MemoryEstimate, MicroBatchLayout, RunPlan, Saving
from tunesmith.planning.savings import check_memory_fits
from tunesmith.planning.workload import measure_work
from tunesmith.runtime.recompute import recompute_layers
from tunesmith.units import Size

GIB = 2**30
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
LARGE = LLAMA | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64
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
    run: Run,
    config: dict,
    gib: float,
    *,
    step: int = 16384,
    longest: int = 2000,
    trained: int = 21_000_000,
    before: str = "",
    **found,
) -> RunPlan:
    spec = read_spec(config, where="test")
    kept = Size.parse(before) if before else None
    machine = gpu(gib, **found)
    cluster = Cluster(CHIPS["dgx-spark" if machine.integrated else "h200"])
    work = measure_work(run, spec, None)._replace(step=StepSize(step, step), longest=longest)
    plan = resolve_plan(MemoryEstimator(run, spec, machine, trained), cluster, work, kept)
    check_memory_fits(plan, machine, resumed=kept is not None)
    return plan


def micro_batch(*args: Any, **found: Any) -> Size:
    return planned(*args, **found).layout.micro_batch


def tokens(count: int) -> Size:
    return Size(count, "tokens")


@pytest.mark.parametrize(
    ("train", "gib", "found", "expected"),
    [
        (WHOLE_STEPS, 139, {}, (tokens(16384), 0)),
        (WHOLE_STEPS, 18, {}, (tokens(2048), 32)),
        ({}, 139, {"step": 3000}, (tokens(4096), 0)),  # no more tokens than a step has
        ({"recompute": "none"}, 32, {}, (None, 0)),
        ({"recompute": "full"}, 32, {}, (None, 32)),
        ({"recompute": 5}, 32, {}, (None, 5)),
        ({"recompute": 99}, 32, {}, (None, 32)),
        # On resume the micro batch of the recipe stands, else that of the checkpoint if it fits.
        ({"micro_batch": tokens(4096)}, 139, {"before": "2048 tokens"}, (tokens(4096), None)),
        ({}, 79, {"before": "2048 tokens", "compiles": (False, "")}, (tokens(2048), None)),
        ({}, 139, {"before": "2 examples"}, (Size(2, "examples"), None)),
        (WHOLE_STEPS, 139, {"before": "4096 tokens"}, (tokens(4096), None)),
    ],
)
def test_the_micro_batch_and_the_recomputed_layers(train, gib, found, expected):
    plan = planned(recipe(**train), LLAMA, gib, **found)
    size, layers = expected
    assert size in (plan.layout.micro_batch, None)
    assert layers in (plan.recomputed_layers, None)
    by_checkpoint = "before" in found and "micro_batch" not in train
    assert ("checkpoint" in plan.why["micro batch"]) == by_checkpoint


def test_in_80_gib_some_layers_recompute_and_one_fewer_would_not_fit() -> None:
    plan = planned(recipe(micro_batch=tokens(16384)), LLAMA, 79)
    assert 0 < plan.recomputed_layers < 32
    assert plan.memory.total <= 0.9 * 79 * GIB
    one_fewer = recipe(micro_batch=tokens(16384), recompute=plan.recomputed_layers - 1)
    assert planned(one_fewer, LLAMA, 79).memory.total > 0.9 * 79 * GIB


def test_a_smaller_micro_batch_is_taken_where_that_saves_recomputation() -> None:
    """70B in nf4 on 139 GiB: at 16,384 tokens most layers would have to recompute."""
    plan = planned(recipe(quantize="nf4", **WHOLE_STEPS), LARGE, 139, trained=104_000_000)
    assert plan.layout.micro_batch.amount < 16384
    assert 16384 % plan.layout.micro_batch.amount == 0, (
        "a step is cut into whole micro batches, all of one size"
    )
    assert plan.recomputed_layers < 4
    whole = recipe(quantize="nf4", micro_batch=tokens(16384))
    assert planned(whole, LARGE, 139, trained=104_000_000).recomputed_layers > 40


@pytest.mark.parametrize("pack", [True, False])
def test_a_micro_batch_of_examples_is_as_long_as_they_are(pack: bool):
    """16 rows of at most 200 tokens fit where 16 of data.seq_len would be refused."""
    run = recipe(micro_batch=Size(16, "examples"), recompute="none")
    run = replace(run, data=replace(run.data, pack=pack))
    assert planned(run, LLAMA, 40, longest=200).memory.tokens == 16 * 200
    with refuses(MachineError, names=["GiB", "weights", "recompute"]):
        planned(run, LLAMA, 40, longest=2048)
    assert planned(run, LLAMA, 139, step=2500, longest=200).memory.tokens == (
        2500 if pack else 16 * 200
    )


def test_a_micro_batch_that_no_longer_fits_is_chosen_anew() -> None:
    anew = micro_batch(recipe(), LLAMA, 24, before="16384 tokens")
    assert anew == micro_batch(recipe(), LLAMA, 24)
    assert anew.amount < 16384


@pytest.mark.parametrize(
    ("changes", "compiles", "layout"),
    [
        ({}, False, {}),
        ({}, True, {"multiple": 128, "max_document": 2048}),
        (WHOLE_STEPS, True, {"row_length": 4096, "max_document": 2048}),
        ({"micro_batch": Size(2, "examples")}, True, {"multiple": 128, "max_document": 2048}),
    ],
)
def test_compiled_graphs_see_few_shapes(changes, compiles, layout):
    given = {"micro_batch": tokens(4096)} | changes
    plan = planned(recipe(**given), LLAMA, 139, compiles=(compiles, ""))
    assert plan.layout == MicroBatchLayout(given["micro_batch"], **layout)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("compiles", [True, False])
def test_without_expandable_segments_micro_batches_have_few_lengths(pack, compiles):
    """An integrated GPU has none."""
    run = recipe(micro_batch=tokens(16384), global_batch=Size(16, "examples"))
    run = replace(run, data=replace(run.data, pack=pack))
    counts, row = [], 16384 if pack else run.data.seq_len
    for integrated in (False, True):
        found = {"integrated": integrated, "compiles": (compiles, "")}
        layout = planned(run, LLAMA, 139, **found).layout
        counts.append(row // layout.multiple)
    assert counts[1] <= 2 * MIN_ROW_LENGTHS < counts[0]


def test_a_chip_without_fp8_keeps_the_base_in_its_dtype() -> None:
    run = recipe(quantize="fp8")
    assert planned(run, LLAMA, 139, scaling=("fp8 row-wise", "it runs")).base == "fp8 row-wise"
    plan = planned(run, LLAMA, 139, scaling=(None, "too old"))
    assert (plan.base, plan.why["base"]) == ("bf16", "too old")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter": {"rank": 2, "modules_to_save": ["embed_tokens", "norm"]}},
        {"adapter": {"kind": "none"}},
        pytest.param({"model": {"quantize": "nf4", "dtype": "bf16"}}, marks=pytest.mark.slow),
    ],
    ids=["lora", "modules to save", "full", "nf4"],
)
def test_trained_parameters_are_counted_on_meta(tiny, tmp_path, changes):
    run = make_run(tiny, tmp_path, **changes)
    on_meta = define_model(run, read_model_files(tiny, run.model))
    assert all(p.is_meta for p in on_meta.parameters())
    trained = [p for _, p in built_model(run, tiny).trained_parameters()]
    assert count_trained(run, on_meta) == sum(p.numel() for p in trained) > 0


@pytest.mark.parametrize("room", range(-10, 100, 7))
def test_fewest_layers(room: int) -> None:
    def activations(layers: int) -> int:
        return (8 - layers) * 10 + layers * 2

    count = min_recomputed(room, [10] * 8, 2)
    assert activations(count) <= room or count == 8
    assert count == 0 or activations(count - 1) > room


def test_a_trial_moves_the_count_by_the_room_that_is_left_or_missing():
    # 10 layers of 32 recompute and keep 10 each; the other 22 keep 100 each.
    activations = 22 * 100 + 10 * 10
    for room, count in ((0, 10), (91, 9), (1e9, 0), (-1, 11), (-1e9, 32)):
        assert revise_recomputed(10, 32, activations, 10, room=room) == count
    assert revise_recomputed(32, 32, 32 * 10, 10, room=1e9) == 32


def trial_plan(estimate: MemoryEstimate) -> RunPlan:
    savings = (Saving("train.recompute=full", GIB, True), Saving("data.seq_len=64", GIB, False))
    return RunPlan("cuda:0", "varlen", "bf16", 2, memory=estimate, savings=lambda: savings)


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
    batch = SimpleNamespace(input_ids=torch.zeros(1, 128))

    def trial(size: float, budget: float) -> tuple[int, Small]:
        model, meter = Alike(), Small(int(size))
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
    with refuses(MachineError, where="train.micro_batch", names=["128 tokens"]) as refused:
        trial(1000, 900)
    assert refused.value.fix == "set data.seq_len=64 (1.0 GiB)"


def kept_without_recompute(model: Any, batch: Batch) -> int:
    """Bytes that the forward of a model keeps for its backward where no layer recomputes."""
    meter = Small(10**9)
    model.train()
    recompute_layers(model.layers, 0)
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda t: t):
        model(batch)
    return meter.most


def row(count: int) -> Batch:
    example = Example(np.arange(2, 2 + count, dtype=np.int32), np.arange(count) > 0)
    return collate([[example]], length=count, pad_id=0)


def trial_of(model: Any, batch: Batch, budget: int, weights: int = 0) -> tuple[int, Small]:
    """The layers that recompute after a trial whose estimate is for 128 tokens, and its meter."""
    meter = Small(10**9)
    estimate = MemoryEstimate(128, weights=weights, recomputed_layer=128 * 64 * 4)
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda t: t):
        plan = calibrate_recompute(model, trial_plan(estimate), batch, meter, budget=budget)
    return plan.recomputed_layers, meter


@pytest.mark.slow
def test_a_trial_learns_from_few_layers_what_the_others_would_keep(tiny: Path) -> None:
    """The saved tensors of a tiny model; by the estimate nothing has to recompute."""
    model = built_model(replace(recipe(), model=Model(name=str(tiny), dtype="fp32")), tiny)
    batch, room = row(128), 10**9
    count, meter = trial_of(model, batch, room, weights=room)
    assert (count, meter.tries) == (0, 1)
    needed = kept_without_recompute(model, batch)
    assert meter.most < 0.7 * needed
    assert trial_of(model, batch, meter.most - 1, weights=meter.most - 1)[0] == 2
    # Where the estimate leaves much room, its own number is tried at once: a trial of another would
    # compile for nothing.
    count, meter = trial_of(model, batch, room, weights=int(0.7 * room))
    assert (count, meter.tries, meter.most) == (0, 1, needed)
    # The first step may be short: what it was measured to keep grows with the tokens. A tenth less
    # than all is needed: one layer of the two has to recompute, whichever batch the trial sees.
    for tokens_of_first in (128, 32):
        assert trial_of(model, row(tokens_of_first), needed * 9 // 10)[0] == 1


def test_the_peak_before_a_restart_is_kept():
    peaks = iter((7, 3, 5))
    asked: list[str] = []
    cuda = SimpleNamespace(
        max_memory_allocated=lambda device: next(peaks),
        empty_cache=lambda: asked.append("emptied"),
        reset_peak_memory_stats=lambda device: asked.append("reset"),
    )
    meter = MemoryMeter(torch.device("cuda"), cuda)
    found = []
    for _ in range(3):
        meter.restart()
        found.append(meter.previous_peak)
    assert (found, asked) == ([7, 7, 7], ["emptied", "reset"] * 3)


def test_a_trial_whose_backward_fails_leaves_nothing_in_the_way_of_the_next() -> None:
    losses: list[weakref.ref[torch.Tensor]] = []

    class Full(Alike):
        """Its first backward finds no room."""

        def forward(self, batch: object) -> MethodOutput:
            loss = self.layers[0](torch.ones(1, 100)).sum()
            loss.register_hook(self.refuse)
            losses.append(weakref.ref(loss))
            return MethodOutput(loss, 1)

        def refuse(self, grad: torch.Tensor) -> None:
            if len(losses) < 2:
                raise torch.OutOfMemoryError("no room")

    class Watching(Small):
        def restart(self) -> None:
            assert all(loss() is None for loss in losses)
            super().restart()

    meter, estimate = Watching(10**9), MemoryEstimate(tokens=128, recomputed_layer=128)
    batch = SimpleNamespace(input_ids=torch.zeros(1, 128))
    calibrate_recompute(Full(), trial_plan(estimate), batch, meter, budget=10**9)
    assert (meter.tries, len(losses)) == (2, 2)


def test_what_a_trial_has_not_allocated_is_counted_once():
    """LoRA: fp32 gradients and weights are there, two moments and a checkpoint's copies to come.

    Full bf16: gradients of the layers' matrices are there in fp32, the others in bf16; the rest of
    their fp32 form, moments and master come with the optimizer.
    """
    spec = read_spec(LLAMA, where="test")
    lora = MemoryEstimator(recipe(), spec, gpu(139), 100).estimate(2048)
    assert (lora.gradients, lora.optimizer, lora.copies) == (400, 100 * 8, 100 * 12)
    full_run, count = replace(recipe(), adapter=Adapter(kind="none")), spec.parameters
    full = MemoryEstimator(full_run, spec, gpu(139), count).estimate(2048)
    assert full.gradients == 2 * count + 2 * spec.layer_matrices
    assert full.gradients + full.optimizer == count * (4 + 8 + 4)
    assert lora.weights - full.weights == 400


def test_a_large_card_has_room_for_larger_chunks_of_logits() -> None:
    """By the card's memory and not by what of it is free, as the loss."""
    run = recipe(micro_batch=tokens(16384), recompute="none")
    small = planned(run, LLAMA, 139, card_bytes=24 << 30).memory.workspace
    large = planned(run, LLAMA, 138, card_bytes=141 << 30).memory.workspace
    # bytes: raw logits, their fp32 form, the raw gradient
    assert large == 2048 * LLAMA["vocab_size"] * 8
    # The backward of a layer: 512 logits take less
    assert small == 2 * 16384 * (2 * 14336 + 3 * 4096)
