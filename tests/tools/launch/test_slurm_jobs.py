"""Jobs of a real Slurm of two nodes: stopped by a time limit and scancel, a node lost, resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from errors import holds, lines_with
from launch.conftest import FORKING, SLOW, UNENDING, curve_of, holders_of, uninterrupted
from recipes import make_run, recipe
from tunesmith.start.run import train

PAIR = Path(__file__).with_name("slurm_pair.sh")
TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "nsenter", "ip")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
CANARIES = {"HF_TOKEN": "hf_CANARY0123456789", "WANDB_API_KEY": "canary-of-wandb-0123456789"}
LIMIT = 300  # seconds, for two nodes that load torch on a busy machine
missing = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.long,
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}: make cluster-tools"),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]


class Cluster(NamedTuple):
    """The pair, and how its users and its machines' keeper act on it."""

    folder: Path
    home: Path
    env: dict[str, str]

    def run(self, *command: str | Path) -> str:
        options: dict[str, Any] = {"env": self.env, "timeout": LIMIT, "text": True}
        done = subprocess.run([*map(str, command)], capture_output=True, check=False, **options)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def tunesmith(self, *words: str | Path) -> str:
        return self.run(sys.executable, "-m", "tunesmith", *words)

    def pair(self, *words: str) -> str:
        return self.run("bash", PAIR, words[0], self.folder, *words[1:])

    def launch(self, tiny: Path, out: Path, *flags: str, **changes: Any) -> str:
        """Submit a small run; the job's id."""
        out.parent.mkdir(exist_ok=True)
        file = out.parent / "recipe.yaml"
        values = recipe(tiny, out.parent, held=False, output_dir=str(out), **changes)
        file.write_text(json.dumps(values))
        asked = "--partition main --gpus-per-node 1 --time 30 --nodes 2".split()
        for line in (f"PYTHONPATH={self.home / 'site'}:$PYTHONPATH", "OMP_NUM_THREADS=1"):
            asked += ["--setup", f"export {line}"]
        return self.tunesmith("launch", "slurm", file, *asked, *flags).split()[1].rstrip(";")

    def queue(self, job: str) -> str:
        shown = self.run("squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T")
        return shown.strip()

    def show(self, job: str) -> str:
        return self.run("scontrol", "--details", "show", "job", job)

    def wait_for(self, condition: Callable[[], object], out: Path) -> None:
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < deadline, log_of(out)
            time.sleep(0.5)

    def start_again(self, job: str, out: Path) -> None:
        """Let a requeued job run: Slurm 22.05 holds it for two minutes, and its old credential must
        have expired (4 s). A signal that still waits for a lost node would end the new step.
        """

        def is_quiet() -> bool:
            return "REQUEST_SIGNAL_TASKS" not in self.run("sdiag").partition("Pending RPC")[2]

        self.wait_for(lambda: self.queue(job) == "PENDING", out)
        time.sleep(6)
        self.wait_for(is_quiet, out)
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now", "TimeLimit=30")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder, home = tmp_path_factory.mktemp("pair"), tmp_path_factory.mktemp("home")
    for place in (folder, home):
        place.chmod(0o755)
    (home / "site").mkdir()
    (home / "site" / "sitecustomize.py").write_text(SLOW + FORKING)
    env = os.environ | CANARIES | {
        "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf"), "SLURMD_TIMEOUT": "20", "KILL_WAIT": "120",
        "XDG_STATE_HOME": str(home / "state"), "TUNESMITH_HEARTBEAT_SECONDS": "15", "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    cluster = Cluster(folder, home, env)
    cluster.pair("up", str(os.getpid() % 100))
    try:
        yield cluster
    finally:
        cluster.pair("down")


def log_of(out: Path) -> str:
    files = (out / "launch").glob("slurm-*.log")
    return "\n".join(file.read_text(errors="replace") for file in files)


def test_a_job_of_two_nodes_trains_and_no_token_is_anywhere(cluster: Cluster, tiny: Path) -> None:
    # A name that would break a script
    out = cluster.home / "runs" / 'a run\'s `touch made` #1 "x" 100%j'
    train_keys = {"duration": "12 steps", "compile": "off"}
    job = cluster.launch(tiny, out, "--gpus-per-node", "2", "--mem", "1G", train=train_keys)
    cluster.wait_for(lambda: curve_of(out) or "exit code" in log_of(out), out)
    shown = cluster.show(job)
    for canary in CANARIES.values():
        assert canary not in shown
        assert holders_of(canary, cluster.home) == []
    assert "gpu:2" in shown
    followed = cluster.tunesmith("logs", "-f", out)
    assert holds(followed, "4 ranks", "node1, node2")
    assert lines_with(followed, "code 0")
    assert "finished COMPLETED; step 12" in cluster.tunesmith("status", f"slurm-{job}")
    assert (out / "final" / "manifest.json").is_file()
    assert [path for path in cluster.home.rglob("made") if path.name == "made"] == []
    one = {"output_dir": str(out.parent / "one"), "train": train_keys}
    reference = train(make_run(tiny, out.parent, held=False, **one), quiet=True)
    # fp32 on two copies and on one: another order of sums (docs/ranks.md)
    losses = [record.loss for record in reference.records]
    assert [loss for loss, _ in curve_of(out)] == pytest.approx(losses, rel=1e-4)


def test_a_time_limit_a_lost_node_and_scancel_lose_no_step(cluster: Cluster, tiny: Path) -> None:
    """One job: asked to save and requeued, its node lost and requeued, cancelled."""
    out = cluster.home / "long" / "run"
    job = cluster.launch(tiny, out, "--warn-before", "100", **UNENDING)
    cluster.wait_for(lambda: len(curve_of(out)) > 20, out)
    # Slurm gives the warning up to a minute early
    cluster.run("scontrol", "update", f"jobid={job}", "TimeLimit=2")
    cluster.wait_for(lambda: "; requeued," in log_of(out), out)
    assert lines_with(log_of(out), "code 75", 1, 5)
    first = json.loads((out / "stopped.json").read_text())
    assert first["signal"] == "SIGUSR1"
    assert first["step"] == len(curve_of(out)) > 20
    cluster.start_again(job, out)

    # There is a newer checkpoint
    cluster.wait_for(lambda: len(curve_of(out)) > first["step"] + 30, out)
    cluster.pair("crash", "2")
    cluster.wait_for((out / "failure.json").exists, out)
    failure = json.loads((out / "failure.json").read_text())
    assert holds(failure["what"], "rank 1", "node2")
    saved = len(curve_of(out))
    cluster.wait_for(lambda: cluster.queue(job) == "PENDING", out)
    cluster.pair("boot", "2")
    cluster.start_again(job, out)

    cluster.wait_for(lambda: len(curve_of(out)) > saved + 20, out)
    assert log_of(out).count("resuming ") == 2
    cluster.run("scancel", job)
    ended = f"job {job}: exit code 75"  # srun says its own of each task
    cluster.wait_for(lambda: cluster.queue(job) == "CANCELLED", out)
    cluster.wait_for(lambda: log_of(out).count(ended) == 2, out)
    last = json.loads((out / "stopped.json").read_text())
    assert last["step"] == len(curve_of(out)) > saved + 20
    assert "stopped  CANCELLED; saved" in cluster.tunesmith("status", out)
    assert curve_of(out) == uninterrupted(tiny, out.parent, last["step"], ranks=2)  # bit for bit


def trainer_of(out: Path) -> int:
    """The process of the one rank of a run, which has taken over its agent's."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = file.read_bytes().split(b"\0")
            trains = [b"tunesmith", b"train", os.fsencode(out / "launch/recipe.yaml")]
            if b"python" in words[0] and words[2:5] == trains:
                return int(file.parent.name)
    return 0


def test_one_of_two_runs_is_stopped_and_one_is_killed(cluster: Cluster, tiny: Path) -> None:
    runs = {seed: cluster.home / "seeds" / f"run-seed{seed}" for seed in (3, 42)}
    ids = {}
    for seed, folder in runs.items():
        ids[seed] = cluster.launch(tiny, folder, f"train.seed={seed}", "--nodes", "1", **UNENDING)
    for folder in runs.values():
        cluster.wait_for(lambda folder=folder: len(curve_of(folder)) > 2, folder)
    assert curve_of(runs[3])[0] != curve_of(runs[42])[0]
    assert f"slurm-{ids[42]}: " in cluster.tunesmith("stop", runs[42], "--wait")
    assert lines_with(log_of(runs[42]), "code 75")
    assert f"job {ids[3]}: exit " not in log_of(runs[3])
    assert not lines_with(log_of(runs[42]), "code 75", 5), "nor is it queued again"

    os.kill(trainer_of(runs[3]), signal.SIGTERM)  # a rank alone is stopped
    cluster.wait_for(lambda: lines_with(log_of(runs[3]), "code 75; requeued"), runs[3])
    cluster.start_again(ids[3], runs[3])
    before = {*runs[3].glob("checkpoint-*/manifest.json")}
    cluster.wait_for(lambda: {*runs[3].glob("checkpoint-*/manifest.json")} - before, runs[3])
    os.kill(trainer_of(runs[3]), signal.SIGKILL)
    cluster.wait_for(lambda: log_of(runs[3]).count("; requeued,") == 2, runs[3])
    assert lines_with(log_of(runs[3]), "code 137", "SIGKILL")
    cluster.wait_for(lambda: cluster.queue(ids[3]) == "PENDING", runs[3])
    cluster.tunesmith("stop", f"slurm-{ids[3]}", "--wait")
    assert [*runs[3].glob("checkpoint-*/manifest.json")]
