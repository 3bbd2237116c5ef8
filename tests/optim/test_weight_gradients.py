"""Weight gradients added up in fp32 by their product, beside exact sums and the ordinary path."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recipes import make_run
from tunesmith.config.schema import Train
from tunesmith.metrics.record import read_records
from tunesmith.model.arch.spec import read_spec
from tunesmith.optim.optimizer import Optimizer
from tunesmith.optim.weight_gradients import accumulate_in_fp32, fp32_gradients
from tunesmith.parallel.mesh_shape import ONE, MeshShape
from tunesmith.planning.memory import MemoryEstimator
from tunesmith.planning.run_plan import Machine
from tunesmith.quant.linear_layers import set_bypassed
from tunesmith.start.run import train

pytestmark = pytest.mark.slow


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48, bias=False), nn.Linear(48, 32)
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x * self.scale)))


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).bfloat16()


def backward(
    model: nn.Sequential,
    seed: int,
    call: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__,
) -> None:
    x = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(seed))
    x = x.bfloat16().requires_grad_()
    for block in model:
        x = call(block, x)
    x.float().square().sum().backward()


def test_the_sum_over_micro_batches_is_exact_and_the_next_step_starts_anew():
    model = blocks()
    seen: list[Tensor] = []
    layer = model[0].down
    layer.register_full_backward_hook(lambda _, __, d: seen.append(d[0].float().flatten(0, -2)))
    layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach().float().flatten(0, -2)))
    accumulate_in_fp32(model)
    assert len(list(fp32_gradients(model))) == 4
    optimizer = Optimizer(model.named_parameters(), Train(clip_norm=None))
    optimizer.use_fp32_gradients(fp32_gradients(model))
    for step in range(2):
        seen.clear()
        for micro in range(3):
            backward(model, 3 * step + micro)
        exact = sum(d.T @ x for x, d in zip(seen[::2], seen[1::2], strict=True))
        # Both are products of the same 16-bit numbers in fp32, added up in another order.
        torch.testing.assert_close(
            dict(fp32_gradients(model))["0.down.weight"].gradient, exact, rtol=1e-5, atol=1e-5
        )
        assert layer.weight.grad is None
        optimizer.start_step(1e-2, step)
        optimizer.step()


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_linear_layers_with_a_forward_of_their_own_are_left_alone():
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "own": Doubling(4, 4)}).bfloat16()
    both = nn.ModuleDict({"open": model, "bypassed": copy.deepcopy(model)})
    set_bypassed(both, ["bypassed.plain", "bypassed.own"])
    accumulate_in_fp32(both)
    names = [name for name, _ in fp32_gradients(both)]
    assert names == ["open.plain.weight", "bypassed.plain.weight"]


def test_compiled_and_recomputed_layers_add_to_the_same_gradient():
    eager = blocks()
    accumulate_in_fp32(eager)
    fast = copy.deepcopy(eager)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda m, x: checkpoint(m, x, use_reentrant=False), backend="aot_eager"
    )
    for micro in range(3):
        backward(eager, micro)
        backward(fast, micro, compiled)
    for (name, a), (_, b) in zip(fp32_gradients(eager), fp32_gradients(fast), strict=True):
        assert bool(b.filled)
        torch.testing.assert_close(b.gradient, a.gradient, rtol=1e-6, atol=1e-6, msg=name)


def losses(tiny: Path, folder: Path, name: str, steps: int, dtype: str = "bf16") -> list[float]:
    train_keys = {"schedule": "constant", "warmup": "0 steps", "micro_batch": "2 examples"}
    changes = {
        "adapter": {"kind": "none"},
        "model": {"dtype": dtype},
        "train": train_keys | {"duration": f"{steps} steps"},
        "output_dir": str(folder / name),
    }
    train(make_run(tiny, folder, held=False, **changes), quiet=True)
    return [record.loss for record in read_records(folder / name / "metrics.jsonl")]


def test_a_run_s_curve_is_that_of_the_ordinary_path_and_it_resumes_bit_for_bit(
    tiny, tmp_path, monkeypatch
):
    exact = losses(tiny, tmp_path, "fp32", 6, dtype="fp32")
    plain = losses(tiny, tmp_path, "plain", 6)
    # Take the path on a CPU too, where `add_weight_gradient` multiplies in fp32.
    monkeypatch.setattr(MemoryEstimator, "fp32_gradients", True)
    fast = losses(tiny, tmp_path, "fast", 6)
    assert fast != plain, "the path was not taken"
    assert plain[-1] < plain[0] - 0.03
    for a, b, c in zip(exact, plain, fast, strict=True):
        # The forward in bf16 moves both by the same: some thousandths.
        assert abs(c - a) / a < 0.01
        assert abs(c - b) / b < 2e-3
    losses(tiny, tmp_path, "cut", 3)
    assert losses(tiny, tmp_path, "cut", 6) == fast
    env = json.loads((tmp_path / "cut/env.json").read_text())
    assert "fp32" in env["choices"]["weight gradients"]["taken"]


@pytest.mark.parametrize(
    ("taken", "device", "mesh", "changes"),
    [
        (True, "cuda:0", ONE, {}),
        (False, "cpu", ONE, {}),
        (False, "cuda:0", MeshShape(replicate=2), {}),
        (False, "cuda:0", ONE, {"adapter": {"kind": "lora"}}),
        (False, "cuda:0", ONE, {"model": {"dtype": "fp32"}}),
        (False, "cuda:0", ONE, {"train": {"master_weights": "stochastic"}}),
        (False, "cuda:0", ONE, {"train": {"optimizer_in_backward": True, "clip_norm": None}}),
    ],
)
def test_it_is_taken_where_it_works(taken, device, mesh, changes, tiny: Path, tmp_path: Path):
    full = {"adapter": {"kind": "none"}, "model": {"dtype": "bf16"}}
    run = make_run(tiny, tmp_path, held=False, **full | changes)
    spec = read_spec(json.loads((tiny / "config.json").read_text()), where="test")
    machine = Machine(device, 80 << 30, ("varlen", "assumed"), (False, "assumed"))
    assert MemoryEstimator(run, spec, machine, spec.parameters, mesh).fp32_gradients is taken
