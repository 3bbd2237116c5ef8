"""`launch swarm` on two real dockerd that share no disk: followed, stopped, one of them lost."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from errors import check_shown, holds
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
)
from recipes import merge, recipe
from waiting import wait_for

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
    """With a model, rows and a recipe in TUNER's homes, and an image on the first node alone."""
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


@pytest.fixture(autouse=True)
def removed_jobs(pair: Pair) -> Iterator[None]:
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
        ours = ("tunesmith.launch", "rsync --server")
        left += [line for line in node.processes() if any(word in line for word in ours)]
    return "".join(left)


def test_it_trains_on_both_goes_on_after_a_node_was_lost_and_either_knows_it(
    pair: Pair, tiny: Path, tmp_path: Path
):
    a, b = pair.nodes
    out = a.home / "runs/whole"
    command = [*TUNESMITH, "launch", "swarm", "recipe.yaml", "output_dir=runs/whole", "--image"]
    refused = a.run(*command, "none:1", ok=True)
    assert refused.returncode == 2
    check_shown(refused.stderr, names=["none:1"])
    assert not (b.home / ".cache/tunesmith").exists(), "nothing was brought"
    launch(a, "whole", "--nodes", "2")
    service = a.docker("service", "ls", "--quiet").stdout.strip()
    seen = [a.docker("service", "inspect", service).stdout]
    look = "id -u; ls -a /home/tuner /home/tuner/.cache /cache; df /dev/shm"
    tell = "cat $HF_TOKEN_PATH /run/secrets/WANDB_API_KEY"
    wait_for(lambda: records_of(out))
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

    wait_for(lambda: len(records_of(out)) >= 35)
    b.kill()
    assert len(records_of(out)) < STEPS
    failure, lost = out / "failure.json", "spark-b sent no heartbeat"
    wait_for(lambda: failure.exists() and lost in failure.read_text())
    b.start()
    wait_for(pair.is_ready)
    again = a.run(*command, "bare:1", ok=True)
    assert again.returncode == 2
    check_shown(again.stderr, where="runs/whole")
    # It ends when the run does.
    log = b.run(*TUNESMITH, "logs", "-f", "runs/whole").stdout
    assert holds(log, "2 ranks", "spark-a, spark-b")
    assert "resum" in log
    assert curve_of(out) == uninterrupted(tiny, tmp_path, STEPS, ranks=2, changes=WHOLE)
    assert status(a, "whole")["state"] == "finished"
    assert "spark-b complete" in status(b, "whole")["text"]
    assert (out / "final/manifest.json").is_file()
    assert (b.home / f"runs/whole/checkpoint-{STEPS}/manifest.json").is_file()
    written = [path for node in pair.nodes for path in (node.home / "runs").rglob("*")]
    files = [path.read_text(errors="replace") for path in written if path.is_file()]
    for text in (*seen, *files, log):
        assert not [canary for canary in CANARY.values() if canary in text]
    b.run(*TUNESMITH, "stop", "runs/whole")
    assert what_is_left(pair) == ""


def test_stop_saves_and_the_other_node_goes_on(pair: Pair, tiny: Path, tmp_path: Path):
    """From the worker, with a model of the Hub; stopped, launched again, short of memory."""
    a, b = pair.nodes
    out = b.home / "runs/stopped"
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
    wait_for(lambda: len(records_of(out)) >= 5)
    stop = b.run(*TUNESMITH, "stop", "runs/stopped")
    assert holds(stop.stderr, "60 minutes")
    assert "stopped: saved" in stop.stdout
    assert what_is_left(pair) == ""
    stopped = json.loads((out / "stopped.json").read_text())
    assert (stopped["step"], stopped["signal"]) == (len(records_of(out)), "SIGTERM")
    launch(b, "stopped", *flags)
    assert status(b, "stopped")["state"] in ("queued", "running")
    wait_for(lambda: len(records_of(out)) >= stopped["step"] + 5)
    available(a.home / "site/root", 100)
    b.run(*TUNESMITH, "logs", "-f", "runs/stopped")
    wait_for(lambda: status(b, "stopped")["state"] == "stopped")
    stopped = json.loads((out / "stopped.json").read_text())
    assert (stopped["step"], stopped["reason"]) == (len(records_of(out)), "memory")
    service = a.docker("service", "ls", "--quiet").stdout.strip()
    tasks = a.docker("service", "ps", "--format", "{{.CurrentState}}", service).stdout
    states = [line.split()[0] for line in tasks.splitlines()]
    assert states == ["Complete"] * 2, "Swarm starts no task again"
    b.run(*TUNESMITH, "stop", "runs/stopped")
    available(a.home / "site/root", 8192)
    whole = uninterrupted(tiny, tmp_path, stopped["step"], ranks=2, changes=WHOLE)
    assert curve_of(out) == whole


@pytest.mark.parametrize(
    ("how", "marker"), [(signal.SIGKILL, "files to"), (signal.SIGTERM, "image to")]
)
def test_a_launcher_that_ends_early_leaves_nothing_on_the_other_node(
    pair: Pair, how: signal.Signals, marker: str
):
    # Another recipe each time, so that there is something to send.
    changes = [f"train.learning_rate={time.monotonic()}", "output_dir=runs/cut"]
    launch = [*TUNESMITH, "launch", "swarm", "recipe.yaml", "--image", "bare:1", *changes]
    command = pair.nodes[0].command(*launch, env=CANARY)
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as outer:
        assert outer.stderr is not None
        assert any(marker in line for line in outer.stderr)
        # Nsenter forks
        inner = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        os.kill(int(inner[0]), how)
        outer.wait(60)
    wait_for(lambda: what_is_left(pair) == "")
    # What was on its way to the other node when the launcher ended may begin there, and end.
    time.sleep(1)
    wait_for(lambda: what_is_left(pair) == "")
