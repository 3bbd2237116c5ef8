"""Two ranks on one GPU over NCCL: what they train, and that a rank that stands still is named.

NCCL refuses two ranks on one GPU of a host. With another host id each, the ranks are on two hosts
for NCCL, and send through the loopback interface. The same tests run on the CPU with gloo.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from test_data_parallel import COPY, FULL, SHARD, Numbers, numbers, numbers_of_all
from test_hangs import LORA, assert_a_hang_is_named

from devices import gpu
from ranks import free_port, run_ranks
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
]


def share_one_gpu(rank: int | str) -> dict[str, str]:
    """The environment of a rank that shares the first GPU of this machine with another rank."""
    return {
        "CUDA_VISIBLE_DEVICES": "0",
        "NCCL_HOSTID": f"rank-{rank}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
    }


def numbers_on(
    backend: str, model: Path, folder: Path, cases: list[dict[str, Any]], ports: list[int]
) -> tuple[str, list[Numbers]]:
    """Train the cases on this rank; returns the backend of its tensors on the GPU, or of all."""
    import torch.distributed as dist

    if backend == "nccl":
        os.environ.update(share_one_gpu(os.environ["RANK"]))
    backends = []
    init = dist.init_process_group

    def noted(name: str, **options: Any) -> None:
        init(name, **options)
        backends.append(name)

    dist.init_process_group = noted
    found = numbers_of_all(model, folder, cases, ports)
    assert len(backends) == len(cases)
    return backends[0], found


@pytest.mark.parametrize("backend", [GLOO, NCCL])
def test_two_ranks_train_as_one_process(backend: str, tiny: Path, tmp_path: Path) -> None:
    cases = [
        {**merge(case, EAGER), "output_dir": str(tmp_path / f"run {number}")}
        for number, case in enumerate(CASES)
    ]
    recipe(tiny, tmp_path)  # writes the rows, which each rank would write otherwise
    ports = [free_port() for _ in cases]
    arguments = (numbers_on, backend, tiny, tmp_path, cases, ports)
    ranks = run_ranks(2, *arguments, spawns=backend == "nccl")
    alone = [
        numbers(tiny, tmp_path, {**case, "parallel": {}, "output_dir": str(tmp_path / f"{number}")})
        for number, case in enumerate(cases)
    ]
    for name, found in ranks:
        assert backend in name
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
