"""The node agent, which starts the ranks of one node.

It can be started from a terminal, by docker, by srun or as a Swarm task.

  python -m tunesmith.launch.node --nodes 2 --ranks 8 --endpoint HOST:29500 -- train my-recipe.yaml

torch's elastic launcher runs in this process. The exit codes are the same as for `train`: 0
success, 1 failed, 2 refused before the first step, 75 stopped and saved. A stop signal is forwarded
to the ranks of this node, and the ranks of all nodes agree to save and end. If there is only one
rank, it replaces this process.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.distributed.diagnosis import AGAIN
from tunesmith.distributed.heartbeat import refuses_connections
from tunesmith.distributed.ranks import STOP_NOTE
from tunesmith.errors import (
    CAUSES,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USAGE,
    MachineError,
    RunError,
    TunesmithError,
    UsageError,
    first_line,
)
from tunesmith.host.chips import list_gpus
from tunesmith.host.cores import available_cores
from tunesmith.host.ending import run_and_exit
from tunesmith.host.memory import oom_kills
from tunesmith.host.signals import SIGNAL_NAMES, ignore_stop_signals
from tunesmith.host.streams import visible
from tunesmith.launch.rendezvous import (
    BACKEND,
    connect_store,
    find_endpoint,
    register_backend,
    start_store,
)

if TYPE_CHECKING:
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from tunesmith.launch.elastic import ForwardStop

# NCCL setting that merges the PCIe functions of one network port into one device. With this
# setting, users report 161 instead of 98 Gb/s between two DGX Sparks.
MERGE_NICS = ("NCCL_IB_MERGE_NICS", "1")
CPP_LOG_VARIABLE = "TORCH_CPP_LOG_LEVEL"


def parser() -> argparse.ArgumentParser:
    """Build the parser of the agent's flags. The words after `--` are a command of tunesmith."""
    p = argparse.ArgumentParser(prog="python -m tunesmith.launch.node", description=__doc__)
    p.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default: 1)")
    p.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="number of ranks on this node (default: one per GPU, or one if there is no GPU)",
    )
    p.add_argument(
        "--endpoint",
        default="127.0.0.1:0",
        metavar="HOST:PORT",
        help="address of the node that runs the rendezvous store (the first node)",
    )
    p.add_argument(
        "--id", default="tunesmith", help="id of the run, needed if several runs share an endpoint"
    )
    p.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="K",
        help="restart failed ranks, at most K times",
    )
    p.add_argument(
        "--stopped",
        type=int,
        default=EXIT_STOPPED,
        metavar="CODE",
        help="exit code of a stopped and saved run (default: 75); use 0 for Swarm, which restarts"
        " a task after any other code",
    )
    p.add_argument(
        "--debug", action="store_true", help="show tracebacks and NCCL's log in the output"
    )
    p.add_argument(
        "words", nargs="+", metavar="-- train RECIPE", help="the command that every rank runs"
    )
    return p


def run_agent(argv: Sequence[str] | None = None) -> int:
    """Run the agent and return its exit code.

    The function does not return if there is only one rank, which replaces this process.

    Args:
        argv: the command-line arguments, or None for the arguments of this process.
    """
    args = parser().parse_args(argv)
    try:
        code = run_node(args)
    except TunesmithError as error:
        print(visible(error.text()), file=sys.stderr)
        code = error.exit_code
    # Ignore signals only if this process was started as the agent. If another program called this
    # function, its later child processes would inherit the ignored signals.
    if argv is None:
        ignore_stop_signals()
    return args.stopped if code == EXIT_STOPPED else code


def run_node(args: argparse.Namespace) -> int:
    """Start the ranks that the flags describe, wait until they end and return the exit code."""
    ranks = args.ranks or count_gpus() or 1
    if args.debug:
        os.environ["TUNESMITH_DEBUG"] = "1"
        os.environ.setdefault("NCCL_DEBUG", "INFO")
    # A single rank needs no launcher. Replace this process by the rank, so that the rank gets
    # signals directly.
    if ranks == args.nodes == 1 and not args.restarts:
        os.execv(sys.executable, [sys.executable, "-m", "tunesmith", *args.words])
    return run_program(args, ranks, ["-m", "tunesmith", *args.words])


def run_program(args: argparse.Namespace, ranks: int, program: Sequence[str]) -> int:
    """Start a program once for each rank of this node, wait until all end and return the exit code.

    Args:
        args: the parsed flags. `args.ranks` and `args.words` are not used.
        ranks: number of ranks on this node.
        program: a script, or `-m` and a module, with its arguments.
    """
    host, _, port = args.endpoint.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(
            f"{args.endpoint} is not an address in the form HOST:PORT",
            where="--endpoint",
            fix="write the address like this: --endpoint 10.0.0.1:29500",
        )
    # Set torch's log level now, because torch reads it only when it is imported.
    if os.environ.get("TUNESMITH_DEBUG") != "1":
        os.environ.setdefault(CPP_LOG_VARIABLE, "ERROR")
    from tunesmith.launch.elastic import ForwardStop, install_agent  # loads torch

    stop = ForwardStop()
    endpoint = find_endpoint(host.strip("[]"), int(port))
    prepare_environment(ranks, endpoint.interface)
    if endpoint.is_here:
        store, endpoint = start_store(endpoint)
    else:
        store = connect_store(endpoint)
    register_backend(store, endpoint)
    install_agent(store, stop)
    # Give torch a temporary folder for logs, because torch does not delete the folder it creates.
    with tempfile.TemporaryDirectory(prefix="tunesmith-ranks-") as folder:
        stop_note = Path(folder, "stopped")
        os.environ[STOP_NOTE] = str(stop_note)
        flags = [
            f"--nnodes={args.nodes}",
            f"--nproc-per-node={ranks}",
            f"--rdzv-backend={BACKEND}",
            f"--rdzv-endpoint={endpoint.place}",
            f"--rdzv-id={args.id}",
            f"--local-addr={endpoint.address}",
            f"--max-restarts={args.restarts}",
            # Let torch handle only SIGQUIT. Its handlers of SIGTERM and SIGINT would kill ranks
            # that need more than 30 seconds to save.
            "--signals-to-handle=SIGQUIT",
            f"--log-dir={folder}",
        ]
        code = run_ranks([*flags, *program], store, stop)
        if code in (EXIT_FAILED, EXIT_OK) and stop_note.exists():
            return EXIT_STOPPED
    return code


def run_ranks(launcher: list[str], store: "TCPStore", stop: "ForwardStop") -> int:
    """Run torch's elastic launcher and return the exit code of the rank that failed first.

    Args:
        launcher: the arguments of the launcher.
        store: the store of the ranks of all nodes.
        stop: the handler of this process's stop signals.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as run_elastic

    # Hide the launcher's error log, because the failed rank has already printed its error.
    if os.environ.get("TUNESMITH_DEBUG") != "1":
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    kills = oom_kills()
    try:
        run_elastic(parse_args(launcher))
    except ChildFailedError as error:
        return exit_code_of(error, kills, stop)
    except (RendezvousError, RuntimeError) as error:
        raise _lost_rendezvous(error, store, stop) from error
    return EXIT_OK


def _lost_rendezvous(error: Exception, store: "TCPStore", stop: "ForwardStop") -> TunesmithError:
    """Build the error for a failed rendezvous.

    The error is a MachineError if no ranks were started yet, else a RunError.
    """
    where = "rendezvous"
    why = first_line(error)[:300]
    fix = "start the same command on every node; find the cause with `tunesmith doctor --pair HOST`"
    if not stop.ranks_began:
        what = "this node and the other nodes cannot find each other"
        return MachineError(what, where=where, why=why, fix=fix)
    what = "the launcher on the node that runs the rendezvous store has ended"
    # A refused connection means that the other machine and the network work, but the launcher on
    # the other machine has ended.
    if stop.number or refuses_connections(store.host, store.port):
        return RunError(what, where=where, why=why, fix=AGAIN, cause="killed")
    what = f"{what}, or the network between the nodes is down"
    return RunError(what, where=where, why=why, fix=fix, cause="link")


def exit_code_of(error: "ChildFailedError", kills: int, stop: "ForwardStop") -> int:
    """Return the exit code (1, 2, 75 or 130) of the rank that failed first.

    If a signal killed the rank, print an error. Otherwise the rank has printed its error.

    Args:
        error: the error of torch's launcher.
        kills: number of out-of-memory kills by the kernel before the ranks were started.
        stop: the handler of this process's stop signals.
    """
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    # A negative exit code is the number of a signal.
    if code < 0:
        # The rank had not yet installed its handlers of stop signals.
        if signal.Signals(-code).name in SIGNAL_NAMES:
            stop.number = -code
            raise stop.not_begun("the ranks had just started")
        line = f"error: rank {rank} was killed by {signal.Signals(-code).name}"
        if oom_kills() > kills:
            line += f"; cause: oom-kill: {CAUSES['oom-kill']}"
        print(line, file=sys.stderr)
    known = (EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED, EXIT_INTERRUPTED)
    return code if code in known else EXIT_FAILED


def prepare_environment(ranks: int, interface: str) -> None:
    """Set the environment variables of the ranks. Variables that are already set are kept.

    The variables set the number of threads and the network interface. If NCCL_IB_HCA is set,
    NCCL_IB_MERGE_NICS is set too.
    """
    # Set the number of threads. Otherwise torch's launcher would use only one thread per rank.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // ranks)))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, interface)
    if "NCCL_IB_HCA" in os.environ:
        os.environ.setdefault(*MERGE_NICS)


def count_gpus() -> int:
    """Return the number of GPUs that this process may use.

    Count the GPUs in CUDA_VISIBLE_DEVICES if it is set, else all GPUs that nvidia-smi lists.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(list_gpus())
    # CUDA ignores -1 and all devices after it.
    valid, _, _ = visible.partition("-1")
    return sum(1 for name in valid.split(",") if name.strip())


if __name__ == "__main__":
    run_and_exit(run_agent)
