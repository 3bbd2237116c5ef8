"""What a run of two nodes does when a part of it fails: torchrun in two network namespaces of this machine, joined by a cable.

    sudo python benchmarks/faults.py                     # every fault, with the heartbeat's default limit
    sudo python benchmarks/faults.py link --seconds 10   # one of them

It needs root, iproute2 and torch; gloo on CPUs, two ranks a node. The ranks take steps of an all-reduce until the fault
comes at step 50, from rank 3 on node-b or from outside. The table has the seconds from the fault to the end of the last
rank and of each launcher, and what each node printed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FAULTS = {
    "kill": "kill -9 of rank 3",
    "stop": "kill -STOP of rank 3",
    "error": "an error in rank 3",
    "hang": "rank 3 stuck, limit of the phase 20 s",
    "link": "the cable between the nodes is cut",
    "agent-b": "kill -9 of the launcher of node-b",
    "agent-a": "kill -9 of the launcher of node-a, which holds the store",
}
NODES = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
PORT = 29555
PATIENCE = 180.0  # seconds that are waited for a launcher


def rank(fault: str) -> None:
    """One rank: announce itself and step 50 on stdout, be struck by the fault."""
    import torch
    import torch.distributed as dist

    from tunesmith.cli.main import framed
    from tunesmith.errors import DataError
    from tunesmith.heartbeat import STUCK
    from tunesmith.ranks import join_ranks
    from tunesmith.signals import StopRequest

    def steps() -> int:
        with StopRequest() as stop, join_ranks() as ranks:
            stop.hold()
            heartbeat = ranks.heartbeat
            heartbeat.on_fault = lambda error, step: print(json.dumps({"told": error.text(), "step": step}), flush=True)
            heartbeat.phase("training", 20 if fault == "hang" else STUCK)
            print(json.dumps({"pid": os.getpid(), "rank": ranks.rank}), flush=True)
            value = torch.ones(1000)
            for step in range(1_000_000):
                dist.all_reduce(value)
                value /= ranks.world
                time.sleep(0.05)
                heartbeat.progress(step)
                if step == 50 and ranks.rank == 3:
                    print(json.dumps({"fault": time.time()}), flush=True)
                    if fault in ("kill", "stop"):
                        os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
                    elif fault == "error":
                        raise DataError("row 7 is broken", where="rows.jsonl:7", fix="correct the row")
                    elif fault == "hang":
                        time.sleep(1000)
        return 0

    sys.exit(framed(steps, process=True))


def sh(command: str) -> None:
    subprocess.run(command, shell=True, check=True)


def connect() -> None:
    """Two namespaces with a network card each, and the cable between the cards."""
    for node in NODES:
        sh(f"ip netns add {node}")
    sh("ip link add card-a netns node-a type veth peer name card-b netns node-b")
    for node, address in NODES.items():
        sh(f"ip -n {node} link set lo up; ip -n {node} addr add {address}/24 dev card-{node[-1]}")
        sh(f"ip -n {node} link set card-{node[-1]} up")


def disconnect() -> None:
    for node in NODES:
        subprocess.run(f"ip netns del {node}", shell=True, capture_output=True, check=False)


def start(node: str, fault: str, seconds: float, log: Path) -> subprocess.Popen[bytes]:
    """A launcher of two ranks; what they print goes to `log`."""
    torchrun = (
        f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-id faults"
        f" --rdzv-endpoint {NODES['node-a']}:{PORT} --rdzv-conf is_host={int(node == 'node-a')} --local-addr {NODES[node]}"
        f" {__file__} --as-rank {fault}"
    )
    env = os.environ | {"GLOO_SOCKET_IFNAME": f"card-{node[-1]}", "TUNESMITH_HEARTBEAT_SECONDS": f"{seconds:g}"}
    env |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    inside = ["ip", "netns", "exec", node, "unshare", "--uts", "sh", "-c", f"hostname {node}; exec {torchrun}"]
    with log.open("wb") as out:
        return subprocess.Popen(inside, stdout=out, stderr=out, env=env, start_new_session=True)


def said(log: Path, key: str) -> list[dict[str, object]]:
    """The lines of JSON with this key in a log."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(f'{{"{key}"')]
    return [json.loads(line[: line.rindex("}") + 1]) for line in lines]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def strike(fault: str, seconds: float, folder: Path) -> None:
    """Run until the fault and to the end of all; print its part of the table."""
    logs = {node: folder / f"{fault}-{node}.log" for node in NODES}
    connect()
    agents = {node: start(node, fault, seconds, log) for node, log in logs.items()}
    pids: list[int] = []
    try:
        while not (struck := said(logs["node-b"], "fault")):
            assert all(agent.poll() is None for agent in agents.values()), logs["node-a"].read_text()
            time.sleep(0.1)
        pids = [int(str(row["pid"])) for log in logs.values() for row in said(log, "pid")]
        assert len(pids) == 4
        began = float(str(struck[0]["fault"]))
        if fault == "link":
            sh("ip -n node-a link set card-a down")
        elif fault.startswith("agent"):
            agents[f"node-{fault[-1]}"].kill()
        ended: dict[str, float] = {}
        while len(ended) < 1 + len(agents) and time.time() - began < PATIENCE:
            if "ranks" not in ended and not any(map(lives, pids)):
                ended["ranks"] = time.time() - began
            for node, agent in agents.items():
                if node not in ended and agent.poll() is not None:
                    ended[node] = time.time() - began
            time.sleep(0.05)
        times = [f"{ended[name]:.1f}" if name in ended else f"> {PATIENCE:.0f}" for name in ("ranks", *NODES)]
        print(f"\n{FAULTS[fault]:<58}ranks {times[0]} s, launcher of node-a {times[1]} s, of node-b {times[2]} s")
        for node, log in logs.items():
            text = log.read_text(errors="replace").splitlines()
            starts = [i for i, line in enumerate(text) if line.startswith("error: ")]
            print(f"  {node}: {len(starts)} printed, {len(said(log, 'told'))} for failure.json")
            for i in starts:
                block = [text[i], *(line for line in text[i + 1 : i + 4] if line.startswith("  "))]
                print("".join(f"    {line}\n" for line in block), end="")
    finally:
        for agent in agents.values():
            agent.kill()
        for pid in pids:
            if lives(pid):
                os.kill(pid, signal.SIGKILL)
        disconnect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"{', '.join(FAULTS)}; none: all of them")
    parser.add_argument("--seconds", type=float, default=60.0, help="without a heartbeat a rank is gone; default 60")
    parser.add_argument("--as-rank", choices=FAULTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        rank(args.as_rank)
    if unknown := [fault for fault in args.faults if fault not in FAULTS]:
        parser.error(f"no fault {unknown[0]!r}; there are {', '.join(FAULTS)}")
    with tempfile.TemporaryDirectory() as folder:
        for fault in args.faults or FAULTS:
            strike(fault, args.seconds, Path(folder))


if __name__ == "__main__":
    main()
