"""Test of runs on real clusters with killed processes and nodes: `tunesmith launch slurm` and
`launch swarm`.

    # kill 20 times on each cluster
    sudo python benchmarks/faults/kills.py slurm --times 20 --json docs/measurements/kills.json
    sudo python benchmarks/faults/kills.py swarm --times 20 --json docs/measurements/kills.json
    # print the table
    python benchmarks/faults/kills.py table --json docs/measurements/kills.json

The test needs root and `make cluster-tools`. It uses the clusters of the tests: two nodes in
network namespaces of one machine, with the real daemons. The run is full fine-tuning of a small
random Llama with one rank per node and a checkpoint every ten steps. A seeded plan selects a rank,
a node agent or an entire node, which is killed with SIGKILL during loading, training or saving.
Then the cluster restarts the run. If it does not, the same command is run again. At the end, all
losses and gradient norms are compared with those of an uninterrupted run.

Results are added to an existing file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/tools"))

# SLOW makes the steps slow, so that polling can see the time between two steps.
from launch.conftest import SLOW

ROOT = Path(__file__).resolve().parents[2]
SLURM_PAIR = ROOT / "tests/tools/launch/slurm_pair.sh"
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
TARGETS, PHASES = ("rank", "agent", "node"), ("loading", "training", "saving")
EVERY = 10  # steps between checkpoints
START = 240.0  # maximum seconds of a start on a busy machine
RANK, AGENT = b"\0tunesmith\0train\0", b"\0tunesmith.launch.node\0"


class Missed(Exception):
    """The condition for a kill, or after a kill, was not met in time."""


def wait_for(
    what: str, condition: Callable[[], Any], seconds: float = START, pause: float = 0.1
) -> Any:
    """Return the first true value of the condition. Raise `Missed` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise Missed(f"timeout after {seconds:.0f} s while waiting for {what}")
        time.sleep(pause)
    return value


def write_inputs(folder: Path) -> None:
    """Write a random Llama of 10 million parameters, and rows."""
    from conftest import write_tiny_llama
    from recipes import write_rows

    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
    }
    write_tiny_llama(folder / "model", **sizes, max_position_embeddings=256)
    write_rows(folder / "train.jsonl", 48)


def recipe_of(model: str, rows: str, out: str) -> dict[str, Any]:
    return {
        "model": {"name": model, "dtype": "fp32"},
        "adapter": {"kind": "none"},
        "parallel": {"replicate": 2},
        "data": {"train": {"source": rows, "format": "prompt-completion"}, "seq_len": 96},
        "train": {
            "duration": "200000 steps", "global_batch": "4 examples", "learning_rate": 1e-4, "schedule": "constant",
            "warmup": "2 steps",
            "compile": "off",
        },
        "checkpoint": {"every": f"{EVERY} steps", "keep": 2},
        "log": {"tensorboard": False, "samples": 0},
        "output_dir": out,
    }  # fmt: skip


def read_records(out: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, without an incomplete last line."""
    with contextlib.suppress(OSError):
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    return []


def newest_checkpoint(out: Path) -> int:
    """Return the step of the newest checkpoint with a manifest. Return 0 if there is none."""
    return max(
        (
            int(file.parent.name.partition("-")[2])
            for file in out.glob("checkpoint-*/manifest.json")
        ),
        default=0,
    )


def processes_in(space: str, marker: bytes) -> list[int]:
    """Return the ids of a namespace's Python processes with the marker in their command line."""
    pids = subprocess.run(
        ["ip", "netns", "pids", space], capture_output=True, text=True, check=False
    ).stdout.split()
    matching = []
    for pid in pids:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            if marker in words and b"python" in words.partition(b"\0")[0]:
                matching.append(int(pid))
    return matching


class Cluster:
    """A cluster of two nodes with one run.

    Attributes:
        outs: the run directories of the nodes, starting with rank 0. A shared directory is listed
            once.
        spaces: the network namespaces of the nodes.
    """

    name = ""
    old_ranks: frozenset[int] = frozenset()  # ids of the ranks' processes at the last kill
    outs: list[Path]
    spaces: list[str]

    def launch(self) -> None:
        """Start or resume the run."""
        raise NotImplementedError

    def state(self) -> str:
        """Return the state of the job in the cluster."""
        raise NotImplementedError

    def log(self) -> str:
        """Return the log of the job."""
        raise NotImplementedError

    def lose(self, node: int) -> None:
        """Power off a node."""
        raise NotImplementedError

    def boot(self, node: int) -> None:
        """Power on a node that was lost."""
        raise NotImplementedError

    def go_on(self) -> str:
        """Wait until the cluster restarts the run, or launch the run again after its end.

        Return which of both happened, as text.
        """
        raise NotImplementedError

    def steps(self) -> int:
        return len(read_records(self.outs[0]))

    def status(self) -> str:
        """Return the output of `tunesmith status` for the run directory."""
        raise NotImplementedError

    def stop(self) -> str:
        """Stop the run. Return the output of `tunesmith stop`."""
        raise NotImplementedError


class SlurmCluster(Cluster):
    """A cluster of two slurmd that share a disk. KillWait is 3 seconds."""

    name = "slurm"

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.job = folder / "pair", folder / "home", ""
        number = str(os.getpid() % 100)
        self.spaces = [f"tunesl{number}-1", f"tunesl{number}-2"]
        self.home.mkdir()
        (self.home / "site").mkdir()
        (self.home / "site/sitecustomize.py").write_text(SLOW)
        write_inputs(self.home)
        self.outs = [self.home / "run"]
        values = recipe_of(
            str(self.home / "model"), str(self.home / "train.jsonl"), str(self.outs[0])
        )
        (self.home / "recipe.yaml").write_text(json.dumps(values))
        self.env = os.environ | {
            "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf"), "SLURMD_TIMEOUT": "20", "KILL_WAIT": "3",
            "XDG_STATE_HOME": str(self.home / "state"),
            "PYTHONPATH": str(ROOT / "src"), "TUNESMITH_HEARTBEAT_SECONDS": "10", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self.run("bash", str(SLURM_PAIR), "up", str(self.folder), number)

    def close(self) -> None:
        self.run("bash", str(SLURM_PAIR), "down", str(self.folder))

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.env, timeout=START, check=False
        )
        if done.returncode:
            raise SystemExit(f"error: {command} failed: {done.stdout}{done.stderr}")
        return done.stdout

    def launch(self) -> None:
        words = (
            "launch",
            "slurm",
            str(self.home / "recipe.yaml"),
            *("--partition", "main", "--gpus-per-node", "0", "--time", "600"),
            *("--setup", "export OMP_NUM_THREADS=1"),
            *("--setup", f"export PYTHONPATH={self.home / 'site'}:$PYTHONPATH"),
            "--nodes",
            "2",
        )
        self.job = (
            self.run(sys.executable, "-m", "tunesmith", *words, "--max-requeues", "100")
            .split()[1]
            .rstrip(";")
        )

    def state(self) -> str:
        shown = self.run("scontrol", "--details", "show", "job", self.job)
        words = [
            re.search(rf"\b{key}=(\S+)", shown) for key in ("JobState", "ExitCode", "Restarts")
        ]
        return " ".join(word[0] for word in words if word)

    def log(self) -> str:
        files = sorted(
            (self.outs[0] / "launch").glob("slurm-*.log"), key=lambda file: file.stat().st_ctime
        )
        return "".join(file.read_text(errors="replace") for file in files)

    def lose(self, node: int) -> None:
        self.run("bash", str(SLURM_PAIR), "crash", str(self.folder), str(node + 1))

    def boot(self, node: int) -> None:
        self.run("bash", str(SLURM_PAIR), "boot", str(self.folder), str(node + 1))

    def queue(self) -> str:
        return self.run(
            "squeue", "--noheader", "--states=all", "--jobs", self.job, "--format=%T"
        ).strip()

    def go_on(self) -> str:
        over = ("PENDING", "FAILED", "NODE_FAIL", "COMPLETED", "CANCELLED", "TIMEOUT")
        if wait_for("the job's end", lambda: self.queue() in over and self.queue()) != "PENDING":
            self.launch()
            return "ended; launched again"
        time.sleep(6)  # until the job's old credential has expired
        self.run("scontrol", "update", f"jobid={self.job}", "StartTime=now")
        return "requeued"

    def status(self) -> str:
        return self.run(
            sys.executable, "-m", "tunesmith", "status", str(self.outs[0])
        ).splitlines()[0]

    def stop(self) -> str:
        return self.run(sys.executable, "-m", "tunesmith", "stop", "--wait", str(self.outs[0]))


class SwarmCluster(Cluster):
    """A cluster of two dockerd without a shared disk."""

    name = "swarm"

    def __init__(self, folder: Path) -> None:
        from launch.swarm_pair import TUNER, UID, Pair, add_host_image, own_environment

        self.pair = Pair(folder / "pair")
        (folder / "pair").mkdir()
        self.pair.__enter__()
        self.spaces = [node.netns for node in self.pair.nodes]
        self.outs = [node.home / "runs/run" for node in self.pair.nodes]
        self.logs = ""
        for node in self.pair.nodes:
            write_inputs(node.home)
            values = recipe_of("./model", "train.jsonl", "runs/run")
            (node.home / "recipe.yaml").write_text(json.dumps(values))
            (node.home / "site").mkdir()
            (node.home / "site/sitecustomize.py").write_text(SLOW)
            more = own_environment({}, f"/home/{TUNER}/site")
            (node.home / "extra.yaml").write_text(json.dumps(more))
            subprocess.run(["chown", "-R", f"{UID}:{UID}", node.home], check=True)
        add_host_image(self.pair.nodes[0])

    def close(self) -> None:
        self.pair.__exit__()

    def tunesmith(self, *words: str, node: int = 0) -> str:
        env = {
            "TUNESMITH_HEARTBEAT_SECONDS": "10",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT / "src"),
        }
        there = self.pair.nodes[node]
        return there.run(
            "python", "-m", "tunesmith", *words, env=env, ok=True, seconds=START
        ).stdout

    def launch(self) -> None:
        flags = ("--image", "bare:1", "--stack-extra", "extra.yaml", "--restarts", "100")
        said = self.tunesmith("launch", "swarm", "recipe.yaml", "--nodes", "2", *flags)
        if "is deployed" not in said:
            raise SystemExit(f"error: `tunesmith launch swarm` deployed no job: {said}")

    def state(self) -> str:
        form = "{{.Node}} {{.CurrentState}} {{.Error}}"
        service = self.pair.nodes[0].docker("service", "ls", "--quiet", ok=True).stdout.strip()
        listed = self.pair.nodes[0].docker(
            "service", "ps", "--no-trunc", "--format", form, service, ok=True
        )
        return "; ".join(listed.stdout.splitlines()[:4])

    def log(self) -> str:
        service = self.pair.nodes[0].docker("service", "ls", "--quiet", ok=True).stdout.strip()
        done = self.pair.nodes[0].docker("service", "logs", "--raw", service, ok=True)
        return done.stdout + done.stderr

    def lose(self, node: int) -> None:
        self.pair.nodes[node].kill()

    def boot(self, node: int) -> None:
        self.pair.nodes[node].start()
        wait_for("both nodes to be ready", self.pair.is_ready)

    def go_on(self) -> str:
        words = json.loads(self.tunesmith("status", "runs/run", "--json"))
        if words[0]["state"] in ("running", "queued"):
            return "restarted by torch or Swarm"
        self.tunesmith("stop", "runs/run")
        self.launch()
        return "ended; launched again"

    def status(self) -> str:
        return self.tunesmith("status", "runs/run").splitlines()[0]

    def stop(self) -> str:
        return self.tunesmith("stop", "runs/run")


def plan(times: int, seed: int) -> list[tuple[str, str, int, float]]:
    """Return target, phase, node and a random fraction of the phase for each kill.

    All pairs of target and phase are used in a random order before a pair is repeated.
    """
    rng = random.Random(seed)
    pairs = [(target, phase) for target in TARGETS for phase in PHASES]
    kills = []
    while len(kills) < times:
        for target, phase in rng.sample(pairs, len(pairs)):
            kills.append((target, phase, rng.randrange(2), rng.random()))
    return kills[:times]


def wait_for_phase(cluster: Cluster, phase: str, share: float) -> None:
    """Wait until the fraction `share` of the phase has passed.

    If the phase is loading, the run must have been started directly before.
    """
    before = cluster.steps()

    def new_ranks_are_there() -> bool:
        return all({*processes_in(space, RANK)} - cluster.old_ranks for space in cluster.spaces)

    wait_for("ranks on both nodes", new_ranks_are_there)
    if phase == "loading":
        time.sleep(6 * share)  # the import of torch takes three seconds
        return
    steps = before + 3 + int(share * 2 * EVERY)
    wait_for(f"step {steps}", lambda: cluster.steps() >= steps)
    if phase == "saving":
        partial = [out / ".checkpoint-*.partial" for out in cluster.outs]
        wait_for(
            "a checkpoint", lambda: any([*p.parent.glob(p.name)] for p in partial), pause=0.002
        )


def kill(cluster: Cluster, target: str, node: int) -> None:
    cluster.old_ranks = frozenset(
        pid for space in cluster.spaces for pid in processes_in(space, RANK)
    )
    if target == "node":
        cluster.lose(node)
        return
    pids = processes_in(cluster.spaces[node], RANK if target == "rank" else AGENT)
    if not pids:
        raise Missed(f"node {node} has no process of a {target} to kill")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def failures(cluster: Cluster, since: float) -> list[dict[str, Any]]:
    """Return the content of the failure.json files that were written after `since`."""
    found = []
    for out in cluster.outs:
        with contextlib.suppress(OSError, ValueError):
            if (out / "failure.json").stat().st_mtime >= since:
                found.append(json.loads((out / "failure.json").read_text()))
    return found


def strike(
    cluster: Cluster, target: str, phase: str, node: int, share: float, *, await_step: bool
) -> dict[str, Any]:
    """Kill one target. Return the results.

    With `await_step`, wait until the resumed run completes a new step.
    """
    first_checkpoint, log_before = newest_checkpoint(cluster.outs[0]), len(cluster.log())
    wait_for_phase(cluster, phase, share)
    at_step, checkpoint = cluster.steps(), newest_checkpoint(cluster.outs[0])
    killed_at, began = time.time(), time.monotonic()
    kill(cluster, target, node)
    reported: list[dict[str, Any]] = []

    def is_reported() -> bool:
        reported[:] = reported or failures(cluster, killed_at)
        return bool(reported)

    with contextlib.suppress(Missed):
        wait_for("failure.json", is_reported, 30)
    if target == "node":
        time.sleep(12)  # until Swarm and the heartbeat have detected the loss
        cluster.boot(node)
    state, status = cluster.state(), cluster.status()
    how = cluster.go_on()
    state_after = cluster.state()
    log = cluster.log()[log_before:]
    reached = max(at_step, cluster.steps())  # ranks can complete more steps before they end
    if await_step:
        wait_for("a new step", lambda: cluster.steps() > reached, START)
    seconds = round(time.monotonic() - began, 1) if await_step else None
    causes = sorted(
        {
            line.removeprefix("  cause: ").partition(":")[0]
            for line in log.splitlines()
            if "  cause: " in line
        }
    )
    errors = [
        line
        for line in log.splitlines()
        if re.match(r"error: |srun: error|the node agent on \S+ received|.* job .*exit code", line)
    ]
    return {
        "cluster": cluster.name, "target": target, "node": node, "phase": phase, "step": at_step,
        "newer_checkpoint": checkpoint > first_checkpoint, "went_on": how, "seconds": seconds,
        "state": state, "state_after": state_after, "status": status, "causes_in_log": causes,
        "failure": [{key: f.get(key) for key in ("what", "cause", "rank", "host", "phase", "where")} for f in reported],
        "log": errors[-12:],
    }  # fmt: skip


def undisturbed(folder: Path, steps: int) -> list[tuple[float, float]]:
    """Train the same run without interruption, with two ranks on this machine.

    Return the loss and the gradient norm of each step.
    """
    write_inputs(folder)
    values = recipe_of(str(folder / "model"), str(folder / "train.jsonl"), str(folder / "whole"))
    values["train"]["duration"] = f"{steps} steps"
    values["checkpoint"]["every"] = "100000 steps"
    (folder / "recipe.yaml").write_text(json.dumps(values))
    words = [
        sys.executable,
        "-m",
        "tunesmith",
        "launch",
        "local",
        str(folder / "recipe.yaml"),
        "--ranks",
        "2",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(words, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return [(record["loss"], record["grad_norm"]) for record in read_records(folder / "whole")]


@contextlib.contextmanager
def started(
    kind: type[SlurmCluster | SwarmCluster],
) -> Iterator[tuple[SlurmCluster | SwarmCluster, Path]]:
    folder = Path(tempfile.mkdtemp(prefix="tunesmith-kills-"))
    folder.chmod(0o755)
    cluster = kind(folder)
    try:
        yield cluster, folder
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


def measure(
    kind: type[SlurmCluster | SwarmCluster], times: int, seed: int, minutes: float, file: Path
) -> None:
    """Kill `times` times, or until `minutes` have passed. Then compare with an uninterrupted run.

    The file is written after each kill.
    """
    kills, deadline = plan(times, seed), time.monotonic() + 60 * minutes
    earlier = json.loads(file.read_text()) if file.exists() else []
    rows: list[dict[str, Any]] = []
    with started(kind) as (cluster, folder):
        cluster.launch()
        for index, (target, phase, node, share) in enumerate(kills):
            if time.monotonic() > deadline:
                break
            next_phase = kills[index + 1][1] if index + 1 < len(kills) else ""
            try:
                rows.append(
                    strike(cluster, target, phase, node, share, await_step=next_phase != "loading")
                )
            except Missed as missed:
                rows.append(
                    {
                        "cluster": cluster.name,
                        "target": target,
                        "node": node,
                        "phase": phase,
                        "missed": str(missed),
                    }
                )
                print(cluster.log()[-3000:], file=sys.stderr)
                file.write_text(json.dumps(earlier + rows, indent=1))
                break
            print(json.dumps(rows[-1]), flush=True)
            file.write_text(json.dumps(earlier + rows, indent=1))
        print(cluster.stop())  # otherwise the run would slow down the uninterrupted run
        records = [
            (record["loss"], record["grad_norm"]) for record in read_records(cluster.outs[0])
        ]
        (folder / "reference").mkdir()
        whole = undisturbed(folder / "reference", len(records))
        for row in rows:
            if "step" in row:
                row["equal"] = records[: row["step"]] == whole[: row["step"]]
        print(f"{len(records)} steps, equal bit for bit: {records == whole}")
        file.write_text(json.dumps(earlier + rows, indent=1))


def table(file: Path) -> None:
    """Print a table with a row for each cluster and target.

    For each phase, a cell shows the seconds until a new step, the causes, and the number of kills.
    """
    rows = [row for row in json.loads(file.read_text()) if "missed" not in row]
    print(f"| cluster | killed | {' | '.join(f'while {phase}' for phase in PHASES)} |")
    print("|---" * (2 + len(PHASES)) + "|")
    for cluster in ("slurm", "swarm"):
        for target in TARGETS:
            cells = []
            for phase in PHASES:
                key = {"cluster": cluster, "target": target, "phase": phase}
                cells.append(summary([row for row in rows if key.items() <= row.items()]))
            if any(cells):
                print(f"| {cluster} | {target} | {' | '.join(cells)} |")


def summary(kills: list[dict[str, Any]]) -> str:
    """Return the text of a cell of the table."""
    if not kills:
        return ""
    seconds = [row["seconds"] for row in kills if row["seconds"] is not None]
    span = (
        f"{min(seconds):.0f} to {max(seconds):.0f} s"
        if seconds
        else "killed again before a new step"
    )
    if len(seconds) == 1:
        span = f"{seconds[0]:.0f} s"
    causes = sorted({failure["cause"] or "none" for row in kills for failure in row["failure"]})
    different = ", losses DIFFER" if any(row["equal"] is False for row in kills) else ""
    return f"{span}; {', '.join(causes) or 'no file'} ({len(kills)}){different}"


def main() -> None:
    """Run the test, or print the table."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=["slurm", "swarm", "table"])
    p.add_argument("--times", type=int, default=20)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--minutes", type=float, default=600, help="start no new kill after this time")
    p.add_argument("--json", type=Path, default=ROOT / "docs/measurements/kills.json")
    a = p.parse_args()
    if a.what == "table":
        table(a.json)
        return
    measure(
        {"slurm": SlurmCluster, "swarm": SwarmCluster}[a.what], a.times, a.seed, a.minutes, a.json
    )


if __name__ == "__main__":
    main()
