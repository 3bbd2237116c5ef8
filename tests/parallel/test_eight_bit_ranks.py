"""A base in 8 bits, and moments in 8 bits, where all ranks must decide alike."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from errors import check_shown, refuses
from ranks import free_port, gathered, run_ranks
from recipes import make_run
from tunesmith.config.schema import Train
from tunesmith.distributed.ranks import join_ranks
from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.formats import fp8
from tunesmith.formats.linear import FrozenLinear
from tunesmith.optim import adamw
from tunesmith.optim.adamw import check_blocks
from tunesmith.optim.optimizer import Optimizer
from tunesmith.parallel.shard import sharded_modules
from tunesmith.planning import compare_eight_bit
from tunesmith.stages.request import Request
from tunesmith.training import session as session_module
from tunesmith.training.build import build
from tunesmith.training.run import train

pytestmark = pytest.mark.slow

TOLERATED = compare_eight_bit.MAX_LOSS_CHANGE


def start(
    model: Path, folder: Path, quantize: str, mesh: dict[str, int], fault: str, port: int
) -> dict[str, Any]:
    """One start of 2 steps on this rank. fault: `rank 1` quantizes NaN there, `all` tolerates no
    change.
    """
    os.environ["MASTER_PORT"] = str(port)
    name = f"{quantize} {mesh} {fault}"
    run = make_run(
        model, folder, held=False, model={"dtype": "bf16", "quantize": quantize}, parallel=mesh,
        train={"duration": "2 steps", "micro_batch": "128 tokens"}, output_dir=str(folder / name),
    )  # fmt: skip
    rounded = fp8.round_to_e4m3

    def wrongly(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return rounded(x * math.nan, scale)

    is_wrong_here = fault == "rank 1" and os.environ["RANK"] == "1"
    with (
        mock.patch.object(session_module, "LOSS_PROBE_TOKENS", 256),
        mock.patch.object(fp8, "round_to_e4m3", wrongly if is_wrong_here else rounded),
        mock.patch.object(
            compare_eight_bit, "MAX_LOSS_CHANGE", -1.0 if fault == "all" else TOLERATED
        ),
    ):
        try:
            result = train(run, quiet=True)
        except TunesmithError as error:
            return {"exit_code": error.exit_code, "numbers": []}
    chosen = json.loads((folder / name / "env.json").read_text())["choices"]["base"]
    return {
        "numbers": [(r.loss, r.grad_norm) for r in result.records],
        "base": chosen,
    }


def starts(model: Path, folder: Path, cases: list[Any]) -> list[dict[str, Any]]:
    return [start(model, folder, *case, port) for case, port in cases]


COPIES, SHARDS = {"replicate": 2}, {"shard": 2}


def start_all(cases: list[Any], model: Path, folder: Path) -> list[Any]:
    """`start` of each case, by rank."""
    with_ports = [(case, free_port()) for case in cases]
    return run_ranks(2, starts, model, folder, with_ports)


def test_all_ranks_refuse_a_base_where_the_loss_of_one_moved_too_far(tiny, tmp_path):
    """Copies would train on, each with another base; shards would wait for each other in different
    collectives.
    """
    for [found] in start_all([("fp8", SHARDS, "rank 1")], tiny, tmp_path):
        assert found["exit_code"] == 2


@pytest.mark.nightly
def test_the_same_codes_give_the_same_bits_sharded_or_not(tiny, tmp_path):
    cases = [
        ("none", SHARDS, ""), ("fp8", COPIES, ""), ("fp8", SHARDS, ""), ("fp8", COPIES, "rank 1"),
        ("fp8", SHARDS, "all"),
    ]  # fmt: skip
    for plain, copy, shard, *refused in start_all(cases, tiny, tmp_path):
        assert copy["base"]["taken"].startswith("fp8")
        assert "14 layers" in copy["base"]["why"]
        assert copy["numbers"] == shard["numbers"] != plain["numbers"]
        assert [found["exit_code"] for found in refused] == [2, 2]


def codes_of_a_rank(model: Path, folder: Path) -> list[tuple[str, int, int]]:
    """Of each layer in 8 bits on shards: what this rank holds, and what its forward is given, in
    bytes a weight.
    """
    changes = {"model": {"dtype": "bf16", "quantize": "fp8"}, "parallel": {"shard": 2}}
    run = make_run(model, folder, held=False, **changes)
    Path(run.output_dir).mkdir(parents=True, exist_ok=True)
    with mock.patch.object(session_module, "LOSS_PROBE_TOKENS", 256), join_ranks() as ranks:
        session = build(Request(run), ranks)
        sizes: list[tuple[str, int, int]] = []

        layers = list(compare_eight_bit.eight_bit_layers(session.model))
        for module in sharded_modules(session.model):
            module.reshard()
        held = {m: local_part(m.weight).untyped_storage().nbytes() for m in layers}
        frozen_weight = FrozenLinear.frozen_weight
        whole = {m: m.in_features * m.out_features for m in layers}
        assert sum(held.values()) * 2 == sum(whole.values())

        def noted(layer: FrozenLinear) -> Any:
            weight = frozen_weight(layer)
            codes = weight.tensors[0]
            sizes.append((str(layer.weight.dtype), held[layer], codes.numel() * codes.itemsize))
            assert codes.numel() == whole[layer]
            return weight

        with mock.patch.object(FrozenLinear, "frozen_weight", noted):
            session.model(session.loader(0).batch(0).micro[0])
        return sizes


@pytest.mark.nightly
def test_shards_of_an_fp8_base_are_held_and_gathered_in_a_byte_a_weight(tiny, tmp_path):
    for sizes in run_ranks(2, codes_of_a_rank, tiny, tmp_path):
        assert len(sizes) == 14
        for dtype, shard, whole in sizes:
            assert dtype == "torch.uint8"
            assert whole == 2 * shard


def updated(dtype: torch.dtype, shape: tuple[int, int], dim: int) -> bool:
    """Whether three updates of this rank's part of a matrix, cut along `dim`, have the bits of the
    whole one's.
    """
    recipe = Train(optimizer="adamw-8bit", clip_norm=None, weight_decay=0.1, compile="off")
    recipe = replace(recipe, master_weights="stochastic" if dtype is torch.bfloat16 else "fp32")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(1)
    whole = nn.Parameter(torch.randn(shape).to(dtype))
    part = nn.Parameter(
        distribute_tensor(whole.detach().clone(), mesh, [Shard(dim)], src_data_rank=None)
    )
    check_blocks([("w", part)])
    ragged = nn.Parameter(
        distribute_tensor(torch.zeros(300, 64), mesh, [Shard(0)], src_data_rank=None)
    )
    with refuses(RecipeError, where="train.optimizer", names=["ragged", 64, 256]):
        check_blocks([("ragged", ragged)])
    optimizers = [Optimizer([("w", weight)], recipe) for weight in (whole, part)]
    place, key = adamw.noise_place("w", part), torch.tensor([1, 2])
    noise = adamw.noise_at(place, key, part.to_local().shape)  # of this rank's part alone
    assert torch.equal(
        noise, adamw.noise_at(adamw.noise_place("w", whole), key, shape)[local_slices(part)]
    )
    for step in range(3):
        grad = torch.randn(shape).to(dtype)
        whole.grad, part.grad = (
            grad,
            distribute_tensor(grad, mesh, [Shard(dim)], src_data_rank=None),
        )
        for optimizer in optimizers:
            optimizer.start_step(1e-2, step)
            optimizer.step()
    moved = [optimizer.state_dict() for optimizer in optimizers]
    assert {name for name, value in moved[1].items() if isinstance(value, DTensor)} == moved[
        0
    ].keys() - {"w.step"}
    pairs = [
        (whole.detach(), part.detach()),
        *((moved[0][name], moved[1][name]) for name in moved[0]),
    ]
    return all(torch.equal(one, gathered(cut)) for one, cut in pairs)


# 11 rows for each of three ranks; one row each for two of them; 256 columns each
PARTS = [((33, 512), 0), ((2, 2048), 0), ((16, 768), 1)]


def updated_parts() -> dict[tuple[torch.dtype, tuple[int, int]], bool]:
    """`updated` of all parts in fp32, and in bf16, which is rounded stochastically."""
    with join_ranks():
        return {
            (dtype, shape): updated(dtype, shape, dim)
            for dtype in (torch.float32, torch.bfloat16)
            for shape, dim in PARTS
        }


def test_parts_of_whole_blocks_are_updated_as_the_whole_matrix():
    pytest.importorskip("bitsandbytes")
    for found in run_ranks(3, updated_parts):
        assert len(found) == 6
        assert [part for part, equal in found.items() if not equal] == []


def refused(model: Path, folder: Path, changes: dict[str, Any]) -> tuple[int, str]:
    try:
        train(make_run(model, folder, held=False, **changes), quiet=True)
    except TunesmithError as error:
        return error.exit_code, error.text()
    return 0, ""


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"kind": "none"}, "parallel": {"shard": 2}},
        pytest.param(
            {"adapter": {"rank": 64}, "parallel": {"tensor": 2}}, marks=pytest.mark.nightly
        ),
    ],
    ids=["full", "lora"],
)
def test_moments_whose_blocks_would_be_cut_are_refused_before_the_weights_are_read(
    changes, tiny, tmp_path
):
    pytest.importorskip("bitsandbytes")
    run = {**changes, "train": {"optimizer": "adamw-8bit"}}
    (code, text), (other, _) = run_ranks(2, refused, tiny, tmp_path, run)
    assert code == other == 2
    check_shown(text, where="train.optimizer", fix=["train.optimizer=adamw"])
