"""A base in 8 bits, and moments in 8 bits, where all ranks must decide alike."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from errors import refuses
from ranks import gathered, run_ranks
from recipes import make_run
from tunesmith.config.schema import Train
from tunesmith.distributed.ranks import join_ranks
from tunesmith.distributed.torch_private import local_slices
from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.formats import fp8
from tunesmith.optim import adamw
from tunesmith.optim.adamw import check_blocks
from tunesmith.optim.optimizer import Optimizer
from tunesmith.start import session as session_module
from tunesmith.start.run import train

pytestmark = pytest.mark.slow


def exit_code_of_a_start(model: Path, folder: Path) -> int:
    """The exit code of a start in fp8 whose rank 1 quantizes NaN."""
    rounded, is_wrong = fp8.round_to_e4m3, os.environ["RANK"] == "1"
    model_keys = {"dtype": "bf16", "quantize": "fp8"}
    train_keys = {"duration": "2 steps", "micro_batch": "128 tokens"}
    changes = {"model": model_keys, "train": train_keys, "parallel": {"shard": 2}}
    with (
        mock.patch.object(session_module, "LOSS_PROBE_TOKENS", 256),
        mock.patch.object(
            fp8, "round_to_e4m3", lambda x, scale: rounded(x * math.nan if is_wrong else x, scale)
        ),
    ):
        try:
            train(make_run(model, folder, held=False, **changes), quiet=True)
        except TunesmithError as error:
            return error.exit_code
    return 0


def test_all_ranks_refuse_a_base_where_the_loss_of_one_moved_too_far(tiny, tmp_path):
    """Shards would wait for each other in different collectives."""
    assert run_ranks(2, exit_code_of_a_start, tiny, tmp_path) == [2, 2]


def updated(dtype: torch.dtype, shape: tuple[int, int], dim: int) -> bool:
    """Whether updates of this rank's part of a matrix, cut along `dim`, are those of the whole."""
    recipe = Train(optimizer="adamw-8bit", clip_norm=None, weight_decay=0.1, compile="off")
    recipe = replace(recipe, master_weights="stochastic" if dtype is torch.bfloat16 else "fp32")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(1)
    whole = nn.Parameter(torch.randn(shape).to(dtype))

    def cut(tensor: torch.Tensor, dim: int) -> DTensor:
        return distribute_tensor(tensor, mesh, [Shard(dim)], src_data_rank=None)

    part = nn.Parameter(cut(whole.detach().clone(), dim))
    check_blocks([("w", part)])
    ragged = nn.Parameter(cut(torch.zeros(300, 64), 0))
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
        whole.grad, part.grad = grad, cut(grad, dim)
        for optimizer in optimizers:
            optimizer.start_step(1e-2, step)
            optimizer.step()
    moved = [optimizer.state_dict() for optimizer in optimizers]
    sharded = {name for name, value in moved[1].items() if isinstance(value, DTensor)}
    assert sharded == moved[0].keys() - {"w.step"}
    pairs = [(whole.detach(), part.detach()), *((moved[0][n], moved[1][n]) for n in moved[0])]
    return all(torch.equal(one, gathered(other)) for one, other in pairs)


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
