"""The ranks of one run: which of them this process is, and what they agree on.

Whoever starts the ranks (torchrun does) sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
What one rank decides alone, by its clock, a signal or an error, leaves the others waiting for it in a collective: every
such decision is shared first. The functions here take any Python value and are for what comes before and after a step.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from tunesmith.errors import OtherRankError, TunesmithError, UsageError

# A collective may wait for a rank that compiles, loads or saves; one that is gone is found by its heartbeat.
PATIENCE = timedelta(hours=24)
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of a run. The defaults are a run of one process, where nothing has to be shared.

    `hosts` names the host of each rank.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    hosts: tuple[str, ...] = ("",)
    group: Any = None  # the process group that they share values over; None is the default one

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which speaks to the user and writes the run directory."""
        return self.rank == 0

    @property
    def leads_node(self) -> bool:
        """Whether this rank does what is done once a node."""
        return self.local_rank == 0

    def name(self, rank: int) -> str:
        """A rank in words: `rank 3 on spark-b`."""
        return f"rank {rank} on {self.hosts[rank]}"

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        return self.gather(value)[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks leave the block, or none: an error of one ends the block on all, after all have come to its end.

        The block must hold no collective: a rank that has failed would not take part in it. The lowest rank that failed
        raises its own error and tells it; the others raise `OtherRankError`, which says nothing and has the exit code.
        """
        if self.world == 1:
            yield
            return
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:  # a signal's KeyboardInterrupt too
            error = caught
        known = error if isinstance(error, TunesmithError) else None
        code = 0 if error is None else known.exit_code if known else 1
        found = [(rank, *said) for rank, said in enumerate(self.gather((code, str(error)))) if said[0]]
        if not found:
            return
        rank, code, text = found[0]
        if error is not None and rank == self.rank:
            raise error
        raise OtherRankError(f"{self.name(rank)} failed: {text}", exit_code=code) from error

    @contextmanager
    def node_leader_first(self) -> Iterator[None]:
        """Let one rank of each node run the block before its others: what it leaves in a cache is theirs.

        As `together`, and the block must hold no collective.
        """
        if self.world == 1:
            yield
            return
        if not self.leads_node:
            self.gather(None)
        try:
            yield
        finally:
            if self.leads_node:
                self.gather(None)


ONE_PROCESS = Ranks()


def started_as() -> dict[str, int] | None:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as torchrun sets them; None where this process is alone."""
    found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    if not all(value.isdecimal() for value in found.values()) or int(found["WORLD_SIZE"]) < 2:
        return None
    return {name: int(value) for name, value in found.items()}


def is_launched() -> bool:
    """Whether torchrun, or what stands in for it, started this process, and starts it again on an exit code other than 0."""
    return started_as() is not None or "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def told_once_a_node() -> Iterator[None]:
    """Before the ranks join, each finds the same faults of the command and recipe: one of a node tells them."""
    try:
        yield
    except UsageError as error:
        if (started_as() or {"LOCAL_RANK": 0})["LOCAL_RANK"]:
            raise OtherRankError(error.what, exit_code=error.exit_code) from error
        raise


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the other ranks for the time of the block, if this process was started as one of several."""
    env = started_as()
    if env is None:
        yield Ranks()
        return
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(env["LOCAL_RANK"])
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        hosts: list[Any] = [None] * env["WORLD_SIZE"]
        dist.all_gather_object(hosts, socket.gethostname())
        ranks = Ranks(env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"], tuple(hosts))
        yield ranks
    finally:
        dist.destroy_process_group()
