"""`launch docker`: what the container is given, what is refused, and runs in a real one."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from errors import check_shown, holds, lines_with, refuses
from launch.conftest import CANARY, TIME, USER, Place, call, curve_of, holders_of, uninterrupted
from launch.dockerd import docker_daemon
from launch.swarm_pair import write_bare_image
from recipes import make_run
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, UsageError
from tunesmith.tools.launch import docker
from waiting import wait_for

IMAGE, ROOT = "tunesmith-test/host", Path(__file__).parents[3]

# Every flag that `docker create` may be given, and the values that are not paths or names.
FLAGS = {
    "--name", "--label", "--workdir", "--init", "--shm-size", "--ulimit", "--stop-timeout", "--security-opt", "--user",
    "--group-add", "--gpus", "--mount", "--env",
}  # fmt: skip


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    found = {"HF_DATASETS_CACHE": tmp_path / "datasets", "TUNESMITH_CACHE": tmp_path / "cache"}
    for name, path in found.items():
        monkeypatch.setenv(name, str(path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return found | {"HF_HUB_CACHE": tmp_path / "hub"}


def words_of(run: Run, image: str = "tunesmith") -> list[str]:
    return docker.create_words(docker.docker_job(run), image, docker.find_mounts(run), debug=False)


def mounts_in(words: list[str]) -> list[dict[str, str]]:
    """As Docker reads --mount: a line of CSV, each field `key=value` or a key alone."""
    values = [word.removeprefix("--mount=") for word in words if word.startswith("--mount=")]
    rows = [next(csv.reader([value], strict=True)) for value in values]
    return [
        {key: value for key, _, value in (field.partition("=") for field in row)} for row in rows
    ]


def test_the_container_sees_what_the_recipe_names_and_no_more(
    tiny: Path, tmp_path: Path, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tiny, tmp_path)
    mounts = mounts_in(words_of(run))
    found = {mount["source"]: "readonly" in mount for mount in mounts}
    written = [run.output_dir, *map(str, caches.values())]
    read = [str(path) for path in (tiny, tmp_path / "train.jsonl", tmp_path / "held.jsonl")]
    assert found == dict.fromkeys(written, False) | dict.fromkeys(read, True)
    assert all(mount["source"] == mount["target"] and mount["type"] == "bind" for mount in mounts)
    for folder, has_gpu in (("", True), ("none", False)):
        monkeypatch.setattr(docker, "NVIDIA_DEVICE", tmp_path / folder)
        assert ("--gpus=all" in words_of(run)) is has_gpu
    # Links as those of a snapshot to the blobs of the Hub's cache.
    (tmp_path / "snapshot").mkdir()
    for file in tiny.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    linked = mounts_in(words_of(make_run(tmp_path / "snapshot", tmp_path)))
    assert {*map(str, tiny.iterdir())} <= {mount["source"] for mount in linked}


@pytest.mark.parametrize(
    "name", [",source=/etc", '","', "--privileged", "$(id)", "x,readonly", "'", "a\n--privileged"]
)
def test_no_value_adds_a_mount_or_a_flag(
    name: str, tiny: Path, tmp_path: Path, caches: dict[str, Path]
) -> None:
    rows, model = tmp_path / "rows" / f"n{name}", tmp_path / "model" / f"n{name}"
    rows.mkdir(parents=True)
    model.mkdir(parents=True)
    plain, out = make_run(tiny, tmp_path, held=False), str(tmp_path / f"n{name}")
    data = replace(plain.data, train=(replace(plain.data.train[0], source=str(rows)),))
    run = replace(plain, output_dir=out, model=replace(plain.model, name=str(model)), data=data)
    if "\n" in name:  # no word of a mount can carry it
        with refuses(UsageError):
            words_of(run)
        return
    words = words_of(run)
    image, mounts = words.index("tunesmith"), mounts_in(words)
    assert {word.partition("=")[0] for word in words[:image]} <= FLAGS
    agent = "python -m tunesmith.launch.node -- train".split()
    assert words[image + 1 : -1] == agent
    expected = {out, str(rows), str(model), *map(str, caches.values())}
    assert {mount["source"] for mount in mounts} == expected
    assert all({*mount} <= {"type", "source", "target", "readonly"} for mount in mounts)
    with refuses(UsageError, where="--image"):
        words_of(plain, name)


def test_keys_tokens_and_docker_itself_are_not_shown(
    tiny: Path, tmp_path: Path, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in (str(tmp_path / "home" / ".ssh"), "/var/run/docker.sock"):
        with refuses(UsageError, where=folder):
            words_of(make_run(tiny, tmp_path, output_dir=folder))
    assert words_of(make_run(tiny, tmp_path, output_dir="/run/media/me/disk"))
    (tmp_path / "hub").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "hub" / "token"))
    with refuses(UsageError, names=[tmp_path / "hub" / "token"]):
        words_of(make_run(tiny, tmp_path))


def test_no_secret_is_among_the_words(
    tiny: Path, tmp_path: Path, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("HF_TOKEN", "WANDB_API_KEY", "NCCL_SECRET")
    secrets = dict.fromkeys(names, CANARY) | {"HTTPS_PROXY": f"http://user:{CANARY}@proxy:8080"}
    for name, value in {**secrets, "HTTP_PROXY": "http://proxy:8080", "NCCL_DEBUG": "INFO"}.items():
        monkeypatch.setenv(name, value)
    words = words_of(make_run(tiny, tmp_path))
    assert not [word for word in words if "canary" in word]
    passed = {word for word in words if word.startswith("--env=") and word.count("=") == 1}
    assert {"--env=HTTP_PROXY", "--env=NCCL_DEBUG"} <= passed
    assert not passed & {f"--env={name}" for name in secrets}


NO_GPU = 'could not select device driver "" with capabilities: [[gpu]]'
LACKING = {
    "": "docker.io",  # there is no docker
    "Cannot connect to the Docker daemon at unix:///x. Is it running?": "systemctl start docker",
    "permission denied while trying to connect to the Docker daemon socket": "usermod -aG",
    NO_GPU: "nvidia-ctk runtime",
    "Error: no such image": "docker build -f docker/Dockerfile",
}


@pytest.mark.parametrize("said", LACKING)
def test_what_docker_lacks_is_named_with_its_fix(
    tiny: Path, tmp_path: Path, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    if said:
        (tmp_path / "docker").write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
        (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with refuses(MachineError) as caught:
        docker.start_container(make_run(tiny, tmp_path), "tunesmith")
    assert LACKING[said] in caught.value.fix
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A daemon whose image IMAGE has no files: its containers get this machine's, with this
    checkout in this environment.
    """
    tar = tmp_path_factory.mktemp("image") / "host.tar"
    path = f'PATH="{sys.prefix}/bin:/usr/bin" PYTHONPATH="{ROOT}/src"'
    entry = json.dumps(["/bin/sh", f"{ROOT}/docker/entrypoint.sh"])
    changes = [f"--change=ENV {path} TORCH_CPP_LOG_LEVEL=ERROR", f"--change=ENTRYPOINT {entry}"]
    with docker_daemon(places=["/usr", sys.prefix, sys.base_prefix, str(ROOT)]) as env:
        write_bare_image(tar)
        call(env, "docker", "import", *changes, str(tar), IMAGE)
        yield env


def names(daemon: dict[str, str]) -> list[str]:
    label = ("--filter=label=tunesmith.run_dir", "--format={{.Names}}")
    return call(daemon, "docker", "ps", "--all", *label).stdout.split()


@pytest.mark.nightly
def test_a_run_in_a_container_stops_resumes_and_leaves_nothing(
    place: Place, daemon: dict[str, str]
) -> None:
    out = place.folder / "run"
    launch = ("launch", "docker", "recipe.yaml", f"--image={IMAGE}")
    process = place.start(*launch)
    wait_for(lambda: len(curve_of(out)) > 5, process)
    (name,) = names(daemon)
    inspected = call(daemon, "docker", "inspect", name).stdout
    assert json.loads(inspected)[0]["State"]["Running"]
    assert "/run/secrets/HF_TOKEN" in inspected
    assert CANARY not in inspected
    assert holders_of(CANARY, out) == []
    read = ("docker", "exec", "--user", f"{USER}:{USER}", name, "cat", "/run/secrets/HF_TOKEN")
    assert call(daemon, *read).stdout == CANARY
    assert not list(Path(tempfile.gettempdir()).glob("tunesmith-*/HF_TOKEN"))
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        said = process.communicate(timeout=TIME)[0]
        assert process.returncode == 75, said
        assert lines_with(said, number.name)
        assert names(daemon) == []
        if number == signal.SIGINT:
            stopped = len(curve_of(out))
            process = place.start(*launch)
            wait_for(lambda n=stopped: len(curve_of(out)) > n + 5, process)
    steps = len(curve_of(out))
    assert curve_of(out) == uninterrupted(place.folder / "model", place.folder, steps, ranks=1)
    files = [out, *out.rglob("*")]
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in files} == {(USER, USER)}
    assert holders_of(CANARY, out) == []


@pytest.mark.nightly
def test_a_detached_run_is_seen_followed_and_stopped(place: Place, daemon: dict[str, str]) -> None:
    out = place.folder / "run"
    launch = ("launch", "docker", "recipe.yaml", f"--image={IMAGE}", "--detach")
    name = place.finish(*launch).split()[0]
    assert names(daemon) == [name]
    wait_for(lambda: len(curve_of(out)) >= 3)
    assert "running" in place.finish("status", str(out))
    check_shown(place.finish(*launch, code=2), where=name)
    assert "step" in place.finish("logs", name)
    follower = place.start("logs", "--follow", str(out))
    place.finish("stop", str(out), "--wait")
    assert lines_with(follower.communicate(timeout=TIME)[0], "SIGTERM")
    state = json.loads(call(daemon, "docker", "inspect", name).stdout)[0]["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 75)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "fault"),
    [
        ("2.9.0a0+50eac811a6.nv25.09", "before 26.02"),
        ("2.16.0", "take an older base"),
        ("2.11.0a0+eb65b36914.nv26.02", ""),
    ],
)
def test_a_build_ends_where_the_torch_of_its_base_does_not_fit_or_was_replaced(
    version: str, fault: str, tmp_path: Path
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch-1.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
    (tmp_path / "torch-1.dist-info" / "METADATA").write_text(metadata)

    def check(step: str) -> str:
        words = [sys.executable, "-S", ROOT / "docker" / "check_torch.py", step, tmp_path / "base"]
        env = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == done.stderr.startswith("error: ")
        return done.stderr

    said = check("before")
    assert fault in said
    if not fault:
        assert said == check("after") == ""
        (tmp_path / "torch" / "__init__.py").write_text("another")
        said = check("after")
    assert holds(said, f"torch, {version}" if not fault else f"torch {version}")
