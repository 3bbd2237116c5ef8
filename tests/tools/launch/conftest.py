"""Fixtures for tests of launching: a Docker daemon, the CPU image, and a user who starts containers."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from launch.dockerd import docker_daemon, missing_tools
from ranks import run_ranks
from recipes import make_run, merge, recipe

ROOT = Path(__file__).resolve().parents[3]
KEPT = ROOT / ".docker"  # between runs: Debian with Python, wheels, the daemon's layers
PYTHON, CPU = "tunesmith-test/python", "tunesmith-test/cpu"
USER = 54321  # no line of /etc/passwd has it
CANARY = "hf_canary0123456789"
TIME = 300  # seconds: two starts of torch on a busy machine
CONTEXT = "docker pyproject.toml README.md LICENSE recipes scripts src .dockerignore".split()
# A constant learning rate: a run of any duration takes the same steps.
UNENDING: dict[str, Any] = {
    "train": {"duration": "200000 steps", "compile": "off", "schedule": "constant"},
    "checkpoint": {"every": "30 steps", "keep": 1},
}

MEMINFO = "MemTotal: 16777216 kB\nMemFree: 1048576 kB\nMemAvailable: {kib} kB\nCached: 4194304 kB\n"
# Lets a process and what it becomes read the memory of another place.
FED = """
import os, pathlib
import psutil
import tunesmith.host.memory as memory
read = psutil.virtual_memory
def virtual_memory():
    lines = pathlib.Path(os.environ["FED"], "proc/meminfo").read_text().splitlines()
    total, free, available, cached = (int(line.split()[1]) << 10 for line in lines)
    return read()._replace(
        total=total, free=free, available=available, cached=cached, buffers=0, shared=0
    )
psutil.virtual_memory = virtual_memory
memory.group_limits = lambda *_: []
"""
# Steps of a tenth of a second: hundreds in place of thousands while a cluster takes its time.
SLOW = """
import time
from tunesmith.distributed.heartbeat import Heartbeat
progress = Heartbeat.progress
def slowly(self, step=None):
    time.sleep(0 if step is None else 0.1)
    progress(self, step)
Heartbeat.progress = slowly
"""
# Ranks are forked from their launcher, which has loaded what they load.
FORKING = """
import sys
words = " ".join(sys.orig_argv)
launches = "-m tunesmith.launch.node " in words or "-m accelerate.commands.launch " in words
if launches and "--nodes 1 --ranks 1" not in words:
    import tunesmith.start.run
    from warm import fork_ranks
    fork_ranks()
"""


def available(root: Path, mib: int) -> None:
    (root / "proc").mkdir(parents=True, exist_ok=True)
    (root / "proc/meminfo.new").write_text(MEMINFO.format(kib=mib << 10))
    (root / "proc/meminfo.new").rename(root / "proc/meminfo")


def uninterrupted(
    model: Path, folder: Path, steps: int, ranks: int, changes: dict[str, Any] | None = None
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of UNENDING in one go, on ranks of this machine."""
    whole = merge(UNENDING, merge(changes or {}, {"train": {"duration": f"{steps} steps"}}))
    return run_ranks(ranks, _in_one_go, model, folder, whole)[0]


def _in_one_go(model: Path, folder: Path, changes: dict[str, Any]) -> list[tuple[float, float]]:
    from tunesmith.start.run import train

    run = make_run(model, folder, held=False, output_dir=str(folder / "whole"), **changes)
    return [(record.loss, record.grad_norm) for record in train(run, quiet=True).records]


def records_of(out: Path) -> list[dict[str, Any]]:
    """The records of a run, without a line that is being written."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def curve_of(out: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return [(record["loss"], record["grad_norm"]) for record in records_of(out)]


def holders_of(canary: str, folder: Path) -> list[str]:
    """Where a canary is: command lines of all processes, and files in this folder."""
    found = []
    # os.walk passes over folders that disappear meanwhile; rglob raises.
    files = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    for path in [*Path("/proc").glob("[0-9]*/cmdline"), *files]:
        with suppress(OSError):  # a process that has ended
            if path.is_file() and canary.encode() in path.read_bytes():
                found.append(str(path))
    return found


@pytest.fixture(scope="module")
def daemon() -> Iterator[dict[str, str]]:
    """The environment of a daemon with the image PYTHON, for one process of the tests at a time."""
    if fault := missing_tools():
        pytest.skip(fault)
    if not (KEPT / "python.tar").is_file():
        pytest.skip(f"{KEPT / 'python.tar'} is not there: make cluster-tools")
    with (KEPT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with docker_daemon(KEPT / "data") as env:
            if call(env, "docker", "image", "inspect", PYTHON, check=False).returncode:
                # Bytecode of all packages would take longer than all else of a build.
                made = ("--change", "ENV PIP_COMPILE=0", str(KEPT / "python.tar"), PYTHON)
                call(env, "docker", "import", *made)
            remove_containers(env)  # of a test run that was killed
            yield env


def remove_containers(env: dict[str, str]) -> None:
    for container in call(env, "docker", "ps", "--all", "--quiet").stdout.split():
        call(env, "docker", "rm", "--force", container)


def call(
    env: dict[str, str], *command: str, check: bool = True
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=1200, check=False
    )
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def make_context(wheels: list[Path]) -> Path:
    """What `docker build` is given: the files of the clone, and links to wheels."""
    folder = KEPT / "context"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "wheels")
    for name in CONTEXT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    (folder / "docker/wheels").mkdir()
    for wheel in wheels:
        os.link(wheel, folder / "docker/wheels" / wheel.name)
    return folder


@functools.cache
def builder() -> tuple[str, str]:
    """A docker client, and DOCKER_BUILDKIT for it: 1 where it has BuildKit, which writes each layer
    once; the classic builder writes it four times.
    """
    found = (shutil.which("docker", path=folder) for folder in os.get_exec_path())
    for client in dict.fromkeys(filter(None, found)):
        version = subprocess.check_output([client, "--version"], text=True)
        own = int(version.split()[2].partition(".")[0]) < 23  # later ones have it as a plugin
        plugin = [client, "buildx", "version"]
        if own or not subprocess.run(plugin, capture_output=True, check=False).returncode:
            return client, "1"
    return "docker", "0"


def build(env: dict[str, str], context: Path, file: str, image: str, base: str) -> None:
    client, kit = builder()
    offline = "--force-rm --network none --build-arg PIP_ARGS=--no-index --build-arg".split()
    words = [f"BASE={base}", "-f", str(context / "docker" / file), "-t", image, str(context)]
    call({**env, "DOCKER_BUILDKIT": kit}, client, "build", *offline, *words)


@pytest.fixture(scope="module")
def wheels(daemon: dict[str, str]) -> list[Path]:
    """The wheels of an offline build for the image's Python; fetched when the requirements change."""
    import torch

    if "+cpu" not in torch.__version__:
        pytest.skip(f"the CPU image needs the CPU build of torch, not {torch.__version__}")
    code = "import sys; print(*sys.version_info[:2])"
    version = call(daemon, "docker", "run", "--rm", PYTHON, "python3", "-c", code).stdout
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *extras["nf4"], *extras["gguf"]]
    wanted += [*project["build-system"]["requires"], "--only-binary", ":all:"]
    wanted += ["--python-version", ".".join(version.split())]
    constraints = ROOT / "constraints.txt"
    key = hashlib.sha256(json.dumps(wanted).encode() + constraints.read_bytes()).hexdigest()[:12]
    folder = KEPT / f"wheels-{key}"
    if not folder.is_dir():
        for old in KEPT.glob("wheels-*"):
            shutil.rmtree(old)
        part = KEPT / "wheels-part"
        into = ["download", "-q", "-d", str(part), "-c", str(constraints)]
        call({**os.environ}, sys.executable, "-m", "pip", *into, *wanted)
        part.rename(folder)
    return sorted(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def cpu_image(daemon: dict[str, str], wheels: list[Path]) -> str:
    """The CPU image of this clone, made again when something that it is made of has changed."""
    context = make_context([])
    total = hashlib.sha256(json.dumps([file.name for file in wheels]).encode())
    for file in sorted(path for path in context.rglob("*") if path.is_file()):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        total.update(f"{file.relative_to(context)} {digest}".encode())
    image, base = f"{CPU}:{total.hexdigest()[:12]}", f"{CPU}-base"
    if call(daemon, "docker", "image", "inspect", image, check=False).returncode:
        build(daemon, make_context(wheels), "cpu.Dockerfile", base, PYTHON)
        build(daemon, make_context(wheels), "Dockerfile", image, base)
    return image


class Place:
    """A folder of USER's, and `tunesmith` as that user, with a token in its environment."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        more = {"HF_TOKEN": CANARY, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.env = env | more | {"HOME": str(folder)}
        for name in ("HF_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
            self.env.pop(name, None)

    def start(self, *words: str) -> subprocess.Popen[str]:
        user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
        command = [*user, sys.executable, "-m", "tunesmith", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=self.env, cwd=self.folder, **pipes)  # type: ignore[call-overload]

    def finish(self, *words: str, code: int = 0) -> str:
        process = self.start(*words)
        said = process.communicate(timeout=TIME)[0]
        assert process.returncode == code, said
        return said


@pytest.fixture
def place(daemon: dict[str, str], tiny: Path) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="tunesmith-docker-", dir="/tmp") as made:
        folder = Path(made)
        shutil.copytree(tiny, folder / "model")
        (folder / "recipe.yaml").write_text(
            json.dumps(recipe(folder / "model", folder, held=False, **UNENDING))
        )
        for path in (folder, *folder.rglob("*")):
            os.chown(path, USER, USER)
        found = Place(folder, daemon)
        if found.start("--version").wait(TIME):
            pytest.skip(f"user {USER} may not read {sys.executable}")
        yield found
        remove_containers(daemon)
