"""The node agent: starts the ranks of one node, whoever starts it: a terminal, docker, srun, a Swarm task.

    python -m tunesmith.launch.node --nodes 2 --ranks 8 --endpoint HOST:29500 -- train my-recipe.yaml

torch's elastic launcher runs in this process. Exit codes are those of `train`: 0 done, 1 failed, 2 refused before the first
step, 75 stopped with all saved. A stop signal goes on to the ranks of this node, and all ranks of all nodes agree to save and
end. One rank alone takes this process over. A run that stops because memory is short starts once more, with half the micro
batch.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.config.load import load_recipe
from tunesmith.distributed.heartbeat import AGAIN, refuses_connections
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
from tunesmith.host.memory import oom_kills
from tunesmith.host.signals import RESTART, ignore_stop_signals
from tunesmith.launch.debug import collect_logs, say_all
from tunesmith.launch.jobs import FOLDER
from tunesmith.launch.rendezvous import (
    BACKEND,
    find_endpoint,
    hold_store,
    reach_store,
    register_backend,
)
from tunesmith.run_dir import FAILURE, FINAL, STOPPED

if TYPE_CHECKING:
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from tunesmith.launch.elastic import ForwardStop

# NCCL takes the functions of one port for one device: 161 in place of 98 Gb/s between two Sparks, by a report of their users.
MERGE_NICS = ("NCCL_IB_MERGE_NICS", "1")
LOG = "TORCH_CPP_LOG_LEVEL"


def parser() -> argparse.ArgumentParser:
    """The agent's flags; the words after `--` are those of `tunesmith`."""
    p = argparse.ArgumentParser(prog="python -m tunesmith.launch.node", description=__doc__)
    p.add_argument(
        "--nodes", default="1", metavar="N|MIN:MAX", help="nodes of the run (default: 1)"
    )
    p.add_argument(
        "--ranks", default="auto", metavar="N|auto", help="of this node; auto: one a GPU, else one"
    )
    p.add_argument(
        "--endpoint",
        default="127.0.0.1:0",
        metavar="HOST:PORT",
        help="of the node that holds the store",
    )
    p.add_argument("--id", default="tunesmith", help="of the run, where several share an endpoint")
    p.add_argument("--address", help="of this node (default: that which routes to HOST)")
    p.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="K",
        help="start failed ranks again, at most K times",
    )
    code = "exit code of a run that stopped with all saved (75); 0 for Swarm, which starts any other again"
    p.add_argument("--stopped", type=int, default=EXIT_STOPPED, metavar="CODE", help=code)
    p.add_argument(
        "--debug", action="store_true", help="collect what ranks and NCCL say on every node"
    )
    p.add_argument("words", nargs="+", metavar="-- train RECIPE", help="the command of each rank")
    return p


def run_agent(argv: Sequence[str] | None = None) -> int:
    """Run the agent with these words (None: those of the process) -> exit code; one rank alone does not return."""
    args = parser().parse_args(argv)
    try:
        code = run_node(args)
    except TunesmithError as error:
        print(error.text(), file=sys.stderr)
        code = error.exit_code
    # A caller's signals are its own, and what it starts would inherit that they are ignored
    if argv is None:
        ignore_stop_signals()
    return args.stopped if code == EXIT_STOPPED else code


def run_node(args: argparse.Namespace) -> int:
    """Start the ranks that the parsed flags describe and wait for their end -> exit code."""
    train = args.words[0] == "train"
    out = Path(load_recipe(args.words[1], args.words[2:]).output_dir) if train else None
    ranks = count_gpus() or 1 if args.ranks == "auto" else positive(args.ranks, "--ranks")
    nodes = [positive(word, "--nodes") for word in args.nodes.split(":")]
    if ranks == nodes[-1] == 1 and not args.restarts and not args.debug:
        os.environ[RESTART] = "once"
        os.execv(sys.executable, [sys.executable, "-m", "tunesmith", *args.words])
    return run_program(args, ranks, ["-m", "tunesmith", *args.words], out)


def run_program(
    args: argparse.Namespace, ranks: int, program: Sequence[str], out: Path | None
) -> int:
    """Start `program` (a script or `-m` a module, and its words) as the ranks of this node, and wait -> exit code.

    Args:
        args: the parsed flags, but for `ranks` and `words`.
        out: the run directory, where the ranks tell that they were stopped; None if they do not train.
    """
    host, _, port = args.endpoint.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(
            f"{args.endpoint} is not HOST:PORT", where="--endpoint", fix="--endpoint 10.0.0.1:29500"
        )
    from tunesmith.launch.elastic import ForwardStop, install_agent  # with torch

    before = ended_at(out)
    stop = ForwardStop()
    endpoint = find_endpoint(host.strip("[]"), int(port), args.address)
    prepare_environment(ranks, endpoint.interface)
    store, endpoint = (
        hold_store(endpoint) if endpoint.is_here else (reach_store(endpoint), endpoint)
    )
    register_backend(store, endpoint)
    install_agent(store, stop, is_short=lambda: bool(smaller_after(out, before)))
    launcher = ["--nnodes", args.nodes, "--nproc-per-node", str(ranks), "--rdzv-backend", BACKEND]
    launcher += ["--rdzv-endpoint", endpoint.place, "--local-addr", endpoint.address]
    launcher += ["--max-restarts", str(args.restarts)]
    # Its own handlers would kill ranks that save for longer than half a minute.
    launcher += ["--signals-to-handle", "SIGQUIT"]
    with tempfile.TemporaryDirectory(
        prefix="tunesmith-ranks-"
    ) as folder:  # torch leaves its own behind
        launcher += ["--log-dir", folder, *(say_all(Path(folder)) if args.debug else [])]
        try:
            code = run_ranks([*launcher, "--rdzv-id", args.id, *program], store, stop)
            smaller = "" if stop.asked else smaller_after(out, before)
            if smaller:  # once: then memory is short without it
                before, again = ended_at(out), f"train.micro_batch={smaller}"
                print(f"starting again with {again!r}", file=sys.stderr)
                code = run_ranks(
                    [*launcher, "--rdzv-id", f"{args.id}-again", *program, again], store, stop
                )
        finally:
            if args.debug:
                target, nodes = (
                    (out or Path()) / FOLDER / "debug.tar.gz",
                    int(args.nodes.rpartition(":")[2]),
                )
                end = collect_logs(
                    store,
                    Path(folder),
                    endpoint.address,
                    nodes,
                    target if endpoint.is_here else None,
                )
                print(end, file=sys.stderr)
    if code in (EXIT_FAILED, EXIT_OK) and ended_at(out)[STOPPED] > before[STOPPED]:
        return EXIT_STOPPED
    if stop.asked and code == EXIT_OK and not (out and (out / FINAL).is_dir()):
        return EXIT_STOPPED  # stopped.json is on another node
    return code


def run_ranks(launcher: list[str], store: "TCPStore", stop: "ForwardStop") -> int:
    """torch's elastic launcher with these words -> exit code: that of the rank that failed first.

    `store`: of the ranks of all nodes; `stop`: the stop signals of this process.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as run_elastic

    if os.environ.get("TUNESMITH_DEBUG") != "1":  # the rank that failed has told why
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    kills = oom_kills()
    try:
        run_elastic(parse_args(launcher))
    except ChildFailedError as error:
        return told_exit_code(error, kills, stop)
    except (RendezvousError, RuntimeError) as error:
        why = first_line(error)[:300]
        what = "the launcher of the node that holds the ranks' store is gone"
        if stop.ranks_began and (stop.asked or refuses_connections(store.host, store.port)):
            raise RunError(what, where="rendezvous", why=why, fix=AGAIN, cause="killed") from error
        fix = "start the same command on every node; tunesmith doctor --pair HOST says what stands between them"
        if stop.ranks_began:
            raise RunError(
                f"{what}, or the network to it", where="rendezvous", why=why, fix=fix, cause="link"
            ) from error
        what = "this node and the others do not find each other"
        raise MachineError(what, where="rendezvous", why=why, fix=fix) from error
    return EXIT_OK


def told_exit_code(error: "ChildFailedError", kills: int, stop: "ForwardStop") -> int:
    """1, 2 or 75, as the rank that failed first ended; its own words are on the terminal, unless a signal killed it.

    Args:
        error: of torch's launcher.
        kills: of the kernel for want of memory, before the ranks began.
        stop: the stop signals of this process.
    """
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        if stop.number == -failure.exitcode:  # Python had not loaded the handlers of the rank yet
            raise stop.not_begun("the ranks had just been started")
        name = signal.Signals(-failure.exitcode).name
        kernel = f"; cause: oom-kill: {CAUSES['oom-kill']}" if oom_kills() > kills else ""
        print(f"error: rank {rank} was killed by {name}{kernel}", file=sys.stderr)
    return (
        failure.exitcode
        if failure.exitcode in (EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED)
        else EXIT_FAILED
    )


def ended_at(out: Path | None) -> dict[str, float]:
    """When ranks last wrote stopped.json and failure.json; 0 where there is none."""
    files = {name: out / name for name in (STOPPED, FAILURE)} if out else {}
    written = {name: file.stat().st_mtime for name, file in files.items() if file.exists()}
    return {STOPPED: 0.0, FAILURE: 0.0} | written


def smaller_after(out: Path | None, before: Mapping[str, float]) -> str:
    """The micro batch to go on with where ranks have ended since `before` because memory was short; else empty."""
    for name, written in ended_at(out).items():
        if out and written > before[name]:
            record = json.loads((out / name).read_text(encoding="utf-8"))
            if smaller := record.get("smaller"):
                return str(smaller)
    return ""


def prepare_environment(ranks: int, interface: str) -> None:
    """Variables that each rank needs, unless they are set: threads, the interface to listen on, and beside
    NCCL_IB_HCA the one that joins the functions of a port."""
    # torch's launcher would set 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // ranks)))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, interface)
    if "NCCL_IB_HCA" in os.environ:
        os.environ.setdefault(*MERGE_NICS)
    if os.environ.get("TUNESMITH_DEBUG") != "1":  # torch reads it once, when it is loaded
        os.environ.setdefault(LOG, "ERROR")


def count_gpus() -> int:
    """GPUs that this process may use: those of CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([name for name in named.partition("-1")[0].split(",") if name.strip()])
    return len(list_gpus())


def positive(text: str, where: str) -> int:
    """A count of at least 1; UsageError for any other text."""
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(
            f"{text} is not a whole number of at least 1", where=where, fix=f"{where} 2"
        )
    return int(text)


if __name__ == "__main__":
    sys.exit(run_agent())
