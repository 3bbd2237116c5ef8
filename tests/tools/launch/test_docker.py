"""`launch docker`: what the container is given, and runs in a real one."""

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
from launch.conftest import CANARY, TIME, USER, Place, call, uninterrupted
from launch.dockerd import docker_daemon
from launch.swarm_pair import write_bare_image
from recipes import make_run
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, UsageError
from tunesmith.tools.launch import docker
from waiting import wait_for

pytestmark = pytest.mark.long

IMAGE = "tunesmith-test/host"

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
    return docker.create_words(docker.docker_job(run), image, docker.find_mounts(run))


@pytest.mark.parametrize("debug", [True, False])
def test_debug_reaches_the_agent(debug: bool, tiny: Path, tmp_path: Path) -> None:
    run = make_run(tiny, tmp_path, held=False)
    words = docker.create_words(
        docker.docker_job(run), "tunesmith", docker.find_mounts(run), debug=debug
    )
    agent = words[words.index("tunesmith.launch.node") :]
    assert ("--debug" in agent[: agent.index("--")]) is debug


def mounts_in(words: list[str]) -> list[dict[str, str]]:
    """As Docker reads --mount: a line of CSV, each field `key=value` or a key alone."""
    values = [word.removeprefix("--mount=") for word in words if word.startswith("--mount=")]
    rows = [next(csv.reader([value], strict=True)) for value in values]
    return [
        {key: value for key, _, value in (field.partition("=") for field in row)} for row in rows
    ]


def test_the_container_sees_what_the_recipe_names_and_no_more(
    tiny: Path, tmp_path: Path, caches: dict[str, Path]
) -> None:
    run = make_run(tiny, tmp_path)
    found = {mount["source"]: "readonly" in mount for mount in mounts_in(words_of(run))}
    written = {run.output_dir: False, **{str(path): False for path in caches.values()}}
    assert found == written | {
        str(path): True for path in (tiny, tmp_path / "train.jsonl", tmp_path / "held.jsonl")
    }
    assert all(
        mount["source"] == mount["target"] and mount["type"] == "bind"
        for mount in mounts_in(words_of(run))
    )


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
@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
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
        sources = (replace(plain.data.train[0], source=str(rows)),)
        changes = {
            "model": replace(plain.model, name=str(model)),
            "data": replace(plain.data, train=sources),
        }
        run = replace(plain, output_dir=str(out), **changes)
        if not all(name.isprintable() for name in names):
            with refuses(UsageError) as refused:
                words_of(run)
            assert "\\" in refused.value.what, "the name, with its escapes"
            return
        words = words_of(run)
        image = words.index("tunesmith")
        assert {word.partition("=")[0] for word in words[:image]} <= FLAGS
        assert (
            words[image + 1 : -1] == "python -m tunesmith.launch.node --ranks auto -- train".split()
        )
        assert {mount["source"] for mount in mounts_in(words)} == {
            str(p) for p in (rows, model, out, *caches.values())
        }
        assert all(
            {*mount} <= {"type", "source", "target", "readonly"} for mount in mounts_in(words)
        )
        assert sum(word.startswith(("--name=", "--user=")) for word in words) == 2


@pytest.mark.parametrize(
    "image", ["--privileged", "", "a b", "-v=/:/host", "a\n--privileged", "$(id)"]
)
def test_an_image_is_a_name(
    tiny: Path, tmp_path: Path, caches: dict[str, Path], image: str
) -> None:
    with refuses(UsageError, where="--image", names=[repr(image)]):
        words_of(make_run(tiny, tmp_path), image)


@pytest.mark.parametrize("hidden", ["~/.ssh", "~", "/", "/var/run/docker.sock", "/var/run"])
def test_keys_and_docker_itself_are_not_shown(
    tiny: Path,
    tmp_path: Path,
    caches: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    hidden: str,
) -> None:
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    folder = str(Path(hidden).expanduser())
    with refuses(UsageError, where=folder):
        words_of(make_run(tiny, tmp_path, output_dir=folder))


def test_a_home_behind_a_link_is_not_shown_and_folders_of_the_system_may_be(
    tiny: Path, tmp_path: Path, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk" / "home").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("HOME", str(tmp_path / "link" / "home"))
    with refuses(UsageError, where=str(tmp_path / "disk")):
        words_of(make_run(tiny, tmp_path, output_dir=str(tmp_path / "disk")))
    assert words_of(make_run(tiny, tmp_path, output_dir="/run/media/me/disk"))


def test_the_hubs_token_beside_a_cache_is_not_shown(
    tiny: Path, tmp_path: Path, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hub").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "hub" / "token"))
    with refuses(UsageError, names=[tmp_path / "hub" / "token"]):
        words_of(make_run(tiny, tmp_path))


def test_no_secret_is_among_the_words(
    tiny: Path, tmp_path: Path, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {
        "HF_TOKEN": CANARY,
        "WANDB_API_KEY": "canary-1",
        "NCCL_SECRET": "canary-2",
        "WANDB_PROXY": CANARY,
    }
    secrets["HTTPS_PROXY"] = "http://user:canary-3@proxy:8080"
    for name, value in {**secrets, "HTTP_PROXY": "http://proxy:8080", "NCCL_DEBUG": "INFO"}.items():
        monkeypatch.setenv(name, value)
    words = words_of(make_run(tiny, tmp_path))
    assert not [word for word in words if "canary" in word]
    passed = {word for word in words if word.startswith("--env=") and word.count("=") == 1}
    assert {"--env=HTTP_PROXY", "--env=NCCL_DEBUG"} <= passed
    assert not passed & {f"--env={name}" for name in secrets}


@pytest.mark.parametrize(
    ("said", "what", "fix"),
    [
        (
            "Cannot connect to the Docker daemon at unix:///x. Is it running?",
            "Docker is not running",
            "systemctl start docker",
        ),
        (
            "permission denied while trying to connect to the Docker daemon socket",
            "no permission to use Docker",
            "usermod -aG",
        ),
        (
            'could not select device driver "" with capabilities: [[gpu]]',
            "Docker finds no GPU",
            "nvidia-ctk runtime",
        ),
        ("Error: no such image", "no Docker image tunesmith", "docker build -f docker/Dockerfile"),
    ],
)
def test_what_docker_lacks_is_named_with_its_fix(
    tiny: Path,
    tmp_path: Path,
    caches: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    what: str,
    fix: str,
) -> None:
    (tmp_path / "docker").write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match=what) as caught:
        docker.start_container(make_run(tiny, tmp_path), "tunesmith")
    assert fix in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_without_docker(
    tiny: Path, tmp_path: Path, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with refuses(MachineError, where="PATH", names=["docker"]) as caught:
        docker.start_container(make_run(tiny, tmp_path), "tunesmith")
    assert "docker.io" in caught.value.fix


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A daemon whose image IMAGE has no files: its containers get this machine's, with this
    checkout in this environment.
    """
    root = Path(__file__).parents[3]
    places = ["/usr", sys.prefix, sys.base_prefix, str(root)]
    tar = tmp_path_factory.mktemp("image") / "host.tar"
    with docker_daemon(places=places) as env:
        write_bare_image(tar)
        changes = [
            f'ENV PATH="{sys.prefix}/bin:/usr/bin" PYTHONPATH="{root}/src" TORCH_CPP_LOG_LEVEL=ERROR'
        ]
        changes += [f"ENTRYPOINT {json.dumps(['/bin/sh', f'{root}/docker/entrypoint.sh'])}"]
        call(
            env, "docker", "import", *(f"--change={change}" for change in changes), str(tar), IMAGE
        )
        yield env


def metrics(out: Path) -> list[tuple[float, float]]:
    lines = (
        (out / "metrics.jsonl").read_text().splitlines(keepends=True)
        if (out / "metrics.jsonl").exists()
        else []
    )
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(record["loss"], record["grad_norm"]) for record in records]


def names(daemon: dict[str, str]) -> list[str]:
    return call(
        daemon, "docker", "ps", "--all", "--filter=label=tunesmith.run_dir", "--format={{.Names}}"
    ).stdout.split()


def command_lines() -> str:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(found)


@pytest.mark.slow
def test_a_run_in_a_container_stops_resumes_and_leaves_nothing(
    place: Place, daemon: dict[str, str]
) -> None:
    out = place.folder / "run"
    launch = ("launch", "docker", "recipe.yaml", f"--image={IMAGE}")
    process = place.start(*launch)
    wait_for(lambda: len(metrics(out)) > 5, process)
    (name,) = names(daemon)
    inspected = call(daemon, "docker", "inspect", name).stdout
    assert json.loads(inspected)[0]["State"]["Running"]
    assert "/run/secrets/HF_TOKEN" in inspected
    assert CANARY not in inspected + command_lines()
    read = ("docker", "exec", "--user", f"{USER}:{USER}", name, "cat", "/run/secrets/HF_TOKEN")
    assert call(daemon, *read).stdout == CANARY
    assert not list(Path(tempfile.gettempdir()).glob("tunesmith-*/HF_TOKEN"))
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=TIME)[0]
    assert process.returncode == 75, said
    assert lines_with(said, "SIGINT")
    stopped = len(metrics(out))
    assert names(daemon) == []

    process = place.start(*launch)
    wait_for(lambda: len(metrics(out)) > stopped + 5, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=TIME)[0]
    assert process.returncode == 75, said
    assert names(daemon) == []
    assert metrics(out) == uninterrupted(
        place.folder / "model", place.folder, len(metrics(out)), ranks=1
    )
    owners = {(path.lstat().st_uid, path.lstat().st_gid) for path in (out, *out.rglob("*"))}
    assert owners == {(USER, USER)}
    assert CANARY not in "".join(
        path.read_text(errors="replace") for path in out.rglob("*") if path.is_file()
    )


@pytest.mark.slow
def test_a_detached_run_is_seen_followed_and_stopped(place: Place, daemon: dict[str, str]) -> None:
    out = place.folder / "run"
    launch = ("launch", "docker", "recipe.yaml", f"--image={IMAGE}", "--detach")
    said = place.finish(*launch)
    name = said.split()[0]
    assert names(daemon) == [name]
    wait_for(lambda: len(metrics(out)) >= 3)
    assert "running" in place.finish("status", name)
    assert "running" in place.finish("status", str(out))
    check_shown(place.finish(*launch, code=2), where=name)
    assert "step" in place.finish("logs", name)
    follower = place.start("logs", "--follow", str(out))
    place.finish("stop", str(out), "--wait")
    assert lines_with(follower.communicate(timeout=TIME)[0], "SIGTERM")
    state = json.loads(call(daemon, "docker", "inspect", name).stdout)[0]["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 75)
    status = place.finish("status", name)
    assert "stopped" in status or holds(status, 75)
    stopped_at = len(metrics(out))
    # the same command goes on: the ended container makes room
    assert name in place.finish(*launch)
    wait_for(lambda: len(metrics(out)) > stopped_at)
    assert "resum" in place.finish("logs", name)
    call(daemon, "docker", "stop", name)
    assert json.loads(call(daemon, "docker", "inspect", name).stdout)[0]["State"]["ExitCode"] == 75
    call(daemon, "docker", "rm", name)


@pytest.mark.parametrize(
    ("version", "fault"),
    [
        ("2.9.0a0+50eac811a6.nv25.09", "before 26.02"),
        ("2.10.0a0+b4e4ee81d3.nv25.12", "before 26.02"),
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
    (tmp_path / "torch-1.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
    )
    root = Path(__file__).parents[3]
    words = [
        sys.executable,
        "-S",
        str(root / "docker" / "check_torch.py"),
        "before",
        str(tmp_path / "base"),
    ]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        words, cwd=root, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == bool(fault)
    if not fault:
        assert (tmp_path / "base" / "torch.json").is_file()
        return
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert holds(line, f"torch {version}")
    assert fault in line
    assert "--build-arg BASE=nvcr.io/nvidia/pytorch:26.02-py3" in line
