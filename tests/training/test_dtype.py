"""What `model.dtype: auto` stands for on a machine, and that a run keeps it."""

from __future__ import annotations

import os

import pytest
import torch

from errors import lines_with, refuses
from logged import logged_lines
from ranks import run_ranks
from recipes import make_run
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Model, Train
from tunesmith.distributed.ranks import join_ranks
from tunesmith.errors import MachineError, RecipeError
from tunesmith.host.chips import CHIPS, Chip
from tunesmith.model.arch.shapes import SHAPES
from tunesmith.model.arch.spec import read_spec
from tunesmith.planning.resolve import resolve_dtype
from tunesmith.run_dir import RECIPE
from tunesmith.runtime.device import chip_of
from tunesmith.start import plan as plan_stage
from tunesmith.start.plan import common_chip
from tunesmith.start.run import train

SPEC = read_spec(SHAPES["llama3-8b"].config, where="test")  # 30 GiB in fp32
GPU = CHIPS["h100"]
T4 = CHIPS["t4"]  # 14 GiB
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
        (SLOW_CPU, {"quantize": "nf4"}, "bf16"),
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


@pytest.mark.slow
def test_a_run_keeps_the_dtype_that_it_began_with(tiny, tmp_path, monkeypatch):
    """It begins without units for bf16 and goes on where there are some; one that began in bf16 goes
    on without: slow on a CPU, refused on an old GPU.
    """

    def start(steps: int, chip: Chip, dtype: str = "auto", out: str = "run") -> None:
        changes = {"train": {"duration": f"{steps} steps"}, "output_dir": str(tmp_path / out)}
        monkeypatch.setattr(plan_stage, "chip_of", lambda device, ranks: chip)
        train(make_run(tiny, tmp_path, held=False, model={"dtype": dtype}, **changes))

    for steps, chip in ((2, SLOW_CPU), (4, FAST_CPU)):
        start(steps, chip)
        assert load_recipe(tmp_path / "run" / RECIPE).model.dtype == "fp32"
    with refuses(RecipeError, where='model.dtype: "fp32" -> "bf16"'):
        start(6, FAST_CPU, "bf16")
    start(2, FAST_CPU, out="fast")
    with logged_lines() as lines:
        start(3, SLOW_CPU, out="fast")
    assert lines_with("\n".join(lines), "warning", "bf16", "model.dtype=fp32")
    with refuses(MachineError, where="model.dtype", names=["T4"]):
        start(4, T4, out="fast")
