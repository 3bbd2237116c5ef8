"""Measurement of faults in a run on two nodes: `tunesmith train` under torchrun in two network
namespaces.

    # cause each fault four times
    sudo python benchmarks/faults/faults.py --times 4 --json docs/measurements/faults.json
    # cause one fault, with the default heartbeat limit
    sudo python benchmarks/faults/faults.py link --seconds 60
    # print the table
    python benchmarks/faults/faults.py --table docs/measurements/faults.json

The measurement needs root, iproute2 and util-linux. Two nodes with two ranks each are connected by
a switch. The ranks use gloo on CPUs. The run is full fine-tuning of a small Llama, with two
replicas of two shards, and a sharded checkpoint every 10 steps. A fault is caused from outside
while the ranks train; the code of the ranks is unchanged. When all ranks have ended, the same
command resumes the run until the next fault. The last resume completes the run. Then its records
and weights are compared with those of an uninterrupted run.

Results are added to an existing file. With `--keep`, an interrupted measurement continues.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parity"))

NODES = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
PORT = 29555
RANKS = 2  # ranks per node
STEPS, EVERY, GAP = (
    160,
    10,
    25,
)  # steps of a run, steps between checkpoints, minimum of steps between faults
# Maximum seconds for a start, and for a launcher to end after its ranks
START, LEFT = (
    150.0,
    20.0,
)
COMPARED = (
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "supervised_tokens",
    "examples",
    "epoch",
)


def sh(command: str, *, check: bool = True) -> None:
    subprocess.run(command, shell=True, check=check, capture_output=not check)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Pair:
    """Two nodes connected by a switch. Each node is a network namespace with a network card and a
    launcher of two ranks.

    With `own_disks`, each node has its own disk of `MIB` MiB at the run directory.
    """

    MIB = 96

    def __init__(self, folder: Path, name: str, seconds: float, *, own_disks: bool = False) -> None:
        self.folder, self.name, self.seconds, self.own_disks = folder, name, seconds, own_disks
        self.spaces = {
            space: f"faults-{folder.name}-{name}-{space}" for space in ("switch", *NODES)
        }
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        self.starts = 0

    def __enter__(self) -> Pair:
        switch = self.spaces["switch"]
        for space in self.spaces.values():  # remains of a killed measurement
            sh(f"ip netns del {space}", check=False)
        sh(f"ip netns add {switch} && ip -n {switch} link add switch type bridge")
        sh(f"ip -n {switch} link set switch up")
        for node, address in NODES.items():
            card, port, space = f"card-{node[-1]}", f"port-{node[-1]}", self.spaces[node]
            sh(
                f"ip netns add {space} && ip link add {card} netns {space} type veth peer name {port} netns {switch}"
            )
            sh(f"ip -n {space} link set lo up && ip -n {space} addr add {address}/24 dev {card}")
            sh(f"ip -n {space} link set {card} up")
            sh(f"ip -n {switch} link set {port} master switch && ip -n {switch} link set {port} up")
            self.disk(node).mkdir(parents=True, exist_ok=True)
            if self.own_disks:
                sh(
                    f"mountpoint -q {self.disk(node)} || mount -t tmpfs -o size={self.MIB}m faults {self.disk(node)}"
                )
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for pid in (*self.ranks().values(), *(agent.pid for agent in self.agents.values())):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for agent in self.agents.values():
            agent.wait()
        for space in self.spaces.values():
            sh(f"ip netns del {space}", check=False)
        # Keep the disks after an exception, because an interrupted measurement can continue.
        for node in NODES if self.own_disks and not kind else ():
            sh(f"umount -l {self.disk(node)}", check=False)

    def disk(self, node: str) -> Path:
        """Return the path of a node's run directory outside the network namespace."""
        return self.folder / self.name / (f"disk-{node}" if self.own_disks else "run")

    def log(self, node: str, start: int) -> Path:
        return self.folder / self.name / f"start-{start}-{node}.log"

    def cable(self, state: str) -> None:
        """Set the link between node-b and the switch to the state `down` or `up`."""
        sh(f"ip -n {self.spaces['switch']} link set port-b {state}")

    def start(self, options: str, sysctl: str = "") -> None:
        """Start the launchers of both nodes.

        The placeholders {host}, {rank}, {head} and {port} of `options` are replaced for each node.
        """
        run = self.folder / self.name / "run"
        run.mkdir(parents=True, exist_ok=True)
        for number, (node, address) in enumerate(NODES.items()):
            torchrun = (
                f"{sys.executable} -m torch.distributed.run --nproc-per-node {RANKS} --local-addr {address}"
                f" {options.format(host=int(not number), rank=number, head=NODES['node-a'], port=PORT)}"
                f" -m tunesmith train {self.folder}/recipe.yaml output_dir={run}"
            )
            prepare = [f"hostname {node}", *([f"sysctl -qw {sysctl}"] if sysctl else [])]
            prepare += [f"mount --bind {self.disk(node)} {run}"] if self.own_disks else []
            inside = f"unshare --uts --mount sh -c {shlex.quote(' && '.join([*prepare, 'exec ' + torchrun]))}"
            env = os.environ | {
                "GLOO_SOCKET_IFNAME": f"card-{node[-1]}", "TUNESMITH_HEARTBEAT_SECONDS": f"{self.seconds:g}",
                "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }  # fmt: skip
            with self.log(node, self.starts).open("wb") as out:
                command = ["ip", "netns", "exec", self.spaces[node], *shlex.split(inside)]
                self.agents[node] = subprocess.Popen(
                    command, stdout=out, stderr=out, env=env, start_new_session=True
                )
        self.starts += 1

    def runs(self) -> bool:
        return any(agent.poll() is None for agent in self.agents.values())

    def ranks(self) -> dict[int, int]:
        """Return the process id of each rank whose launcher is still running."""
        found = {}
        for agent in self.agents.values():
            with contextlib.suppress(OSError):
                for child in (
                    Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
                ):
                    if rank := re.search(
                        rb"\0RANK=(\d+)\0", Path(f"/proc/{child}/environ").read_bytes()
                    ):
                        found[int(rank[1])] = int(child)
        return found

    def records(self) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl, without an incomplete last line."""
        with contextlib.suppress(OSError):
            lines = (self.disk("node-a") / "metrics.jsonl").read_text().splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]
        return []

    def wait_for_step(self, step: int) -> None:
        deadline = time.time() + START
        while not (self.records() and self.records()[-1]["step"] >= step):
            if time.time() > deadline or not self.runs():
                logs = "\n".join(
                    self.log(node, self.starts - 1).read_text(errors="replace")[-3000:]
                    for node in NODES
                )
                raise SystemExit(
                    f"error: {self.name} did not reach step {step}; the ends of the logs:\n{logs}"
                )
            time.sleep(0.02)

    def failure(self) -> dict[str, dict[str, Any]]:
        """Return the content of failure.json by node."""
        files = {node: self.disk(node) / "failure.json" for node in NODES}
        return {node: json.loads(file.read_text()) for node, file in files.items() if file.exists()}

    def printed(self, node: str) -> list[str]:
        """Return the error messages in a node's log of the last start."""
        text = (
            self.log(node, self.starts - 1)
            .read_text(errors="replace")
            .replace(f"{self.folder / self.name}/", "")
        )
        lines = text.splitlines()
        starts = [i for i, line in enumerate(lines) if line.startswith(("error: ", "stopped by "))]
        return [
            "\n".join([lines[i], *(x for x in lines[i + 1 : i + 4] if x.startswith("  "))])
            for i in starts
        ]


def signal_rank(number: int) -> Callable[[Pair], None]:
    return lambda pair: os.kill(pair.ranks()[3], number)


def signal_launcher(node: str, number: int) -> Callable[[Pair], None]:
    return lambda pair: pair.agents[node].send_signal(number)


def lose_node(pair: Pair) -> None:
    """Disconnect node-b, and kill its launcher and its ranks."""
    pair.cable("down")
    for pid in (
        *(pid for rank, pid in pair.ranks().items() if rank >= RANKS),
        pair.agents["node-b"].pid,
    ):
        os.kill(pid, signal.SIGKILL)


def fill_disk(pair: Pair) -> None:
    """Fill the disk of node-b with another file."""
    with (
        contextlib.suppress(OSError),
        (pair.disk("node-b") / "filler").open("wb", buffering=0) as file,
    ):
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


def free_disk(pair: Pair) -> None:
    (pair.disk("node-b") / "filler").unlink()


DYNAMIC = "--nnodes 2 --rdzv-backend c10d --rdzv-id faults --rdzv-endpoint {head}:{port} --rdzv-conf is_host={host}"
STATIC = "--nnodes 2 --node-rank {rank} --master-addr {head} --master-port {port}"
ELASTIC = DYNAMIC.replace("--nnodes 2", "--nnodes 1:2 --max-restarts 3")
ELASTIC += ",last_call_timeout=10,keep_alive_interval=1,keep_alive_max_attempt=3"


@dataclass(frozen=True)
class Fault:
    """A fault, and the options of the run in which it is caused.

    Attributes:
        what: description of the fault.
        strike: causes the fault.
        heal: repairs the damage before the next start.
        options: options of torchrun.
        sysctl: kernel setting of the nodes, as KEY=VALUE.
        own_disks: whether each node has its own disk.
        goes_on: whether torchrun restarts the ranks, so that the run is not started again.
        loses_node: whether the run continues with only the ranks of node-a.
        after: maximum seconds to wait for the launchers after the ranks have ended.
    """

    what: str
    strike: Callable[[Pair], None]
    heal: Callable[[Pair], None] = field(default=lambda pair: None)
    options: str = DYNAMIC
    sysctl: str = ""
    own_disks: bool = False
    goes_on: bool = False
    loses_node: bool = False
    after: float = LEFT


def cut(options: str, what: str, sysctl: str = "", after: float = LEFT) -> Fault:
    down, up = (lambda pair: pair.cable("down")), (lambda pair: pair.cable("up"))
    return Fault(
        f"the cable of node-b is pulled{what}",
        down,
        up,
        options=options,
        sysctl=sysctl,
        after=after,
    )


FAULTS = {
    "kill": Fault("kill -9 of rank 3", signal_rank(signal.SIGKILL)),
    "stop": Fault("kill -STOP of rank 3", signal_rank(signal.SIGSTOP)),
    "link": cut(DYNAMIC, ""),
    "link-static": cut(STATIC, ", launchers with --node-rank and --master-addr"),
    "link-retries": cut(DYNAMIC, ", net.ipv4.tcp_retries2=8", "net.ipv4.tcp_retries2=8", 180.0),
    "term": Fault("SIGTERM to rank 3 alone", signal_rank(signal.SIGTERM)),
    "disk": Fault("the disk of node-b is full, where each node has its own", fill_disk, free_disk, own_disks=True),
    "launcher-b": Fault("kill -9 of the launcher of node-b", signal_launcher("node-b", signal.SIGKILL)),
    "launcher-a": Fault("kill -9 of the launcher of node-a, which holds the store", signal_launcher("node-a", signal.SIGKILL)),
    "term-launcher": Fault("SIGTERM to the launcher of node-b", signal_launcher("node-b", signal.SIGTERM)),
    "ctrl-c": Fault("ctrl-C at the terminal of node-a's launcher", signal_launcher("node-a", signal.SIGINT)),
    "restart": Fault(
        "kill -9 of rank 3, --max-restarts", signal_rank(signal.SIGKILL), options=f"{DYNAMIC} --max-restarts 9", goes_on=True
    ),
    "node": Fault(
        "node-b is lost, --nnodes 1:2", lose_node, lambda pair: pair.cable("up"), options=ELASTIC, goes_on=True, loses_node=True
    ),
}  # fmt: skip


def write_recipe(folder: Path) -> None:
    from selfcheck import write_inputs

    write_inputs(folder, 64)
    recipe = {
        "model": {"name": str(folder / "model"), "dtype": "fp32"}, "adapter": {"kind": "none"},
        "data": {"train": {"source": str(folder / "rows.jsonl"), "format": "prompt-completion"}, "seq_len": 256},
        "train": {"duration": f"{STEPS} steps", "global_batch": "8 examples", "micro_batch": "256 tokens",
                  "learning_rate": 1e-3, "compile": "off"},
        "parallel": {"replicate": "auto", "shard": 2}, "checkpoint": {"every": f"{EVERY} steps"},
        "log": {"tensorboard": False, "samples": 0},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))


def wait_for_end(pair: Pair, pids: dict[int, int], began: float, after: float) -> dict[str, float]:
    """Return the seconds from `began` to the end of all ranks and of each launcher.

    Processes that do not end in time are killed and are missing in the result.
    """
    ended: dict[str, float] = {}
    while len(ended) < 1 + len(NODES):
        now = time.time() - began
        if "ranks" not in ended and not any(map(lives, pids.values())):
            ended["ranks"] = now
        for node, agent in pair.agents.items():
            if node not in ended and agent.poll() is not None:
                ended[node] = now
        if now > ended.get("ranks", 60 + 3 * pair.seconds) + after:
            break
        time.sleep(0.02)
    for pid in (
        *pids.values(),
        *(agent.pid for agent in pair.agents.values() if agent.poll() is None),
    ):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return {name: round(seconds, 2) for name, seconds in ended.items()}


def whole_steps(pair: Pair) -> list[int]:
    """Return the steps of the complete checkpoints on node-a's disk."""
    from tunesmith.checkpoint.manifest import find_damage, list_checkpoints

    found = list_checkpoints(pair.disk("node-a"))
    return [step for step in found if find_damage(found[step]) is None]


def strike(fault: Fault, pair: Pair, last: int) -> dict[str, Any]:
    """Cause the fault GAP steps after the step `last`, and wait until all ranks have ended.

    Return the results.
    """
    pair.wait_for_step(last + GAP)
    pids, step = pair.ranks(), pair.records()[-1]["step"]
    assert len(pids) == 2 * RANKS, pids
    # Count earlier messages, because a launcher that restarts ranks continues its log.
    earlier = {node: len(pair.printed(node)) for node in NODES}
    began = time.time()
    fault.strike(pair)
    if not fault.goes_on:
        found: dict[str, Any] = {"seconds": wait_for_end(pair, pids, began, fault.after)}
        found |= {
            "codes": {node: agent.wait() for node, agent in pair.agents.items()},
            "failure.json": pair.failure(),
        }
    else:
        while any(map(lives, pids.values())):
            time.sleep(0.02)
        ended = round(time.time() - began, 2)
        found = {"failure.json": pair.failure()}  # before the restarted ranks delete it
        pair.wait_for_step(
            pair.records()[-1]["step"] + 1
        )  # only the restarted ranks can reach this step
        found |= {
            "seconds": {"ranks": ended, "goes on": round(time.time() - began, 2)},
            "ranks": len(pair.ranks()),
        }
    printed = {node: pair.printed(node)[earlier[node] :] for node in NODES}
    return found | {"step": step, "printed": printed, "whole checkpoints": whole_steps(pair)}


def compare(run: Path, whole: Path) -> dict[str, Any]:
    """Compare a resumed run with an uninterrupted run."""
    from safetensors.torch import load_file

    steps = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (run, whole)
    ]
    curves = [[[record[name] for name in COMPARED] for record in records] for records in steps]
    weights = [load_file(next((out / "final").glob("*.safetensors"))) for out in (run, whole)]
    assert len(curves[0]) == len(curves[1]), [len(curve) for curve in curves]
    return {
        "steps": len(curves[0]),
        "examples a step": sorted({record["examples"] for record in steps[0]}),
        "largest relative difference of the loss": max(
            abs(a["loss"] / b["loss"] - 1) for a, b in zip(*steps, strict=True)
        ),
        "largest difference of a weight": max(
            float((weights[0][n] - t).abs().max()) for n, t in weights[1].items()
        ),
        "equal bit for bit": curves[0] == curves[1],
    }


def measure(
    name: str, pair: Pair, times: int, whole: Path, entry: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Cause the fault until `entry` has `times` results. Then complete the run, and add its
    comparison with the uninterrupted run `whole`.

    `entry` is yielded after each result, so that an interrupted measurement can continue.
    """
    fault = FAULTS[name]
    while len(entry["times"]) < times:
        # The next start may remove records after the last checkpoint.
        last = max((record["step"] for record in pair.records()), default=0)
        if not pair.runs():
            pair.start(fault.options, fault.sysctl)
        entry["times"].append(strike(fault, pair, last))
        fault.heal(pair)
        yield entry
        if fault.loses_node:  # node-b is needed for the next fault
            end(pair, stop=True)
    if not pair.runs():
        pair.start(fault.options, fault.sysctl)
    entry["codes at the end"] = end(pair)
    entry["resumed"] = compare(pair.disk("node-a"), whole)
    yield entry


def run_whole(folder: Path) -> Path:
    """Return the run directory of an uninterrupted run. Train it if it does not exist yet."""
    if not (folder / "whole" / "run" / "final").exists():
        with Pair(folder, "whole", 60) as pair:
            pair.start(DYNAMIC)
            codes = end(pair)
            assert [*codes.values()] == [0, 0], pair.log("node-a", 0).read_text()[-3000:]
    return folder / "whole" / "run"


def end(pair: Pair, *, stop: bool = False) -> dict[str, int]:
    """Wait for the end of the run. With `stop`, request it with the file `stop`.

    Return the exit codes of the launchers.
    """
    if stop:
        (pair.disk("node-a") / "stop").touch()
    return {node: agent.wait(2 * START) for node, agent in pair.agents.items()}


def rows(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of results."""
    yield "| fault | heartbeat limit | all ranks have ended after | exit codes of the launchers | failure.json | resumed run |"
    yield "|---|---|---|---|---|---|"
    for entry in found["faults"].values():
        times = entry["times"]

        def spread(key: str, times: list[dict[str, Any]] = times) -> str:
            seconds = [run["seconds"][key] for run in times if run["seconds"].get(key) is not None]
            if not seconds:
                return f"more than {LEFT:.0f} s"
            if len(seconds) == 1:
                return f"{seconds[0]:.1f} s"
            return f"{min(seconds):.1f} to {max(seconds):.1f} s"

        messages = {f["what"] for run in times for f in run["failure.json"].values()} or {"none"}
        ended = [[run["codes"][node] for node in NODES] for run in times if "codes" in run] or [
            [*entry["codes at the end"].values()]
        ]
        codes = sorted(
            {"; ".join("killed" if code < 0 else str(code) for code in pair) for pair in ended}
        )
        resumed, loss = (
            entry["resumed"],
            entry["resumed"]["largest relative difference of the loss"],
        )
        equal = "equal" if resumed["equal bit for bit"] else f"losses within {loss:.0e}"
        after = spread("ranks")
        if "goes on" in times[0]["seconds"]:
            after += f"; {times[0]['ranks']} ranks continue after {spread('goes on')}"
        yield (
            f"| {entry['what']} | {entry['heartbeat_seconds']:g} s | {after} | {', '.join(codes)} |"
            f" {'; or '.join(sorted(messages))} | {equal} |"
        )


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "faults", nargs="*", metavar="FAULT", help=f"default: all of {', '.join(FAULTS)}"
    )
    p.add_argument(
        "--seconds", type=float, default=60.0, help="heartbeat limit in seconds (default: 60)"
    )
    p.add_argument("--times", type=int, default=1, help="how often each fault is caused")
    p.add_argument("--json", type=Path, help="add the results to this file")
    p.add_argument("--table", type=Path, help="only print the table of this file of results")
    p.add_argument(
        "--keep", type=Path, help="folder of the runs and logs (default: a temporary folder)"
    )
    a = p.parse_args()
    if a.table:
        print("\n".join(rows(json.loads(a.table.read_text()))))
        return
    if unknown := [fault for fault in a.faults if fault not in FAULTS]:
        p.error(f"unknown fault {unknown[0]!r}; choose from {', '.join(FAULTS)}")
    # Exit with cleanup, so that the command `timeout` leaves no namespaces behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    found = json.loads(a.json.read_text()) if a.json and a.json.exists() else {"faults": {}}
    with contextlib.ExitStack() as stack:
        folder = a.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "recipe.yaml").exists():
            write_recipe(folder)
        for name in a.faults or FAULTS:
            whole = run_whole(folder)
            key, new = (
                f"{name}, {a.seconds:g} s",
                {"what": FAULTS[name].what, "heartbeat_seconds": a.seconds, "times": []},
            )
            entry = found["faults"].get(key, new)
            entry = new if "resumed" in entry else entry
            with Pair(
                folder, f"{name}-{a.seconds:g}", a.seconds, own_disks=FAULTS[name].own_disks
            ) as pair:
                for found["faults"][key] in measure(name, pair, a.times, whole, entry):
                    print(json.dumps(found["faults"][key]), flush=True)
                    if a.json:
                        a.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
