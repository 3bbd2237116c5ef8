"""`launch docker`: what the container is given, what is refused, and runs in a real one."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errors import check_shown, holds, lines_with, refuses
from launch.conftest import CANARY, TIME, USER, Place, call, curve_of, uninterrupted
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


def words_of(run: Run, image: str = "tunesmith", debug: bool = False) -> list[str]:
    return docker.create_words(docker.docker_job(run), image, docker.find_mounts(run), debug=debug)


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
    for debug in (True, False):
        monkeypatch.setattr(docker, "NVIDIA_DEVICE", tmp_path / ("" if debug else "none"))
        words = words_of(run, debug=debug)
        assert ("--gpus=all" in words) is debug
        agent = words[words.index("tunesmith.launch.node") :]
        assert ("--debug" in agent[: agent.index("--")]) is debug


def test_links_out_of_a_model_folder_can_be_followed(
    tiny: Path, tmp_path: Path, caches: dict[str, Path]
) -> None:
    """As those of a snapshot to the blobs of the Hub's cache."""
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    shutil.copytree(tiny, blobs)
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../blobs/{file.name}")
    sources = {mount["source"] for mount in mounts_in(words_of(make_run(snapshot, tmp_path)))}
    assert {str(snapshot), *map(str, blobs.iterdir())} <= sources


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20)
NASTY = [",source=/etc", '","', "--privileged", "a b", "$(id)", "x,readonly", "'", "\n--privileged"]


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=list(HealthCheck), deadline=None)
@given(names=st.lists(TEXT | st.sampled_from(NASTY), min_size=3, max_size=3))
def test_no_value_adds_a_mount_or_a_flag(
    tiny: Path, tmp_path: Path, caches: dict[str, Path], names: list[str]
) -> None:
    """Also of values that a recipe would refuse; one that no word can carry is refused here."""
    plain = make_run(tiny, tmp_path, held=False)
    with tempfile.TemporaryDirectory(dir=tmp_path) as made:
        kinds = zip(("rows", "model", "out"), names, strict=True)
        rows, model, out = (Path(made, kind, f"n{name}") for kind, name in kinds)
        try:
            rows.mkdir(parents=True)
            model.mkdir(parents=True)
        except (OSError, UnicodeError):
            return  # no file can have this name
        data = replace(plain.data, train=(replace(plain.data.train[0], source=str(rows)),))
        named = replace(plain.model, name=str(model))
        run = replace(plain, output_dir=str(out), model=named, data=data)
        if not all(name.isprintable() for name in names):
            with refuses(UsageError) as refused:
                words_of(run)
            assert "\\" in refused.value.what, "the name, with its escapes"
            return
        words = words_of(run)
        image, mounts = words.index("tunesmith"), mounts_in(words)
        assert {word.partition("=")[0] for word in words[:image]} <= FLAGS
        agent = "python -m tunesmith.launch.node --ranks auto -- train".split()
        assert words[image + 1 : -1] == agent
        expected = {str(path) for path in (rows, model, out, *caches.values())}
        assert {mount["source"] for mount in mounts} == expected
        assert all({*mount} <= {"type", "source", "target", "readonly"} for mount in mounts)
        assert sum(word.startswith(("--name=", "--user=")) for word in words) == 2


@pytest.mark.parametrize("image", ["--privileged", "", "a b", "a\n--privileged", "$(id)"])
def test_an_image_is_a_name(
    tiny: Path, tmp_path: Path, caches: dict[str, Path], image: str
) -> None:
    with refuses(UsageError, where="--image", names=[repr(image)]):
        words_of(make_run(tiny, tmp_path), image)


def test_keys_tokens_and_docker_itself_are_not_shown(
    tiny: Path, tmp_path: Path, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`test_swarm_stack.py` has the table of folders."""
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
    names = ("HF_TOKEN", "WANDB_API_KEY", "NCCL_SECRET", "WANDB_PROXY")
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


def command_lines() -> str:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(found)


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
    assert CANARY not in inspected + command_lines()
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
    assert CANARY not in "".join(p.read_text(errors="replace") for p in files if p.is_file())


@pytest.mark.nightly
def test_a_detached_run_is_seen_followed_and_stopped(place: Place, daemon: dict[str, str]) -> None:
    def state() -> dict[str, object]:
        return json.loads(call(daemon, "docker", "inspect", name).stdout)[0]["State"]

    out = place.folder / "run"
    launch = ("launch", "docker", "recipe.yaml", f"--image={IMAGE}", "--detach")
    name = place.finish(*launch).split()[0]
    assert names(daemon) == [name]
    wait_for(lambda: len(curve_of(out)) >= 3)
    assert "running" in place.finish("status", name)
    assert "running" in place.finish("status", str(out))
    check_shown(place.finish(*launch, code=2), where=name)
    assert "step" in place.finish("logs", name)
    follower = place.start("logs", "--follow", str(out))
    place.finish("stop", str(out), "--wait")
    assert lines_with(follower.communicate(timeout=TIME)[0], "SIGTERM")
    assert (state()["Status"], state()["ExitCode"]) == ("exited", 75)
    status = place.finish("status", name)
    assert "stopped" in status or holds(status, 75)
    stopped_at = len(curve_of(out))
    # the same command goes on: the ended container makes room
    assert name in place.finish(*launch)
    wait_for(lambda: len(curve_of(out)) > stopped_at)
    assert "resum" in place.finish("logs", name)
    call(daemon, "docker", "stop", name)
    assert state()["ExitCode"] == 75
    call(daemon, "docker", "rm", name)


@pytest.mark.parametrize(
    ("version", "fault"),
    [
        ("2.9.0a0+50eac811a6.nv25.09", "before 26.02"),
        ("2.16.0", "take an older base"),
        ("2.11.0a0+eb65b36914.nv26.02", ""),
        ("2.15.0", ""),
    ],
)
def test_a_base_whose_torch_does_not_fit_is_said_in_a_line_before_pip_runs(
    version: str, fault: str, tmp_path: Path
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch-1.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
    (tmp_path / "torch-1.dist-info" / "METADATA").write_text(metadata)
    check = (str(ROOT / "docker" / "check_torch.py"), "before", str(tmp_path / "base"))
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-S", *check]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == bool(fault)
    assert (tmp_path / "base" / "torch.json").is_file() or fault
    if fault:
        [line] = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert holds(line, f"torch {version}")
        assert fault in line
