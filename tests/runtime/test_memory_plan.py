"""The memory plan: as few layers are run again as must be, and the micro batch that costs the least time."""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tunesmith.config.schema import Adapter, Data, Model, Run, Source, Train
from tunesmith.data.loader import StepSize
from tunesmith.errors import MachineError
from tunesmith.methods.base import MethodOutput
from tunesmith.model.spec import ModelSpec, read_spec
from tunesmith.runtime import calibrate, compilation, memory_plan
from tunesmith.runtime.memory_plan import plan_memory, recomputed_layers
from tunesmith.units import Size

GIB = 2**30
GPU = torch.device("cuda")
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
LARGE = LLAMA | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64
}  # fmt: skip


def facts(config: dict) -> ModelSpec:
    return read_spec(config, where="test")


def recipe(**train) -> Run:
    data = Data(train=(Source(source="rows.jsonl"),))
    return Run(model=Model(name="m"), data=data, train=Train(**train), adapter=Adapter(), output_dir="out")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of some size, as far as a plan asks: how much is free, and whether the compiler runs."""
    monkeypatch.setattr(compilation, "compiler_fault", lambda device: "")

    def of(gib: float) -> None:
        monkeypatch.setattr(memory_plan, "free_bytes", lambda device: int(gib * GIB))

    return of


def planned(run: Run, config: dict, *, step: int = 16384, trained: int = 21_000_000, fixed: bool = True):
    return plan_memory(run, facts(config), GPU, trained=trained, step=StepSize(step, step), fixed=fixed)


def needed(found, run: Run, config: dict) -> float:
    f = facts(config)
    kept = (f.layers - found.recomputed) * found.activation_bytes + found.recomputed * found.rerun_bytes
    return found.static_bytes + found.micro_tokens * kept + memory_plan.workspace_bytes(run, f, GPU, found.micro_tokens)


def test_with_room_nothing_is_run_again_and_the_micro_batch_is_whole(gpu):
    gpu(139)
    found = planned(recipe(), LLAMA)
    assert (found.micro_tokens, found.recomputed) == (16384, 0)


def test_in_80_gib_some_layers_are_run_again_and_one_fewer_would_not_fit(gpu):
    gpu(79)
    run = recipe(micro_batch=Size(16384, "tokens"))
    found = planned(run, LLAMA)
    assert 0 < found.recomputed < 32
    assert needed(found, run, LLAMA) <= 0.9 * 79 * GIB
    assert needed(replace(found, recomputed=found.recomputed - 1), run, LLAMA) > 0.9 * 79 * GIB


def test_a_smaller_micro_batch_is_taken_where_that_saves_running_layers_again(gpu):
    """70B in nf4 on 139 GiB: at 16,384 tokens most layers would have to be run again, at 4,096 hardly any."""
    gpu(139)
    run = replace(recipe(), model=Model(name="m", quantize="nf4"))
    found = planned(run, LARGE, trained=104_000_000)
    assert found.micro_tokens < 16384
    assert found.recomputed < 4
    whole = planned(replace(run, train=Train(micro_batch=Size(16384, "tokens"))), LARGE, trained=104_000_000)
    assert whole.recomputed > 40


def test_a_step_is_cut_into_whole_micro_batches_where_all_are_of_one_size(gpu):
    gpu(139)
    run = replace(recipe(), model=Model(name="m", quantize="nf4"))
    assert 16384 % planned(run, LARGE, trained=104_000_000).micro_tokens == 0


def test_a_card_that_is_too_small_gets_the_smallest_plan(gpu):
    gpu(16)
    found = planned(recipe(), LLAMA)
    assert (found.micro_tokens, found.recomputed) == (2048, 32)


@pytest.mark.parametrize(("given", "layers"), [("none", 0), ("full", 32), (5, 5), (99, 32)])
def test_what_the_recipe_says_stands(gpu, given, layers):
    gpu(24)
    assert planned(recipe(recompute=given), LLAMA).recomputed == layers


def test_no_more_tokens_than_a_step_has(gpu):
    gpu(139)
    assert planned(recipe(), LLAMA, step=3000, fixed=False).micro_tokens == 4096


def test_an_8b_lora_run_with_full_recompute_is_estimated_under_18_gib(gpu):
    gpu(139)
    run = recipe(recompute="full", micro_batch=Size(2048, "tokens"))
    found = planned(run, LLAMA)
    assert 16 < needed(found, run, LLAMA) / GIB < 18


def test_fewest_layers():
    for left in range(-10, 100, 7):
        count = recomputed_layers(left, 2, 8, kept=5, rerun=1)

        def held(layers: int) -> int:
            return 2 * ((8 - layers) * 5 + layers * 1)

        assert held(count) <= left or count == 8
        assert count == 0 or held(count - 1) > left


def test_what_a_trial_measured_moves_the_count_by_what_is_left_or_lacks():
    # 10 layers of 32 are run again; the other 22 keep 100 each, the ten 10.
    kept = 22 * 100 + 10 * 10
    assert calibrate.revised(10, 32, kept=kept, rerun=10, room=0) == 10
    assert calibrate.revised(10, 32, kept=kept, rerun=10, room=91) == 9
    assert calibrate.revised(10, 32, kept=kept, rerun=10, room=1e9) == 0
    assert calibrate.revised(10, 32, kept=kept, rerun=10, room=-1) == 11
    assert calibrate.revised(10, 32, kept=kept, rerun=10, room=-1e9) == 32
    assert calibrate.revised(32, 32, kept=32 * 10, rerun=10, room=1e9) == 32


class Small:
    """A device of `size` bytes: what autograd has saved counts, and more than `size` of it is an error."""

    def __init__(self, size: int) -> None:
        self.size, self.now, self.most, self.tries = size, 0, 0, 0

    def held(self) -> int:
        return self.now

    def peak(self) -> int:
        return self.most

    def restart(self) -> None:
        self.now, self.most, self.tries = 0, 0, self.tries + 1

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.now += tensor.numel() * tensor.element_size()
        self.most = max(self.most, self.now)
        if self.now > self.size:
            raise torch.OutOfMemoryError("no room")
        return tensor


def test_a_trial_runs_more_layers_again_until_the_micro_batch_fits(tiny):
    """On the real road: the saved tensors of a tiny model, held against a device that is too small for all of them."""
    from tunesmith.build_model import build_model
    from tunesmith.data.batch import Example, collate

    run = replace(recipe(), model=Model(name=str(tiny), dtype="fp32"))
    model = build_model(run, tiny, device=torch.device("cpu"))
    import numpy as np

    rows = [[Example(np.arange(2, 130, dtype=np.int32), np.arange(128) > 0)]]
    batch = collate(rows, length=128, pad_id=0)

    def trial(size: int, count: int) -> tuple[int, Small]:
        meter = Small(size)
        estimate = memory_plan.MemoryPlan(128, count, 0, 1, 128 * 64 * 4 // 128, size, "")
        with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda t: t):
            return calibrate.calibrate_recompute(model, batch, estimate, meter, budget=size, later=0), meter

    whole, meter = trial(10**9, 0)
    assert whole == 0
    count, small = trial(meter.most * 3 // 4, 0)
    assert small.tries > 1
    assert count > 0
    assert [layer.recomputed for layer in model.layers] == [i < count for i in range(2)]
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(MachineError, match="128 tokens does not fit"):
        trial(1000, 0)


def test_a_trial_whose_backward_fails_leaves_nothing_in_the_way_of_the_next():
    losses: list[weakref.ref[torch.Tensor]] = []

    class Full(torch.nn.Module):
        """Its first two backwards find no room."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(8))

        def forward(self, batch: object) -> MethodOutput:
            loss = self.layers[0](torch.ones(1, 2)).sum()
            loss.register_hook(self.refuse)
            losses.append(weakref.ref(loss))
            return MethodOutput(loss, 1)

        def refuse(self, grad: torch.Tensor) -> None:
            if len(losses) < 3:
                raise torch.OutOfMemoryError("no room")

    class Watching(Small):
        def restart(self) -> None:
            assert all(loss() is None for loss in losses)
            super().restart()

    model, meter = Full(), Watching(10**9)
    estimate = memory_plan.MemoryPlan(128, 0, 0, 1, 1, 10**9, "")
    batch = SimpleNamespace(input_ids=torch.zeros(1, 128))
    calibrate.calibrate_recompute(model, batch, estimate, meter, budget=10**9, later=0)
    assert (meter.tries, len(losses)) == (3, 3)


def test_what_a_trial_has_not_brought_is_counted_once():
    """LoRA: fp32 gradients and weights are there, two moments and a checkpoint's copies to come. Full bf16: its gradients
    are there in bf16; their fp32 form, moments and master come with the optimizer."""
    assert memory_plan.optimizer_bytes(recipe(), 100) == 100 * (8 + 12)
    full = replace(recipe(), adapter=Adapter(kind="none"))
    assert memory_plan.optimizer_bytes(full, 100) == 100 * (4 + 8 + 4 - 2)
