"""The node agent: starts the ranks of one node, whoever starts it: a terminal, docker, srun, a
Swarm task.

  python -m tunesmith.launch.node --nodes 2 --ranks 8 --endpoint HOST:29500 -- train my-recipe.yaml

torch's elastic launcher runs in this process. Exit codes are those of `train`: 0 success, 1 failed,
2 refused before the first step, 75 stopped with all saved. A stop signal goes on to the ranks of
this node, and all ranks of all nodes agree to save and end. One rank alone takes this process over.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.config.load import load_recipe
from tunesmith.distributed.diagnosis import AGAIN
from tunesmith.distributed.heartbeat import refuses_connections
from tunesmith.errors import (
    CAUSES,
    EXIT_FAILED,
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
from tunesmith.host.signals import ignore_stop_signals
from tunesmith.host.streams import visible
from tunesmith.launch.rendezvous import (
    BACKEND,
    Endpoint,
    connect_store,
    find_endpoint,
    register_backend,
    start_store,
)
from tunesmith.run_dir import FINAL, STOPPED

if TYPE_CHECKING:
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from tunesmith.launch.elastic import ForwardStop

# NCCL takes the functions of one port for one device: 161 in place of 98 Gb/s between two Sparks,
# by a report of their users.
MERGE_NICS = ("NCCL_IB_MERGE_NICS", "1")
CPP_LOG_VARIABLE = "TORCH_CPP_LOG_LEVEL"


def parser() -> argparse.ArgumentParser:
    """The agent's flags; the words after `--` are those of `tunesmith`."""
    p = argparse.ArgumentParser(prog="python -m tunesmith.launch.node", description=__doc__)
    p.add_argument("--nodes", default="1", metavar="N", help="of the run (default: 1)")
    p.add_argument(
        "--ranks", default="auto", metavar="N|auto", help="of this node; auto: one per GPU, or one"
    )
    p.add_argument(
        "--endpoint",
        default="127.0.0.1:0",
        metavar="HOST:PORT",
        help="of the node with the store",
    )
    p.add_argument("--id", default="tunesmith", help="of the run, if several share an endpoint")
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
        help="exit code of a stopped and saved run (75); 0 for Swarm, which restarts any other",
    )
    p.add_argument(
        "--debug", action="store_true", help="tracebacks, and what NCCL does, in the output"
    )
    p.add_argument("words", nargs="+", metavar="-- train RECIPE", help="the command of each rank")
    return p


def run_agent(argv: Sequence[str] | None = None) -> int:
    """Run the agent with these words -> exit code; one rank alone does not return.

    argv: None: those of the process.
    """
    args = parser().parse_args(argv)
    try:
        code = run_node(args)
    except TunesmithError as error:
        print(visible(error.text()), file=sys.stderr)
        code = error.exit_code
    # A caller's signals are its own, and what it starts would inherit that they are ignored
    if argv is None:
        ignore_stop_signals()
    return args.stopped if code == EXIT_STOPPED else code


def run_node(args: argparse.Namespace) -> int:
    """Start the ranks that the parsed flags describe and wait for their end -> exit code."""
    command, *rest = args.words
    out = None
    if command == "train":
        recipe, *overrides = rest
        out = Path(load_recipe(recipe, overrides).output_dir)
    args.nodes = positive_count(args.nodes, "--nodes")
    ranks = count_gpus() or 1
    if args.ranks != "auto":
        ranks = positive_count(args.ranks, "--ranks")
    if args.debug:
        os.environ["TUNESMITH_DEBUG"] = "1"
        os.environ.setdefault("NCCL_DEBUG", "INFO")
    is_one_rank = ranks == args.nodes == 1
    # One rank needs no launcher: it takes the place of this process, so that signals reach it
    # directly.
    if is_one_rank and not args.restarts:
        os.execv(sys.executable, [sys.executable, "-m", "tunesmith", *args.words])
    return run_program(args, ranks, ["-m", "tunesmith", *args.words], out)


def run_program(
    args: argparse.Namespace, ranks: int, program: Sequence[str], out: Path | None
) -> int:
    """Start a program as the ranks of this node, and wait -> exit code.

    Args:
        args: the parsed flags, but for `ranks` and `words`.
        program: a script or `-m` a module, and its words.
        out: the run directory, where the ranks write that they were stopped; None if they do not
            train.
    """
    host, _, port = args.endpoint.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(
            f"{args.endpoint} is not HOST:PORT", where="--endpoint", fix="--endpoint 10.0.0.1:29500"
        )
    from tunesmith.launch.elastic import ForwardStop, install_agent  # loads torch

    # A file of an earlier run in this directory is no news.
    stopped_before = stopped_at(out)
    stop = ForwardStop()
    endpoint = find_endpoint(host.strip("[]"), int(port))
    prepare_environment(ranks, endpoint.interface)
    if endpoint.is_here:
        store, endpoint = start_store(endpoint)
    else:
        store = connect_store(endpoint)
    register_backend(store, endpoint)
    install_agent(store, stop)
    # torch leaves its own folder behind.
    with tempfile.TemporaryDirectory(prefix="tunesmith-ranks-") as folder:
        launcher = _launcher_words(args, ranks, endpoint, folder)
        code = run_ranks([*launcher, "--rdzv-id", args.id, *program], store, stop)
    if code in (EXIT_FAILED, EXIT_OK) and stopped_at(out) > stopped_before:
        return EXIT_STOPPED
    is_done = out is not None and (out / FINAL).is_dir()
    # stopped.json may be on another node.
    if stop.number and code == EXIT_OK and not is_done:
        return EXIT_STOPPED
    return code


def _launcher_words(
    args: argparse.Namespace, ranks: int, endpoint: Endpoint, folder: str
) -> list[str]:
    """The flags of torch's elastic launcher, but for the rendezvous id; `folder`: for logs."""
    flags = {
        "--nnodes": str(args.nodes),
        "--nproc-per-node": str(ranks),
        "--rdzv-backend": BACKEND,
        "--rdzv-endpoint": endpoint.place,
        "--local-addr": endpoint.address,
        "--max-restarts": str(args.restarts),
        # Its own handlers would kill ranks that save for longer than half a minute.
        "--signals-to-handle": "SIGQUIT",
        "--log-dir": folder,
    }
    return [word for flag in flags.items() for word in flag]


def run_ranks(launcher: list[str], store: "TCPStore", stop: "ForwardStop") -> int:
    """torch's elastic launcher with these words -> exit code: that of the rank that failed first.

    `store`: of the ranks of all nodes; `stop`: the stop signals of this process.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as run_elastic

    # The rank that failed has said why.
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
    """The error of a rendezvous that fails: a RunError once ranks were started."""
    where = "rendezvous"
    why = first_line(error)[:300]
    # torch names the cause only in the text of its error.
    fix = "start the same command on every node; tunesmith doctor --pair HOST finds the cause"
    if not stop.ranks_began:
        what = "this node and the others cannot find each other"
        return MachineError(what, where=where, why=why, fix=fix)
    what = "lost the launcher of the node with the ranks' store"
    # A machine that refuses a connection is up, and so is the network to it.
    # The store's node answers with a refusal: its launcher ended, the machine did not.
    if stop.number or refuses_connections(store.host, store.port):
        return RunError(what, where=where, why=why, fix=AGAIN, cause="killed")
    return RunError(f"{what}, or the network to it", where=where, why=why, fix=fix, cause="link")


def exit_code_of(error: "ChildFailedError", kills: int, stop: "ForwardStop") -> int:
    """1, 2 or 75, as the rank that failed first ended.

    Its own words are on the terminal, unless a signal killed it.

    Args:
        error: of torch's launcher.
        kills: of the kernel for want of memory, before the ranks began.
        stop: the stop signals of this process.
    """
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    # A negative exit code is the number of a signal.
    if code < 0:
        # Python had not installed the rank's handlers yet.
        if stop.number == -code:
            raise stop.not_begun("the ranks had just started")
        line = f"error: rank {rank} was killed by {signal.Signals(-code).name}"
        if oom_kills() > kills:
            line += f"; cause: oom-kill: {CAUSES['oom-kill']}"
        print(line, file=sys.stderr)
    return code if code in (EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED) else EXIT_FAILED


def stopped_at(out: Path | None) -> float:
    """When ranks last wrote stopped.json; 0 where there is none."""
    file = None if out is None else out / STOPPED
    return file.stat().st_mtime if file is not None and file.exists() else 0.0


def prepare_environment(ranks: int, interface: str) -> None:
    """Set the variables that each rank needs, unless they are set.

    They are its threads, the interface to listen on, and beside NCCL_IB_HCA the one that joins the
    functions of a port.
    """
    # torch's launcher would set 1 thread a rank.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // ranks)))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, interface)
    if "NCCL_IB_HCA" in os.environ:
        os.environ.setdefault(*MERGE_NICS)
    # torch reads it once, when it is loaded.
    if os.environ.get("TUNESMITH_DEBUG") != "1":
        os.environ.setdefault(CPP_LOG_VARIABLE, "ERROR")


def count_gpus() -> int:
    """GPUs that this process may use: those of CUDA_VISIBLE_DEVICES, else all of nvidia-smi."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(list_gpus())
    # CUDA sees none from -1 on.
    valid, _, _ = visible.partition("-1")
    return sum(1 for name in valid.split(",") if name.strip())


def positive_count(text: str, where: str) -> int:
    """A count of at least 1; UsageError for any other text."""
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(
            f"{text} is not a whole number of at least 1", where=where, fix=f"{where} 2"
        )
    return int(text)


if __name__ == "__main__":
    run_and_exit(run_agent)
