"""What `model.dtype: auto` stands for on a machine, and that a run keeps it."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from errors import holds, lines_with, refuses
from logged import logged_lines
from ranks import run_ranks
from recipes import make_run
from tunesmith.checkpoint.resume import Start
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Model, Run, Train
from tunesmith.distributed.ranks import join_ranks
from tunesmith.errors import MachineError, RecipeError
from tunesmith.host.chips import CHIPS, Chip
from tunesmith.model.shapes import SHAPES
from tunesmith.model.spec import read_spec
from tunesmith.planning.resolve import resolve_dtype
from tunesmith.presentation.start import machine_lines
from tunesmith.run_dir import RECIPE
from tunesmith.runtime.device import chip_of
from tunesmith.stages import plan as plan_stage
from tunesmith.stages.plan import check_machine, common_chip
from tunesmith.training.run import train

SPEC = read_spec(SHAPES["llama3-8b"].config, where="test")  # 30 GiB in fp32
GPU = CHIPS["h100"]
T4 = CHIPS["t4"]  # 14 GiB
LARGE_T4 = Chip("eight times a T4", 8 * T4.gib, bf16=False)
FAST_CPU = Chip("cpu", 64.0)
SLOW_CPU = Chip("cpu", 64.0, bf16=False)
SMALL_CPU = Chip("cpu", 32.0, bf16=False)


@pytest.mark.parametrize(
    ("chip", "keys", "dtype"),
    [
        (GPU, {}, "bf16"),
        (FAST_CPU, {}, "bf16"),
        (SLOW_CPU, {}, "fp32"),
        (SMALL_CPU, {}, "bf16"),  # no room for more
        (T4, {}, "fp16"),  # as above; it has units for fp16
        (LARGE_T4, {}, "fp32"),
        (SLOW_CPU, {"quantize": "nf4"}, "bf16"),
        (SLOW_CPU, {"quantize": "as-shipped"}, "bf16"),
        (T4, {"quantize": "nf4"}, "fp16"),
        (SLOW_CPU, {"master_weights": "stochastic"}, "bf16"),  # what it rounds are bf16 weights
        (T4, {"optimizer_in_backward": True}, "fp32"),  # fp16 is excluded with it
    ],
)
def test_bf16_where_there_are_units_for_it_else_fp32_where_it_fits(chip, keys, dtype):
    model = Model(name="m", quantize=keys.pop("quantize", "auto"))
    chosen, reason = resolve_dtype(model, Train(**keys), chip, SPEC)
    assert chosen == dtype
    assert reason


@pytest.mark.parametrize(
    ("model", "rest"), [({"quantize": "fp8"}, {}), ({}, {"master_weights": "stochastic"})]
)
def test_what_needs_bf16_is_refused_on_a_gpu_without_it(model, rest):
    with refuses(MachineError, where="model.dtype", names=["T4"]):
        resolve_dtype(Model(name="m", **model), Train(**rest), T4, SPEC)


def chip_on_ranks() -> tuple[Chip, Chip]:
    """What this rank has, and what all of them choose for; only rank 1 has no units."""
    with join_ranks() as ranks:
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2" if ranks.rank == 1 else "DEFAULT"
        device = torch.device("cpu")
        return chip_of(device), common_chip(device, ranks)


@pytest.mark.slow
def test_ranks_on_unlike_machines_choose_alike() -> None:
    (_, first), (own, second) = run_ranks(2, chip_on_ranks)
    assert first == second
    assert not own.bf16
    assert not first.bf16


@pytest.mark.parametrize(
    ("chip", "dtype", "is_warned"),
    [(SLOW_CPU, "bf16", True), (SLOW_CPU, "fp32", False), (FAST_CPU, "bf16", False)],
)
def test_only_emulated_products_are_warned_of(chip, dtype, is_warned, tiny, tmp_path):
    run = make_run(tiny, tmp_path, model={"dtype": dtype})
    check_machine(run, torch.device("cpu"), chip)
    facts = SimpleNamespace(
        run=run, device=torch.device("cpu"), chip=chip, dtype=dtype, dtype_reason="",
        tokens=SimpleNamespace(start=Start()),
    )  # fmt: skip
    lines = list(machine_lines(facts))  # type: ignore[arg-type]
    assert [line for line in lines if holds(line, "bf16", "model.dtype=fp32")] == lines
    assert bool(lines) == is_warned


@pytest.mark.slow
def test_a_run_keeps_the_dtype_that_it_began_with(tiny, tmp_path, monkeypatch):
    """It begins on a machine without units for bf16, and goes on where there are some."""

    def start(steps: int, dtype: str = "auto", **checkpoint: Any) -> Run:
        changes = {"train": {"duration": f"{steps} steps"}, "checkpoint": {"every": "2 steps"}}
        changes["checkpoint"] |= checkpoint
        return make_run(tiny, tmp_path, held=False, model={"dtype": dtype}, **changes)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with logged_lines() as lines:
        train(start(2))
    assert sum(holds(line, "model.dtype", "fp32") for line in lines) == 1
    config = tmp_path / "run" / RECIPE
    assert load_recipe(config).model.dtype == "fp32"
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(plan_stage, "chip_of", lambda device, ranks: FAST_CPU)
    with logged_lines() as lines:
        assert train(start(4)).steps == 4
    assert sum(holds(line, "model.dtype", "fp32") for line in lines) == 1
    assert load_recipe(config).model.dtype == "fp32"
    with refuses(RecipeError, where='model.dtype: "fp32" -> "bf16"'):
        train(start(6, "bf16"))


@pytest.mark.slow
def test_a_dtype_that_was_chosen_elsewhere_is_checked_here(tiny, tmp_path, monkeypatch):
    """A run that began in bf16 by `auto` goes on without units for it: slow on a CPU, refused on an
    old GPU."""

    def start(steps: int) -> Run:
        changes = {"train": {"duration": f"{steps} steps", "warmup": "1 steps"}}
        return make_run(tiny, tmp_path, held=False, model={"dtype": "auto"}, **changes)

    monkeypatch.setattr(plan_stage, "chip_of", lambda device, ranks: FAST_CPU)
    train(start(1), quiet=True)
    monkeypatch.setattr(plan_stage, "chip_of", lambda device, ranks: SLOW_CPU)
    with logged_lines() as lines:
        train(start(2))
    assert lines_with("\n".join(lines), "warning", "bf16", "model.dtype=fp32")
    monkeypatch.setattr(plan_stage, "chip_of", lambda device, ranks: T4)
    with refuses(MachineError, where="model.dtype", names=["T4"]):
        train(start(3), quiet=True)
