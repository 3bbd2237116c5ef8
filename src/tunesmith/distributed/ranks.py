"""The ranks of one run: which of them this process is, and what they agree on.

Whoever starts the ranks (torchrun does) sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT. What one rank decides alone, by its clock, a signal or an error, leaves
the others waiting for it in a collective: every such decision is shared first. The functions here
take any Python value and are for what comes before and after a step.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from math import inf
from typing import TYPE_CHECKING, TypeVar

from tunesmith.distributed.activity import Probes
from tunesmith.distributed.heartbeat import UNDECIDED, Heartbeat, refuses_connections
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
from tunesmith.host.signals import wait_for_signal
from tunesmith.run_dir import Phase
from tunesmith.units import count_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

# A collective may wait for a rank that compiles, loads or saves; one that is gone is noticed by its
# heartbeat.
COLLECTIVE_TIMEOUT = timedelta(hours=24)
# A key of the launcher's store: the prefix of the keys of these ranks' heartbeats.
HEARTBEAT_NAME = "heartbeat"
DEFAULT_LIMIT_SECONDS = "60"  # seconds without a beat after which a rank is gone
# Of the environment: for a slow network, or a test.
HEARTBEAT_VARIABLE = "TUNESMITH_HEARTBEAT_SECONDS"
JOIN = 600.0  # seconds that the ranks have to find each other, as long as torchrun gives its nodes
# Seconds that a rank leaves to the one of its node that reports the fault of both.
REPORT_S = 10.0
# NCCL's watchdog would end a process by SIGABRT, before a rank has reported what happened, where a
# collective or kernel failed or it stood still for minutes. Its sign to dump stays in the
# launcher's store for the ranks that start again.
WATCHDOG_SETTINGS = (
    "ASYNC_ERROR_HANDLING",
    "RETHROW_CUDA_ERRORS",
    "ENABLE_MONITORING",
    "DUMP_ON_TIMEOUT",
)
# Where torchrun and accelerate, srun, Open MPI, and other MPIs give the number of ranks.
# SLURM_NTASKS does not: a batch script without srun has it too, and is one process.
WORLD_VARIABLES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of a run. The defaults are a run of one process.

    Attributes:
        hosts: the name of each rank's host.
        run_dir_writers: for each rank the one that writes the run directory that it sees: rank 0,
            unless nodes share no disk (`checkpoint.replicate.find_run_dir_writers`).
        heartbeat: watches over the ranks.
        group: the process group that they share values over; None is the default one.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    hosts: tuple[str, ...] = ("",)
    run_dir_writers: tuple[int, ...] = (0,)
    heartbeat: Heartbeat = field(default_factory=Heartbeat, compare=False, repr=False)
    group: "ProcessGroup | None" = None

    @property
    def is_main_process(self) -> bool:
        """Tell whether this is rank 0, which speaks to the user and writes the run directory."""
        return self.rank == 0

    @property
    def is_run_dir_writer(self) -> bool:
        """Tell whether this rank writes the run directory that it sees."""
        return self.run_dir_writers[self.rank] == self.rank

    def name(self, rank: int) -> str:
        """A rank in words: `rank 3 on spark-b`."""
        return f"rank {rank} on {self.hosts[rank]}"

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        return self.all_gather_object(value)[0]

    def broadcast_number(self, value: float) -> float:
        """Rank 0's number, on every rank: a collective of the hosts that no device waits for."""
        if self.world == 1:
            return value
        import torch
        import torch.distributed as dist

        number = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(number, src=0, group=self.group)
        return number.item()

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values = [value] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """All ranks leave the block, or none: an error of one ends it on all, at its end.

        It must hold no collective. The lowest rank that failed raises its own error and reports
        it; the others raise `OtherRankError`, which says nothing and has the exit code.
        """
        if self.world == 1:
            yield
            return
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:  # a signal's KeyboardInterrupt too
            error = caught
        # One collective, which ranks reach with or without an error.
        outcomes = self.all_gather_object((_exit_code_of(error), str(error)))
        for rank, (code, text) in enumerate(outcomes):
            if not code:
                continue
            if error is not None and rank == self.rank:
                self.heartbeat.agreed = error
                raise error
            raise OtherRankError(f"{self.name(rank)} failed: {text}", exit_code=code) from error

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Let one rank of each node run the block before its others, which find what it cached.

        The block itself must hold no collective.
        """
        # The same collective for all: the others meet it before the block, the first rank after it.
        if self.local_rank:
            self.all_gather_object(None)
        try:
            yield
        finally:
            if not self.local_rank:
                self.all_gather_object(None)


def _exit_code_of(error: BaseException | None) -> int:
    if error is None:
        return EXIT_OK
    if isinstance(error, KeyboardInterrupt):  # a stop signal
        return EXIT_STOPPED
    if isinstance(error, TunesmithError):
        return error.exit_code
    return EXIT_FAILED


ONE_PROCESS = Ranks()


def started_as() -> dict[str, int] | None:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as torchrun sets them.

    None where this process is alone.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    texts = [os.environ.get(name, "") for name in names]
    if not all(text.isdecimal() for text in texts):
        return None
    numbers = {name: int(text) for name, text in zip(names, texts, strict=True)}
    return numbers if numbers["WORLD_SIZE"] > 1 else None


def is_launched() -> bool:
    """Tell whether torchrun, or what stands in for it, started this process.

    It starts it again on an exit code other than 0.
    """
    return started_as() is not None or "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def reported_once_a_node() -> Iterator[None]:
    """Let one rank of a node report a fault of the command or recipe, which each finds alone.

    For what happens before the ranks join. The others wait for it to end: a launcher stops all
    ranks as soon as one ends, which would stop the one that has the fault to report.
    """
    try:
        yield
    except UsageError as error:
        environment = started_as()
        if environment is not None and environment["LOCAL_RANK"]:
            wait_for_signal(REPORT_S)
            raise OtherRankError(error.what, exit_code=error.exit_code) from error
        raise


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the other ranks for the time of the block, if this process is one of several."""
    environment = started_as()
    if environment is None:
        yield Ranks()
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from tunesmith.distributed.torch_private import current_collective, find_nccl_error

    # In the order of `started_as`.
    rank, world, local_rank, local_world = environment.values()
    limit = timedelta(seconds=heartbeat_limit())
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        choose_gpu(local_rank, local_world)
        for name in WATCHDOG_SETTINGS:
            os.environ.setdefault(f"TORCH_NCCL_{name}", "0")
    try:
        store, _, _ = next(rendezvous("env://", rank, world, timeout=timedelta(seconds=JOIN)))
        group, hosts = meet(store, rank, world)
        # A client of its own, whose timeout is the limit of the heartbeat.
        heartbeat_store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=limit,
        )
        heartbeat_store.set(HEARTBEAT_NAME, group)
    except (RuntimeError, ValueError) as error:  # torch's, of a network and of an environment
        raise _apart(
            "the store of the ranks cannot be used", rank, world, why=first_line(error)
        ) from error
    probes = Probes(
        current_collective=current_collective,
        store_is_closed=partial(refuses_connections, heartbeat_store.host, heartbeat_store.port),
    )
    heartbeat = Heartbeat(
        rank,
        hosts,
        # Ranks are numbered node by node.
        range(rank - local_rank, rank - local_rank + local_world),
        dist.PrefixStore(group, heartbeat_store),
        probes,
    )
    if is_launched():  # the launcher would start a rank of any other exit code again
        heartbeat.report.stopped_code = EXIT_OK
    try:
        with heartbeat:
            # Gloo waits for ever behind a wrong interface.
            heartbeat.phase(Phase.JOINING, JOIN)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if has_cuda else "gloo",
                store=dist.PrefixStore(group, store),
                rank=rank,
                world_size=world,
                timeout=COLLECTIVE_TIMEOUT,
            )
            heartbeat.phase(Phase.START)
            if has_cuda:
                stream = torch.cuda.current_stream()
                probes.find_error = find_nccl_error
                probes.gpu_is_busy = lambda: not stream.query()
            yield Ranks(rank, world, local_rank, local_world, tuple(hosts), (0,) * world, heartbeat)
    finally:
        # A group that a rank has left may wait for it.
        if heartbeat.report.fault is None and dist.is_initialized():
            dist.destroy_process_group()


def choose_gpu(local_rank: int, local_world: int) -> None:
    """Take this rank's GPU of the node, or the only one that its process is shown.

    MachineError where there are too few.
    """
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if count >= local_world:
        torch.cuda.set_device(local_rank)
    # Slurm's --gpus-per-task shows each rank its own.
    elif count == 1 and visible:
        torch.cuda.set_device(0)
    else:
        raise MachineError(
            f"{count_of(local_world, 'rank')} on a node with {count_of(count, 'GPU')}",
            where=f"CUDA_VISIBLE_DEVICES={visible}",
            fix=f"use one rank per GPU: --nproc-per-node {count}",
        )


def heartbeat_limit() -> float:
    """Seconds after which a rank without beats is gone.

    MachineError where the environment names no such number.
    """
    text = os.environ.get(HEARTBEAT_VARIABLE, DEFAULT_LIMIT_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < inf:
        raise MachineError(
            "not a number of seconds of at least 1",
            where=f"environment: {HEARTBEAT_VARIABLE}={text}",
            fix=f"unset {HEARTBEAT_VARIABLE}",
        )
    return seconds


def meet(store: "Store", rank: int, world: int) -> tuple[str, list[str]]:
    """Find the ranks that were started together.

    Returns a new name for them, which prefixes their keys, and each one's host.

    torchrun 2.13 keeps one store over its restarts, with the addresses of earlier ranks: whoever
    starts first would connect to those, and fail or wait for ever; and its nodes may count their
    restarts differently. So each rank says who it is and agrees to the list that rank 0 reads, and
    all go on when rank 0 has seen that every one agrees; MachineError if they have not after JOIN
    seconds.
    """

    def read(key: str) -> str:
        # `get` alone would wait for a key that nobody has written yet.
        return store.get(key).decode() if store.check([key]) else ""

    own_name = f"{socket.gethostname()} {uuid.uuid4().hex}"
    deadline = time.monotonic() + JOIN
    store.set(f"hello/{rank}", own_name)
    while time.monotonic() < deadline:
        if rank == 0:
            hellos = [read(f"hello/{other}") for other in range(world)]
            if all(hellos):
                store.set("list", json.dumps(hellos))
        listed = read("list")
        members = json.loads(listed or "[]")
        # Any other list is of an earlier start.
        # A slice: the list of an earlier start may be shorter.
        if members[rank : rank + 1] == [own_name]:
            name = members[0].split()[1]
            store.set(f"agreed/{rank}", listed)
            if rank == 0 and all(read(f"agreed/{other}") == listed for other in range(world)):
                # As a PrefixStore would write them.
                store.set(f"{name}/fault", UNDECIDED)
                for other in range(world):
                    store.set(f"{name}/beat/{other}", "{}")
                store.set("go", name)
            if read("go") == name:
                return name, [member.split()[0] for member in members]
        time.sleep(0.05)
    silent = [str(other) for other in range(world) if not read(f"hello/{other}")]
    missing = ", ".join(silent) or "that was there before"
    raise _apart(f"no response from rank {missing} in {JOIN:.0f} s", rank, world)


def _apart(what: str, rank: int, world: int, why: str = "") -> MachineError:
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return MachineError(
        what,
        where=f"rank {rank} of {world}, MASTER_ADDR and MASTER_PORT {address}",
        why=why,
        fix="start the launcher on every node, with the same address and the same number of nodes",
    )


def require_one_process(command: str) -> None:
    """MachineError where this process is one of several that would each do all of `command`."""
    for name in WORLD_VARIABLES:
        text = os.environ.get(name, "")
        if not text.isdecimal() or int(text) < 2:
            continue
        start = f"tunesmith {command} ..."
        if command in ("train", "sweep", "eval"):
            start = f"torchrun --nproc-per-node N -m tunesmith {command} ..."
        raise MachineError(
            f"this process is one of {text}, and cannot find the others",
            where=f"environment: {name}={text}",
            why="each process would train separately, on all rows",
            fix=f"{start}, without another launcher; or unset {name} if it is left over "
            "from another program",
        )
