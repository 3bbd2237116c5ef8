"""The ranks of one run: how this process joins them, and how they share values and errors.

The launcher (such as torchrun) sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. If one rank reacted alone to its clock, a signal or an error, the other ranks would
wait for it in a collective. Therefore the ranks first share each decision that depends on a clock,
a signal or an error. The functions of this module accept any picklable value. They are meant for
the time before and after a step.
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
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from tunesmith.distributed.activity import Probes
from tunesmith.distributed.heartbeat import UNDECIDED, Heartbeat, causes_of, refuses_connections
from tunesmith.errors import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_STOPPED,
    MachineError,
    OtherRankError,
    RunError,
    TunesmithError,
    UsageError,
    first_line,
)
from tunesmith.host.signals import signals_deferred, wait_for_signal
from tunesmith.run_dir import Phase
from tunesmith.units import count_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

# Timeout of collectives. It is long because a collective may wait for a rank that compiles, loads
# or saves. The heartbeat detects a lost rank much earlier.
COLLECTIVE_TIMEOUT = timedelta(hours=24)
# Key in the launcher's store. Its value is the prefix of the keys that these ranks use for their
# heartbeats.
HEARTBEAT_NAME = "heartbeat"
# Seconds without a heartbeat message ("beat") after which a rank counts as lost.
DEFAULT_LIMIT_SECONDS = "60"
# Environment variable that replaces DEFAULT_LIMIT_SECONDS, for a slow network or a test.
HEARTBEAT_VARIABLE = "TUNESMITH_HEARTBEAT_SECONDS"
# Seconds in which all ranks must join. torchrun uses the same timeout for its nodes.
JOIN = 600.0
# Seconds for which a rank waits while another rank of its node reports an error that both ranks
# have.
REPORT_S = 10.0
# Settings that disable parts of NCCL's watchdog. If a collective or kernel fails or hangs for
# minutes, the watchdog would end the process with SIGABRT, before the rank has reported the fault.
# It would also write a request for a dump to the launcher's store, where the request would affect
# the restarted ranks.
WATCHDOG_SETTINGS = (
    "ASYNC_ERROR_HANDLING",
    "RETHROW_CUDA_ERRORS",
    "ENABLE_MONITORING",
    "DUMP_ON_TIMEOUT",
)
# Environment variables with the number of ranks, set by torchrun and accelerate, srun, Open MPI,
# and other MPI implementations. SLURM_NTASKS is not listed, because it is also set in a batch
# script that does not use srun and therefore has only one process.
WORLD_VARIABLES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# Environment variable with the path of a file. The node agent sets it, and a stopped rank creates
# the file, because its exit code 0 does not tell the agent about the stop.
STOP_NOTE = "TUNESMITH_STOP_NOTE"
T = TypeVar("T")


class FailedRank(NamedTuple):
    """The message that a failed rank sends to the other ranks in place of a value."""

    exit_code: int
    text: str


@dataclass(frozen=True)
class Ranks:
    """This process and the other ranks of its run. The defaults describe a run of one process.

    Attributes:
        rank, world: the number of this rank and the number of all ranks.
        local_rank, local_world: the number of this rank on its node, and the number of ranks on its
            node.
        hosts: the host name of each rank.
        run_dir_writers: for each rank, the rank that writes the run directory on its disk. This is
            rank 0, unless nodes share no disk (`checkpoint.replicate.choose_run_dir_writers`).
        heartbeat: the heartbeat, which detects a lost rank.
        group: the process group over which values are shared. None is torch's default group.
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
        """Return whether this is rank 0, which prints messages and writes the run directory."""
        return self.rank == 0

    @property
    def is_run_dir_writer(self) -> bool:
        """Return whether this rank writes the run directory on the disk of its node."""
        return self.run_dir_writers[self.rank] == self.rank

    def name(self, rank: int) -> str:
        """Return the name of a rank for messages, such as `rank 3 on spark-b`."""
        return f"rank {rank} on {self.hosts[rank]}"

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's value on every rank. This is a collective call."""
        return self.all_gather_object(value)[0]

    def broadcast_number(self, value: float) -> float:
        """Return rank 0's number on every rank.

        This is a collective call on the CPU, so that no GPU waits for the result.
        """
        if self.world == 1:
            return value
        import torch
        import torch.distributed as dist

        number = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(number, src=0, group=self.group)
        return number.item()

    def all_gather_object(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order, on every rank.

        This is a collective call. Raise OtherRankError if another rank has failed, see
        `raise_on_all_ranks`.
        """
        return self._gather(value, None)

    def _gather(self, value: T, error: BaseException | None) -> list[T]:
        """Return the values of all ranks. If ranks have failed, raise an error on all ranks.

        Args:
            error: the error of this rank, which sends a FailedRank instead of `value`.
        """
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        sent = FailedRank(_exit_code_of(error), str(error)) if error is not None else value
        values = [value] * self.world
        if isinstance(error, TunesmithError) and len(set(self.hosts)) > 1:
            error.where = ", ".join(filter(None, (error.where, self.hosts[self.rank])))
        # The call consists of two collectives. A signal that interrupted it between them would
        # leave the ranks in different collectives.
        with signals_deferred():
            dist.all_gather_object(values, sent, group=self.group)
            for rank, gathered in enumerate(values):
                if not isinstance(gathered, FailedRank):
                    continue
                if error is not None and rank == self.rank:
                    self.heartbeat.agreed = error
                    raise error
                text = f"{self.name(rank)} failed: {gathered.text}"
                other = OtherRankError(text, exit_code=gathered.exit_code)
                self.heartbeat.agreed = other
                raise other from error
        return values

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Context manager: if the block fails on one rank, raise an error on all ranks at the end
        of the block.

        A failed rank leaves the block at once. Another rank learns of the failure in its next call
        of `all_gather_object`, inside the block or at its end. The block must not contain other
        collectives. The lowest failed rank raises its own error and reports it. The other ranks
        raise `OtherRankError`, which is not printed and has the exit code of the first error.
        """
        if self.world == 1:
            yield
            return
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:  # includes the KeyboardInterrupt of a signal
            # All ranks know this error from a collective inside the block.
            if self.heartbeat.agreed in causes_of(caught):
                raise
            error = caught
        self._gather(None, error)

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Context manager that runs the block on the first rank of each node before the other ranks
        of the node.

        The other ranks can read what the first rank has cached. The block must not contain a
        collective. Use it inside `raise_on_all_ranks`, which tells the other ranks about an error
        in the block.
        """
        # All ranks enter one collective: the first rank of a node enters it after the block, and
        # the other ranks enter it before the block.
        if self.local_rank:
            self.all_gather_object(None)
        yield
        if not self.local_rank:
            self.all_gather_object(None)


def _exit_code_of(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):  # a stop signal
        return EXIT_STOPPED
    if isinstance(error, TunesmithError):
        return error.exit_code
    return EXIT_FAILED


ONE_PROCESS = Ranks()


@contextmanager
def as_usage_error(ranks: Ranks = ONE_PROCESS) -> Iterator[None]:
    """Convert a RunError of rank 0 to a UsageError. Use this before the first step, when nothing
    has begun.

    An example is the error for an unreadable checkpoint. Errors on other ranks are not converted.
    """
    try:
        yield
    except RunError as error:
        if not ranks.is_main_process:
            raise
        raise UsageError(error.what, where=error.where, why=error.why, fix=error.fix) from error


def started_as() -> dict[str, int] | None:
    """Return RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE from the environment.

    Return None if the world size is 1 or if a variable is missing.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    texts = [os.environ.get(name, "") for name in names]
    if not all(text.isdecimal() for text in texts):
        return None
    numbers = {name: int(text) for name, text in zip(names, texts, strict=True)}
    return numbers if numbers["WORLD_SIZE"] > 1 else None


def is_launched() -> bool:
    """Return whether this process was started by torchrun or a similar launcher.

    Such a launcher restarts the process if its exit code is not 0.
    """
    return started_as() is not None or "TORCHELASTIC_RUN_ID" in os.environ


def stopped_code() -> int:
    """Return the exit code of a stopped rank. If the node agent started the rank, tell the agent
    about the stop.
    """
    if not is_launched():
        return EXIT_STOPPED
    note = os.environ.get(STOP_NOTE)
    if note:
        Path(note).touch()
    return EXIT_OK


@contextmanager
def reported_once_a_node() -> Iterator[None]:
    """Context manager in which only one rank per node reports a UsageError of the command or
    recipe.

    Use this before the ranks join, when each rank finds the same error by itself. A launcher stops
    all ranks as soon as one rank ends. Therefore the other ranks wait until the first rank has
    ended, so that it can complete its report.
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
    """Context manager that joins the other ranks of the run, if the run has several ranks. The
    ranks leave the process group at the end of the block.
    """
    environment = started_as()
    if environment is None:
        yield Ranks()
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from tunesmith.distributed.torch_private import current_collective, find_nccl_error

    # `started_as` inserts the values in this order.
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
        # Open a separate client of the store for the heartbeat, because its timeout must be the
        # limit of the heartbeat.
        heartbeat_store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=limit,
        )
        heartbeat_store.set(HEARTBEAT_NAME, group)
    except (RuntimeError, ValueError) as error:  # torch's errors about network and environment
        raise _join_error(
            "the rendezvous store of the ranks cannot be used", rank, world, why=first_line(error)
        ) from error
    probes = Probes(
        current_collective=current_collective,
        store_is_closed=partial(refuses_connections, heartbeat_store.host, heartbeat_store.port),
    )
    heartbeat = Heartbeat(
        rank,
        hosts,
        # Ranks of the same node have consecutive numbers.
        range(rank - local_rank, rank - local_rank + local_world),
        dist.PrefixStore(group, heartbeat_store),
        probes,
    )
    heartbeat.report.stopped_code = stopped_code
    try:
        with heartbeat:
            # Set a limit, because Gloo waits forever if it uses a wrong network interface.
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
        # After a fault do not destroy the group, because the call may wait for a lost rank.
        if heartbeat.report.fault is None and dist.is_initialized():
            dist.destroy_process_group()


def choose_gpu(local_rank: int, local_world: int) -> None:
    """Select the GPU of this rank. If only one GPU is visible to the process, select this GPU.

    Raise MachineError if there are fewer GPUs than ranks.
    """
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if count >= local_world:
        torch.cuda.set_device(local_rank)
    # With Slurm's --gpus-per-task each rank sees only its own GPU.
    elif count == 1 and visible:
        torch.cuda.set_device(0)
    else:
        raise MachineError(
            f"a node with {count_of(count, 'GPU')} has {count_of(local_world, 'rank')}",
            where=f"CUDA_VISIBLE_DEVICES={visible}",
            fix=f"start one rank per GPU with --nproc-per-node {count}",
        )


def heartbeat_limit() -> float:
    """Return the seconds without heartbeats after which a rank counts as lost.

    Raise MachineError if the environment variable is not a number of at least 1.
    """
    text = os.environ.get(HEARTBEAT_VARIABLE, DEFAULT_LIMIT_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < inf:
        raise MachineError(
            "the heartbeat limit must be a number of seconds, at least 1",
            where=f"environment: {HEARTBEAT_VARIABLE}={text}",
            fix=f"unset {HEARTBEAT_VARIABLE}",
        )
    return seconds


def meet(store: "Store", rank: int, world: int) -> tuple[str, list[str]]:
    """Find the ranks that were started together, and create the keys of their heartbeat.

    torchrun 2.13 keeps one store when it restarts the ranks, and the store still has the addresses
    of the earlier ranks. The first rank that starts again would connect to these addresses, and
    fail or wait forever. The restart counters of the nodes may differ, so they cannot identify a
    start. Therefore each rank writes a unique name, rank 0 writes the list of all names, and each
    rank confirms the list. The ranks continue when rank 0 has read all confirmations.

    Returns:
        A new name for these ranks, which is the prefix of their keys in the store, and the host of
        each rank.

    Raises:
        MachineError: if the ranks have not agreed after JOIN seconds.
    """

    def read(key: str) -> str:
        # Call `check` before `get`, because `get` blocks until the key exists.
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
        # Ignore a list without this rank's name, because the ranks wrote it before they were
        # restarted. Compare slices, because that list may be shorter.
        if members[rank : rank + 1] == [own_name]:
            name = members[0].split()[1]
            store.set(f"agreed/{rank}", listed)
            if rank == 0 and all(read(f"agreed/{other}") == listed for other in range(world)):
                # Write the keys in the form "prefix/key", in which a PrefixStore reads them.
                store.set(f"{name}/fault", UNDECIDED)
                for other in range(world):
                    store.set(f"{name}/beat/{other}", "{}")
                store.set("go", name)
            if read("go") == name:
                return name, [member.split()[0] for member in members]
        time.sleep(0.05)
    silent = [str(other) for other in range(world) if not read(f"hello/{other}")]
    missing = ", ".join(silent) or "(number unknown)"
    raise _join_error(f"there was no response from rank {missing} in {JOIN:.0f} s", rank, world)


def _join_error(what: str, rank: int, world: int, why: str = "") -> MachineError:
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return MachineError(
        what,
        where=f"rank {rank} of {world}, MASTER_ADDR and MASTER_PORT {address}",
        why=why,
        fix="start the launcher on every node, with the same address and the same number of nodes",
    )


def require_one_process(command: str) -> None:
    """Raise MachineError if a launcher started several processes that cannot join each other.

    Without this check, each process would execute the entire command.
    """
    for name in WORLD_VARIABLES:
        text = os.environ.get(name, "")
        if not text.isdecimal() or int(text) < 2:
            continue
        start = f"tunesmith {command} ..."
        if command in ("train", "sweep", "eval"):
            start = f"torchrun --nproc-per-node N -m tunesmith {command} ..."
        raise MachineError(
            f"this process is one of {text} processes, but cannot find the other processes",
            where=f"environment: {name}={text}",
            why="each process would train separately, on all rows",
            fix=f"start the command as `{start}` without another launcher, or unset {name} if it "
            "is left over from another program",
        )
