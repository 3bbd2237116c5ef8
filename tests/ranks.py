"""Functions run by several ranks on this machine, with gloo, forked from a warm process."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import multiprocessing
import os
import random
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.forkserver import ensure_running as start_server
from pathlib import Path
from typing import Any

import pytest

from tunesmith.model.known.architectures import ARCHITECTURES

FORKS = os.environ.get("TUNESMITH_TESTS_FORK") != "0"
# What a process has loaded when it is forked, so that none loads it again
PRELOADED = [
    "torch",
    "transformers",
    "torch.distributed.fsdp",
    "tunesmith.start.run",
    "tunesmith.cli.main",
    *(
        f"transformers.models.{name}.modeling_{name}"
        for name, family in ARCHITECTURES.items()
        if family.all_fused
    ),
    "packaging.requirements",
    "pydantic.dataclasses",
    "numpy.ma",
    "peft",
    "torch.utils.tensorboard",
    "preloaded",
]
LIMIT = 300  # seconds that all ranks together may take


def free_port() -> int:
    """A port below those that the kernel gives to connections: none takes it before its use."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def environment_of(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets for a rank, with one thread each."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {name: str(value) for name, value in (ranks | address).items()}


def forkserver(*, spawns: bool = False) -> Any:
    """The context of processes that are forked with torch and Transformers loaded, or start as
    interpreters of their own.
    """
    if spawns or not FORKS:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # The server of Python 3.11 searches PYTHONPATH alone for what it loads
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        start_server()
    return context


def run_ranks(
    world: int, function: Callable[..., Any], *arguments: Any, spawns: bool = False
) -> list[Any]:
    """What `function(*arguments)` returns on each of `world` ranks, in their order.

    A rank imports `function` from its module. `spawns` is for ranks that use a GPU: torch refuses
    CUDA in a process that is forked from one that has counted the GPUs, as `devices` does.
    """
    context = forkserver(spawns=spawns)
    port, results = free_port(), context.SimpleQueue()
    ranks = []
    for rank in range(world):
        env = environment_of(rank, world, port)
        ranks.append(context.Process(target=_rank, args=(env, rank, results, function, arguments)))
        ranks[-1].start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + LIMIT
    try:
        while len(found) < world:
            alive = any(process.is_alive() for process in ranks)
            if results.empty():
                missing = sorted(set(range(world)) - set(found))
                assert alive, f"ranks {missing} ended without a result{_killed(ranks)}"
                assert time.monotonic() < deadline, f"the ranks took longer than {LIMIT} s"
                time.sleep(0.02)
                continue
            rank, fault, value = results.get()
            assert not fault, f"rank {rank} failed:\n{fault}{_killed(ranks)}"
            found[rank] = value
    finally:
        for process in ranks:
            process.join(0 if len(found) < world else 20)
            process.kill()
    return [found[rank] for rank in range(world)]


def run_each(
    world: int, function: Callable[..., Any], cases: Sequence[tuple[Any, ...]], **options: Any
) -> list[list[Any]]:
    """`run_ranks` for each of these tuples of arguments, one after the other in the same processes:
    of each rank the results of all.
    """
    return run_ranks(world, _each, function, cases, [free_port() for _ in cases], **options)


def _each(function: Callable[..., Any], cases: list[tuple[Any, ...]], ports: list[int]) -> Any:
    found = []
    for arguments, port in zip(cases, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        found.append(function(*arguments))
    return found


def be_on_node(layout: str) -> str:
    """Make this process a rank of the node that `layout` has for it: `aabb` is two nodes of two
    ranks each.
    """
    rank = int(os.environ["RANK"])
    node = layout[rank]
    local = {"LOCAL_RANK": layout[:rank].count(node), "LOCAL_WORLD_SIZE": layout.count(node)}
    os.environ.update({name: str(value) for name, value in local.items()})
    return node


def world_of(mesh: dict[str, int]) -> int:
    """Ranks of the keys of `parallel`."""
    return math.prod(mesh.values())


def gathered(tensor: Any) -> Any:
    """A DTensor gathered, on every rank: a collective call. Any other tensor as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _killed(ranks: list[Any]) -> str:
    """A line for each process that a signal ended."""
    signals = {rank: -(process.exitcode or 0) for rank, process in enumerate(ranks)}
    return "".join(
        f"\nrank {rank} was ended by {signal.Signals(number).name}"
        for rank, number in signals.items()
        if number > 0
    )


def _rank(
    env: dict[str, str], rank: int, results: Any, function: Callable[..., Any], arguments: Any
) -> None:
    faulthandler.enable()  # a crash says where it was
    os.environ.update(env)
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank, "", function(*arguments)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
        raise SystemExit(1) from None
