"""The ranks of one run: which of them this process is, and what they agree on.

Whoever starts the ranks (torchrun does) sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
What one rank decides alone, by its clock, a signal or an error, leaves the others waiting for it in a collective: every
such decision is shared first. The functions here take any Python value and are for what comes before and after a step.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

from tunesmith.distributed.heartbeat import Heartbeat, refuses_connections
from tunesmith.errors import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_STOPPED,
    MachineError,
    OtherRankError,
    TunesmithError,
    UsageError,
    first_line,
)

if TYPE_CHECKING:
    from torch.distributed import Store

# A collective may wait for a rank that compiles, loads or saves; one that is gone is found by its heartbeat.
PATIENCE = timedelta(hours=24)
HEARTBEAT_NAME = (
    "heartbeat"  # a key of the launcher's store: the prefix of the keys of these ranks' heartbeats
)
SECONDS = "TUNESMITH_HEARTBEAT_SECONDS"  # of the environment: for a slow network, or a test
JOIN = 600.0  # seconds that the ranks have to find each other, as long as torchrun gives its nodes
# NCCL's watchdog would end a process by SIGABRT, before a rank has told what happened, where a collective or kernel failed or
# it stood still for minutes. Its sign to dump stays in the launcher's store for the ranks that start again.
WATCHDOG = ("ASYNC_ERROR_HANDLING", "RETHROW_CUDA_ERRORS", "ENABLE_MONITORING", "DUMP_ON_TIMEOUT")
# Where torchrun and accelerate, srun, Open MPI, and other MPIs say how many ranks there are. SLURM_NTASKS does not tell:
# a batch script without srun has it too, and is one process.
RANKS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of a run. The defaults are a run of one process, where nothing has to be shared.

    `hosts` names the host of each rank; `heartbeat` watches over them. `dir_leaders` has for each rank the one that writes
    the run directory that it sees: rank 0, unless nodes share no disk (`checkpoint.nodes.find_dir_leaders`).
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    hosts: tuple[str, ...] = ("",)
    dir_leaders: tuple[int, ...] = (0,)
    heartbeat: Heartbeat = field(default_factory=Heartbeat, compare=False, repr=False)
    group: Any = None  # the process group that they share values over; None is the default one

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which speaks to the user and writes the run directory."""
        return self.rank == 0

    @property
    def leads_dir(self) -> bool:
        """Whether this rank writes the run directory that it sees."""
        return self.dir_leaders[self.rank] == self.rank

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

        It must hold no collective. The lowest rank that failed raises its own error and tells it; the others raise
        `OtherRankError`, which says nothing and has the exit code."""
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:  # a signal's KeyboardInterrupt too
            error = caught
        code = _exit_code_of(error)
        found = [
            (rank, *said) for rank, said in enumerate(self.gather((code, str(error)))) if said[0]
        ]
        if not found:
            return
        rank, code, text = found[0]
        if error is not None and rank == self.rank:
            self.heartbeat.agreed = error
            raise error
        raise OtherRankError(f"{self.name(rank)} failed: {text}", exit_code=code) from error

    @contextmanager
    def node_leader_first(self) -> Iterator[None]:
        """Let one rank of each node run the block, without a collective, before its others: they find what it has cached."""
        if self.local_rank:
            self.gather(None)
        try:
            yield
        finally:
            if not self.local_rank:
                self.gather(None)


def _exit_code_of(error: BaseException | None) -> int:
    if error is None:
        return EXIT_OK
    if isinstance(error, KeyboardInterrupt):  # a stop signal
        return EXIT_STOPPED
    return error.exit_code if isinstance(error, TunesmithError) else EXIT_FAILED


ONE_PROCESS = Ranks()


def started_as() -> dict[str, int] | None:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as torchrun sets them; None where this process is alone."""
    found = {
        name: os.environ.get(name, "")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
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
    from torch.distributed.rendezvous import rendezvous

    from tunesmith.distributed.torch_private import current_collective, find_nccl_error

    rank, world, local_rank, local_world = env.values()
    cuda, limit = torch.cuda.is_available(), timedelta(seconds=heartbeat_limit())
    if cuda:
        choose_gpu(local_rank, local_world)
        os.environ.update({f"TORCH_NCCL_{name}": "0" for name in WATCHDOG} | os.environ)
    try:
        store, _, _ = next(rendezvous("env://", rank, world, timeout=timedelta(seconds=JOIN)))
        group, hosts = meet(store, rank, world)
        own = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=limit,
        )
        own.set(HEARTBEAT_NAME, group)
    except (RuntimeError, ValueError) as error:  # torch's, of a network and of an environment
        raise _apart(
            "the store of the ranks cannot be used", rank, world, why=first_line(error)
        ) from error
    local = range(rank - local_rank, rank - local_rank + local_world)
    heartbeat = Heartbeat(rank, hosts, local, dist.PrefixStore(group, own))
    heartbeat.current_collective = current_collective
    heartbeat.store_is_closed = partial(refuses_connections, own.host, own.port)
    if is_launched():  # the launcher would start a rank of any other exit code again
        heartbeat.stopped_code = EXIT_OK
    try:
        with heartbeat:
            # Gloo waits for ever behind a wrong interface
            heartbeat.phase("joining the ranks", JOIN)
            backend, names = (
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                dist.PrefixStore(group, store),
            )
            dist.init_process_group(
                backend, store=names, rank=rank, world_size=world, timeout=PATIENCE
            )
            heartbeat.phase("start")
            if cuda:
                heartbeat.find_error, stream = find_nccl_error, torch.cuda.current_stream()
                heartbeat.gpu_is_busy = lambda: not stream.query()
            yield Ranks(rank, world, local_rank, local_world, tuple(hosts), (0,) * world, heartbeat)
    finally:
        # A group that a rank has left may wait for it
        if heartbeat.fault is None and dist.is_initialized():
            dist.destroy_process_group()


def choose_gpu(local_rank: int, local_world: int) -> None:
    """Take this rank's GPU of the node, or the only one that its process is shown; MachineError where there are too few."""
    import torch

    count, shown = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    # Slurm's --gpus-per-task shows each rank its own
    if count < local_world and not (count == 1 and shown):
        what, fix = (
            f"{local_world} ranks on a node with {count} GPUs",
            f"one rank a GPU: --nproc-per-node {count}",
        )
        raise MachineError(what, where=f"CUDA_VISIBLE_DEVICES={shown or ''}", fix=fix)
    torch.cuda.set_device(local_rank if count >= local_world else 0)


def heartbeat_limit() -> float:
    """Seconds after which a rank without beats is gone. MachineError where the environment names no such number."""
    text = os.environ.get(SECONDS, "60")
    with suppress(ValueError):
        if 1 <= (seconds := float(text)) < inf:
            return seconds
    raise MachineError(
        "not a number of seconds from 1",
        where=f"environment: {SECONDS}={text}",
        fix=f"unset {SECONDS}",
    )


def meet(store: "Store", rank: int, world: int) -> tuple[str, list[str]]:
    """Find the ranks that were started together: a new name for them, which prefixes their keys, and each one's host.

    torchrun 2.13 keeps one store over its restarts, with the addresses of earlier ranks: whoever starts first would
    connect to those, and fail or wait for ever; and its nodes may count their restarts differently. So each rank says
    who it is and agrees to the list that rank 0 reads, and all go on when rank 0 has seen that every one agrees; MachineError
    if they have not after JOIN seconds."""

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    me, deadline = f"{socket.gethostname()} {uuid.uuid4().hex}", time.monotonic() + JOIN
    store.set(f"hello/{rank}", me)
    while time.monotonic() < deadline:
        if rank == 0 and all(hellos := [read(f"hello/{r}") for r in range(world)]):
            store.set("list", json.dumps(hellos))
        members = json.loads(listed := read("list") or "[]")
        if members[rank : rank + 1] == [me]:
            hosts, name = [member.split()[0] for member in members], members[0].split()[1]
            store.set(f"agreed/{rank}", listed)
            if rank == 0 and all(read(f"agreed/{r}") == listed for r in range(world)):
                for key, value in {
                    "verdict": "-",
                    **{f"beat/{r}": "{}" for r in range(world)},
                }.items():
                    store.set(f"{name}/{key}", value)  # a PrefixStore's way to write them
                store.set("go", name)
            if read("go") == name:
                return name, hosts
        time.sleep(0.05)
    missing = (
        ", ".join(str(r) for r in range(world) if not read(f"hello/{r}")) or "that was there before"
    )
    raise _apart(f"no word of rank {missing} in {JOIN:.0f} s", rank, world)


def _apart(what: str, rank: int, world: int, why: str = "") -> MachineError:
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    fix = "start the launcher on every node, with the same address and the same number of nodes"
    return MachineError(
        what, where=f"rank {rank} of {world}, MASTER_ADDR and MASTER_PORT {place}", why=why, fix=fix
    )


def refuse_many_ranks(command: str) -> None:
    """Raise MachineError where this process is one of several that would each do all of `command` alone."""
    for name in RANKS:
        if (count := os.environ.get(name, "")).isdecimal() and int(count) > 1:
            what = f"this process is one of {count}, and cannot find the others"
            alone, several = (
                f"tunesmith {command} ...",
                f"torchrun --nproc-per-node N -m tunesmith {command} ...",
            )
            by = several if command in ("train", "sweep") else alone
            fix = f"{by}, without another launcher; unset {name} if it is left over"
            where, why = (
                f"environment: {name}={count}",
                "each of them would work alone, on all rows",
            )
            raise MachineError(what, where=where, why=why, fix=fix)
