"""`launch swarm` on two real dockerd that share no disk: followed, stopped, one of them lost."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from errors import check_shown, error_in, holds, is_at
from launch.conftest import (
    FED,
    FORKING,
    SLOW,
    UNENDING,
    available,
    curve_of,
    records_of,
    uninterrupted,
)
from launch.swarm_pair import (
    TUNER,
    UID,
    Node,
    Pair,
    add_host_image,
    missing_tools,
    own_environment,
    wait_until,
)
from recipes import merge, recipe

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.long,
    pytest.mark.swarm,
    pytest.mark.skipif(bool(missing_tools()), reason=missing_tools() or "-"),
]
TUNESMITH = ("python", "-m", "tunesmith")
# A lost node is said after 10 seconds.
CANARY = {"HF_TOKEN": "hf_CANARYcanary0123456789", "WANDB_API_KEY": "CANARYcanarywandb0123456789"}
STEPS = 90
# A micro batch that cannot be halved: no launcher starts it again where memory is short.
WHOLE = {"train": {"micro_batch": "512 tokens"}, "data": {"seq_len": 512}}


@pytest.fixture(scope="module")
def pair(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """With a model, rows and a recipe in TUNER's home on the first node, and an image there alone."""
    with Pair(tmp_path_factory.mktemp("pair"), gpus=1) as made:
        for node in made.nodes:
            home = node.home
            shutil.copytree(tiny, home / "model")
            values = recipe(
                Path("./model"), home, held=False, output_dir="runs/whole", **merge(UNENDING, WHOLE)
            )
            values["data"]["train"]["source"] = "train.jsonl"
            values["train"]["duration"] = f"{STEPS} steps"
            (home / "recipe.yaml").write_text(json.dumps(values))
            for folder in ("site", "site/root"):  # which the containers see as `memory` says
                (home / folder).mkdir()
            (home / "site/sitecustomize.py").write_text(FED + SLOW + FORKING)
            available(home / "site/root", 8192)
            site = f"/home/{TUNER}/site"
            more = own_environment({"FED": f"{site}/root"}, site)
            (home / "extra.yaml").write_text(json.dumps(more))
            subprocess.run(["chown", "-R", f"{UID}:{UID}", home], check=True)
        (made.nodes[1].home / "model/model.safetensors").unlink()  # it has to be brought
        add_host_image(made.nodes[0])
        yield made


def launch(node: Node, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    flags = ["--image", "bare:1", "--stack-extra", "extra.yaml", f"output_dir=runs/{name}", *words]
    env = {**CANARY, "TUNESMITH_HEARTBEAT_SECONDS": "10", "HF_HUB_OFFLINE": "1"}
    return node.run(*TUNESMITH, "launch", "swarm", "recipe.yaml", *flags, env=env)


@pytest.fixture(scope="module")
def in_one_go(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], list[tuple[float, float]]]:
    """The curve of so many steps on two ranks of this machine that nothing stops."""
    made: list[tuple[float, float]] = []

    def curve_of(steps: int) -> list[tuple[float, float]]:
        if len(made) < steps:
            made[:] = uninterrupted(
                tiny, tmp_path_factory.mktemp("one"), max(steps, STEPS), ranks=2, changes=WHOLE
            )
        return made[:steps]

    curve_of(STEPS)
    return curve_of


@pytest.fixture(autouse=True)
def removed_jobs(pair: Pair) -> Iterator[None]:
    """Remove the job of a test that failed half-way, so that the next test starts without it."""
    yield
    node = pair.nodes[0]
    for kind in ("service", "secret", "config"):
        names = node.docker(kind, "ls", "--quiet").stdout.split()
        if names:
            node.docker(kind, "rm", *names)


def status(node: Node, name: str) -> dict[str, str]:
    return json.loads(node.run(*TUNESMITH, "status", f"runs/{name}", "--json").stdout)[0]


def what_is_left(pair: Pair) -> str:
    """Objects of the swarm, containers and processes of ours, on both nodes."""
    kinds = ("service", "secret", "config")
    left = [pair.nodes[0].docker(kind, "ls", "--quiet").stdout for kind in kinds]
    for node in pair.nodes:
        left.append(node.docker("ps", "--all", "--quiet").stdout)
        left += [
            line
            for line in node.processes()
            if "tunesmith.launch" in line or "rsync --server" in line
        ]
    return "".join(left)


def test_it_trains_on_both_goes_on_after_a_node_was_lost_and_either_knows_it(
    pair: Pair, in_one_go: Callable[[int], list[tuple[float, float]]]
):
    a, b = pair.nodes
    command = [*TUNESMITH, "launch", "swarm", "recipe.yaml", "output_dir=runs/whole", "--image"]
    refused = a.run(*command, "none:1", ok=True)
    assert refused.returncode == 2
    check_shown(refused.stderr, names=["none:1"])
    assert "docker build -f docker/Dockerfile -t none:1 ." in refused.stderr
    assert "spark-b" not in refused.stderr
    assert not (b.home / ".cache/tunesmith").exists(), "nothing was brought"
    launch(a, "whole", "--nodes", "2")
    service = a.docker("service", "ls", "--quiet").stdout.strip()
    seen = [a.docker("service", "inspect", service).stdout]
    look = "id -u; ls -a /home/tuner /home/tuner/.cache /cache; df /dev/shm"
    tell = "cat $HF_TOKEN_PATH /run/secrets/WANDB_API_KEY"
    wait_until("the first step", lambda: records_of(a.home / "runs" / "whole"), 180)
    for node in pair.nodes:
        container = node.docker("ps", "--quiet").stdout.split()
        assert len(container) == 1, "one task a node"
        seen += [node.docker("inspect", *container).stdout, *node.processes()]
        inside = node.docker("exec", container[0], "sh", "-c", look).stdout
        assert inside.startswith(f"{UID}\n")
        assert ".ssh" not in inside
        assert "16777216" in inside  # KiB of /dev/shm
        token = node.docker("exec", container[0], "sh", "-c", tell).stdout
        assert all(canary in token for canary in CANARY.values())
    assert status(b, "whole")["state"] == "running"

    wait_until("a checkpoint", lambda: len(records_of(a.home / "runs" / "whole")) >= 35, 180)
    b.kill()
    assert len(records_of(a.home / "runs" / "whole")) < STEPS
    failure = a.home / "runs/whole/failure.json"
    lost = "spark-b sent no heartbeat"
    wait_until("it is said", lambda: failure.exists() and lost in failure.read_text(), 120)
    b.start()
    wait_until("it is back", pair.is_ready)
    again = a.run(*command, "bare:1", ok=True)
    assert again.returncode == 2
    assert is_at(error_in(again.stderr).where, "runs/whole")
    # It ends when the run does.
    log = b.run(*TUNESMITH, "logs", "-f", "runs/whole", seconds=300).stdout
    assert holds(log, "2 ranks", "spark-a, spark-b")
    assert "resum" in log
    assert "/home/tuner/runs/whole" in log
    assert curve_of(a.home / "runs" / "whole") == in_one_go(STEPS)
    assert status(a, "whole")["state"] == "finished"
    assert "spark-b complete" in status(b, "whole")["text"]
    assert [record["step"] for record in records_of(a.home / "runs" / "whole")] == [
        *range(1, STEPS + 1)
    ]
    assert (a.home / "runs/whole/final/manifest.json").is_file()
    assert (b.home / f"runs/whole/checkpoint-{STEPS}/manifest.json").is_file()
    owned = (a.home / "runs/whole/metrics.jsonl", b.home / "runs/whole")
    assert {path.stat().st_uid for path in owned} == {UID}
    written = [path for node in pair.nodes for path in (node.home / "runs").rglob("*")]
    written += [path for node in pair.nodes for path in (node.home / ".local").rglob("*.json")]
    files = [path.read_text(errors="replace") for path in written if path.is_file()]
    assert len(files) > 20
    for text in (*seen, *files, log):
        assert not [canary for canary in CANARY.values() if canary in text]
    b.run(*TUNESMITH, "stop", "runs/whole")
    assert what_is_left(pair) == ""


def test_stop_saves_and_the_other_node_goes_on(
    pair: Pair, in_one_go: Callable[[int], list[tuple[float, float]]]
):
    """Launched from the worker, with a model of the Hub that its cache alone has; stopped, launched
    again, short of memory.
    """
    a, b = pair.nodes
    cache = b.home / ".cache/huggingface/hub/models--lab--tiny"
    snapshot = cache / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("c" * 40)
    for file in (a.home / "model").iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, cache / "blobs" / digest)
        (snapshot / file.name).symlink_to(f"../../blobs/{digest}")
    subprocess.run(["chown", "-R", f"{UID}:{UID}", b.home / ".cache"], check=True)
    add_host_image(b, "other:1")
    flags = ("--image", "other:1", "--hosts", "spark-a", "model.name=lab/tiny")
    flags += ("train.duration=200000 steps",)
    launch(b, "stopped", *flags)
    brought = a.home / ".cache/huggingface/hub/models--lab--tiny/blobs"
    assert len([*brought.iterdir()]) == len([*snapshot.iterdir()])
    wait_until("steps", lambda: len(records_of(b.home / "runs" / "stopped")) >= 5, 180)
    stop = b.run(*TUNESMITH, "stop", "runs/stopped")
    assert holds(stop.stderr, "60 minutes")
    assert "stopped: saved" in stop.stdout
    assert what_is_left(pair) == ""
    stopped = json.loads((b.home / "runs/stopped/stopped.json").read_text())
    assert (stopped["step"], stopped["signal"]) == (
        len(records_of(b.home / "runs" / "stopped")),
        "SIGTERM",
    )
    launch(b, "stopped", *flags)
    assert status(b, "stopped")["state"] in ("queued", "running")
    wait_until(
        "more steps",
        lambda: len(records_of(b.home / "runs" / "stopped")) >= stopped["step"] + 5,
        180,
    )
    available(a.home / "site/root", 100)
    b.run(*TUNESMITH, "logs", "-f", "runs/stopped", seconds=240)
    wait_until("its end", lambda: status(b, "stopped")["state"] == "stopped")
    stopped = json.loads((b.home / "runs/stopped/stopped.json").read_text())
    assert (stopped["step"], stopped["reason"]) == (
        len(records_of(b.home / "runs" / "stopped")),
        "memory",
    )
    service = a.docker("service", "ls", "--quiet").stdout.strip()
    tasks = a.docker("service", "ps", "--format", "{{.CurrentState}}", service).stdout
    states = [line.split()[0] for line in tasks.splitlines()]
    assert states == ["Complete"] * 2, "Swarm starts no task again"
    assert "spark-a complete" in status(b, "stopped")["text"]
    b.run(*TUNESMITH, "stop", "runs/stopped")
    available(a.home / "site/root", 8192)
    assert curve_of(b.home / "runs" / "stopped") == in_one_go(stopped["step"])


@pytest.mark.parametrize(
    ("how", "marker"),
    [(signal.SIGKILL, "files to"), (signal.SIGKILL, "image to"), (signal.SIGTERM, "image to")],
)
def test_a_launcher_that_ends_early_leaves_nothing_on_the_other_node(
    pair: Pair, how: signal.Signals, marker: str
):
    """Its crash, a closed laptop and a kill, while files or while the image is on its way."""
    a, _ = pair.nodes
    # Another recipe each time, so that there is something to send.
    changes = [f"train.learning_rate={time.monotonic()}", "output_dir=runs/cut"]
    command = a.command(
        *TUNESMITH, "launch", "swarm", "recipe.yaml", "--image", "bare:1", *changes, env=CANARY
    )
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as outer:
        assert outer.stderr is not None
        assert any(marker in line for line in outer.stderr)
        # Nsenter forks
        inner = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        os.kill(int(inner[0]), how)
        outer.wait(60)
    wait_until("nothing is left", lambda: what_is_left(pair) == "", 60)
    # What was on its way to the other node when the launcher ended may begin there, and end.
    time.sleep(1)
    wait_until("nothing is left", lambda: what_is_left(pair) == "", 60)
