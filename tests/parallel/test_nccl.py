"""Two ranks on one GPU over NCCL: what they train, and that a rank that stands still is named.

NCCL refuses two ranks on one GPU of a host. With its own host id each is on another host for it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from test_data_parallel import COPY, FULL, SHARD, Numbers, numbers
from test_hangs import LORA, assert_a_hang_is_named

from devices import gpu
from ranks import run_each
from recipes import merge, recipe

pytestmark = pytest.mark.slow

GLOO = pytest.param("gloo", marks=pytest.mark.nightly)
NCCL = pytest.param("nccl", marks=gpu)
EAGER = {"train": {"compile": "off"}}
# FSDP2; sums of gradients beside the backward; the sum of an adapter's gradients after it
CASES: list[dict[str, Any]] = [
    merge(FULL, {"parallel": SHARD}),
    merge(FULL, {"parallel": COPY}),
    {"parallel": COPY},
    # Sampling with gathered weights, and the reference forward. Each rank has two micro batches.
    {
        "method": {
            "name": "grpo", "reward": "r.py:letters", "group": 4, "answer_tokens": 8, "beta": 0.1,
        },
        "train": {"global_batch": "4 examples"},
        "parallel": SHARD,
    },
]  # fmt: skip
REWARD = "def letters(answer, row):\n    return sum(c in 'abcde' for c in answer) / 99\n"


def share_one_gpu(rank: int | str) -> dict[str, str]:
    """The environment of a rank that shares the first GPU of this machine with another rank."""
    return {
        "CUDA_VISIBLE_DEVICES": "0",
        "NCCL_HOSTID": f"rank-{rank}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
    }


def numbers_on(backend: str, model: Path, folder: Path, case: dict[str, Any]) -> Numbers:
    """Train on this rank, over this backend."""
    import torch.distributed as dist

    if backend == "nccl":
        os.environ.update(share_one_gpu(os.environ["RANK"]))
    init, backends = dist.init_process_group, []

    def noted(name: str, **options: Any) -> None:
        init(name, **options)
        backends.append(name)

    dist.init_process_group = noted
    try:
        found = numbers(model, folder, case)
    finally:
        dist.init_process_group = init
    assert len(backends) == 1
    assert backend in backends[0]
    return found


@pytest.mark.parametrize("backend", [GLOO, NCCL])
def test_two_ranks_train_as_one_process(backend: str, tiny: Path, tmp_path: Path) -> None:
    cases = [
        {**merge(case, EAGER), "output_dir": str(tmp_path / f"run {number}")}
        for number, case in enumerate(CASES)
    ]
    (tmp_path / "r.py").write_text(REWARD)
    recipe(tiny, tmp_path)  # writes the rows, which each rank would write otherwise
    arguments = [(backend, tiny, tmp_path, case) for case in cases]
    ranks = run_each(2, numbers_on, arguments, spawns=backend == "nccl")
    alone = [
        numbers(tiny, tmp_path, {**case, "parallel": {}, "output_dir": str(tmp_path / f"{number}")})
        for number, case in enumerate(cases)
    ]
    for found in ranks:
        for case, many, expected in zip(cases, found, alone, strict=True):
            # fp32, in another order.
            for got, wanted in zip(many, expected, strict=True):
                assert got == pytest.approx(wanted, rel=1e-4), case


@pytest.mark.parametrize("backend", [GLOO, NCCL])
def test_a_rank_that_stands_still_is_named(backend: str, tiny: Path, tmp_path: Path) -> None:
    """The other rank waits in a collective of NCCL, which its host does not see."""
    environments = [share_one_gpu(rank) if backend == "nccl" else {} for rank in range(2)]
    assert_a_hang_is_named(
        "training", merge(LORA, EAGER), tiny, tmp_path, environments, spawns=backend == "nccl"
    )
