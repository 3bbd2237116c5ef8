"""The stack file: what Swarm is asked for, and that no value can ask for more."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from errors import check_shown, refuses
from invoke import invoke
from recipes import recipe
from tunesmith.errors import UsageError
from tunesmith.launch.swarm_job import JOB_LABEL, SERVICE
from tunesmith.tools.launch.deploy import variables_of_ranks
from tunesmith.tools.launch.inputs import check_exposed
from tunesmith.tools.launch.stack import Stack, read_extra

PLAIN = Stack(
    name="swarm-mine", run_dir="/home/u/runs/mine", image="sha256:ab", nodes=2, endpoint="10.0.0.1:29500", restarts=3,
    user=(1000, 1001), cache=("/home/u/.cache/huggingface/hub", "/home/u/.cache/huggingface/datasets"),
)  # fmt: skip


def read(text: str) -> Any:
    """As docker does: YAML 1.1, then `$$` is a dollar sign; a single one would begin a variable."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        if isinstance(value, str):
            assert "$" not in value.replace("$$", "")
            return value.replace("$$", "$")
        return value

    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)
    return plain(yaml.load(text))


def test_what_swarm_is_asked_for():
    more: dict[str, Any] = {"gpus": ("NVIDIA_GPU", 1), "secrets": (("HF_TOKEN", "mine-1"),)}
    more["mounts"] = (("/data/rows.jsonl", "/given/rows.jsonl"),)
    found = read(replace(PLAIN, excluded=("abc",), **more).text())
    service = found["services"][SERVICE]
    assert [*found["services"]] == [SERVICE]
    agent = "--stopped 0 --nodes 2 --endpoint 10.0.0.1:29500 --id swarm-mine --restarts 3 --"
    words = f"python -m tunesmith.launch.node {agent} train /home/u/runs/mine/launch/recipe.yaml"
    assert service["command"] == words.split()
    assert service["user"] == "1000:1001"
    assert service["environment"]["NVIDIA_MOFED"] == "enabled"
    assert service["environment"]["HF_TOKEN_PATH"] == "/run/secrets/HF_TOKEN"
    assert service["networks"] == ["host"]
    assert found["networks"] == {"host": {"external": True, "name": "host"}}
    assert service["ulimits"] == {"memlock": -1, "stack": 67108864}
    secret = {"source": "HF_TOKEN", "target": "HF_TOKEN", "uid": "1000", "gid": "1001"}
    assert service["secrets"] == [secret | {"mode": 0o400}]
    wanted = [{"discrete_resource_spec": {"kind": "NVIDIA_GPU", "value": 1}}]
    deployed = service["deploy"]
    assert deployed["replicas"] == 2
    assert deployed["placement"] == {"max_replicas_per_node": 1, "constraints": ["node.id!=abc"]}
    assert deployed["restart_policy"]["max_attempts"] == 3
    assert deployed["resources"] == {"reservations": {"generic_resources": wanted}}
    hub, datasets = PLAIN.cache
    volumes = service["volumes"]
    assert {v.get("source"): (v["target"], v.get("read_only", False)) for v in volumes} == {
        PLAIN.run_dir: (PLAIN.run_dir, False),
        hub: ("/cache/hub", False),
        datasets: ("/cache/datasets", False),
        "/data/rows.jsonl": ("/given/rows.jsonl", True),
        None: ("/dev/shm", False),
    }
    unrestarted = read(replace(PLAIN, restarts=0).text())["services"][SERVICE]["deploy"]
    assert unrestarted["restart_policy"] == {"condition": "none"}


@pytest.mark.parametrize("value", ["$HOME ${A:-b}", "on", "a: b # c", "- 'x\"\\", "a\n b: c", ""])
def test_no_value_adds_a_mount_a_service_a_variable_or_a_word(value: str):
    """Whatever a recipe's paths, the flags and the user's variables hold comes out as that value."""
    stack = Stack(
        name=value, run_dir=value, image=value, nodes=2, endpoint=value, restarts=1, user=(1, 1), cache=(value, value),
        gpus=(value, 1), excluded=(value,), mounts=((value, value),), secrets=(("HF_TOKEN", value),),
        environment=(("NCCL_DEBUG", value),),
    )  # fmt: skip
    assert read(stack.text()) == stack.values()


def test_a_file_of_the_users_adds_mounts_and_variables_and_all_that_is_made_has_our_label(
    tmp_path: Path,
):
    extra = tmp_path / "extra.yaml"
    extra.write_text(
        "services: {ranks: {volumes: [{type: bind, source: /data, target: /data}], environment: {A: b}, command: [true]}}\n"
        "configs: {mine: {file: ./x}}\n"
    )
    plain, found = PLAIN.values()["services"][SERVICE], read(PLAIN.text(read_extra(extra)))
    service = found["services"][SERVICE]
    added = {"type": "bind", "source": "/data", "target": "/data"}
    assert service["volumes"] == [*plain["volumes"], added]
    assert service["environment"] == plain["environment"] | {"A": "b"}
    assert service["command"] == [True]
    assert found["configs"]["mine"]["labels"] == {JOB_LABEL: "swarm-mine"}
    extra.write_text("- a list\n")
    with refuses(UsageError, where=str(extra)):
        read_extra(extra)


@pytest.mark.nightly
@pytest.mark.swarm
def test_docker_reads_the_same():
    """Docker's own reader, with a folder that looks like a variable, a mapping and a boolean."""
    if shutil.which("docker") is None:
        pytest.skip("lacks docker: make cluster-tools")
    variables = {"NCCL_DEBUG": "on", "NCCL_NET": "1_0"}
    run_dir = "/runs/$HOME ${A:-b} on: yes # no"
    stack = replace(PLAIN, run_dir=run_dir, environment=tuple(variables.items()))
    command = ["docker", "stack", "config", "--compose-file", "-"]
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": os.environ | {"A": "c"}}
    done = subprocess.run(command, input=stack.text(), check=False, **options)
    assert done.returncode == 0, done.stderr
    service = YAML(typ="safe", pure=True).load(done.stdout)["services"][SERVICE]
    assert service["volumes"][0]["source"] == run_dir
    assert service["command"][-1] == f"{run_dir}/launch/recipe.yaml"
    assert service["environment"].items() >= variables.items()
    assert json.dumps(service["ulimits"]["memlock"]) == "-1"


@pytest.mark.parametrize("name", ["", ".ssh/keys.json", ".docker", ".cache/huggingface/token"])
def test_folders_with_keys_and_tokens_are_refused_by_every_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    home = tmp_path / "disk" / "home"
    home.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "other").symlink_to(home / name)
    monkeypatch.setenv("HOME", str(tmp_path / "link" / "home"))
    token = str(home / ".cache/huggingface/token")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", token)
    for path in (home / name, tmp_path / "link/home" / name, tmp_path / "other", tmp_path / "disk"):
        with refuses(UsageError, where=str(path), names=[path]):
            check_exposed(path)
    for path in ("/", "/usr/lib", "/etc/passwd", "/var/run/docker.sock"):
        with refuses(UsageError, where=path):
            check_exposed(Path(path))
    check_exposed(home / "runs" / "mine")


def test_a_stack_is_rendered_without_docker_and_mistakes_are_found_before_it_is_asked(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no-socket")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(tiny, tmp_path, held=False)))
    (tmp_path / "extra.yaml").write_text("services: {rank: {volumes: []}}")
    words = ("launch", "swarm", tmp_path / "recipe.yaml")
    done = invoke(*words, "--render", "--nodes", "2")
    assert done.code == 0, done.err
    assert done.out == invoke(*words, "--render", "--nodes", "2").out
    service = json.loads(done.out)["services"][SERVICE]
    assert service["deploy"]["replicas"] == 2
    assert f"{socket.gethostname()}:29500" in service["command"]
    own = ("--hosts", "127.0.0.1")
    check_shown(invoke(*words, *own).err, where="--hosts", names=["127.0.0.1"])
    mistyped = ("--stack-extra", tmp_path / "extra.yaml")
    check_shown(invoke(*words, *mistyped).err, names=["rank"], fix=[SERVICE])


MERGED = {"NCCL_IB_HCA": "=rocep1s0f1,roceP2p1s0f1", "NCCL_IB_MERGE_NICS": "1"}
BOTH = ["rocep1s0f1", "roceP2p1s0f1"]


@pytest.mark.parametrize(
    ("own", "devices", "expected"),
    [
        ({}, BOTH, MERGED),
        ({}, [], {}),
        ({"NCCL_IB_MERGE_NICS": "0"}, BOTH, MERGED | {"NCCL_IB_MERGE_NICS": "0"}),
    ],
)
def test_both_functions_of_a_port_are_used_as_one(
    own: dict[str, str],
    devices: list[str],
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(os, "environ", own)
    passed = variables_of_ranks(devices)
    assert {name: value for name, value in passed.items() if name.startswith("NCCL_IB")} == expected
