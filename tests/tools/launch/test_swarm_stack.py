"""The stack file: what Swarm is asked for, and that no value can ask for more."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from errors import refuses
from recipes import recipe
from tunesmith.cli.main import main
from tunesmith.errors import UsageError
from tunesmith.launch.swarm_job import JOB_LABEL, SERVICE
from tunesmith.tools.launch import deploy
from tunesmith.tools.launch.deploy import variables_of_ranks
from tunesmith.tools.launch.inputs import check_exposed
from tunesmith.tools.launch.stack import Stack
from tunesmith.tools.launch.swarm import SwarmNode

PLAIN = Stack(
    name="swarm-mine", run_dir="/home/u/runs/mine", image="sha256:ab", nodes=2, endpoint="10.0.0.1:29500", restarts=3,
    user=(1000, 1001), cache=("/home/u/.cache/huggingface/hub", "/home/u/.cache/huggingface/datasets"),
)  # fmt: skip


def read(text: str) -> Any:
    """As docker does: YAML 1.1, then `$$` is a dollar sign, and a single one would begin a
    variable.
    """

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
    found = read(
        replace(
            PLAIN, gpus=("NVIDIA_GPU", 1), excluded=("abc",), secrets=(("HF_TOKEN", "mine-1"),)
        ).text()
    )
    service = found["services"][SERVICE]
    assert [*found["services"]] == [SERVICE]
    agent = [
        "--stopped",
        "0",
        "--nodes",
        "2",
        "--endpoint",
        "10.0.0.1:29500",
        "--id",
        "swarm-mine",
        "--restarts",
        "3",
    ]
    recipe = ["--", "train", "/home/u/runs/mine/launch/recipe.yaml"]
    assert service["command"] == ["python", "-m", "tunesmith.launch.node", *agent, *recipe]
    assert service["user"] == "1000:1001"
    # devices, ipc and privileged would be ignored by Swarm
    assert service["environment"]["NVIDIA_MOFED"] == "enabled"
    assert service["environment"]["HF_TOKEN_PATH"] == "/run/secrets/HF_TOKEN"
    assert not {"devices", "ipc", "shm_size", "privileged", "cap_add", "ports", "entrypoint"} & {
        *service
    }
    assert service["networks"] == ["host"]
    assert found["networks"] == {"host": {"external": True, "name": "host"}}
    assert service["ulimits"] == {"memlock": -1, "stack": 67108864}
    assert service["secrets"] == [
        {"source": "HF_TOKEN", "target": "HF_TOKEN", "uid": "1000", "gid": "1001", "mode": 0o400}
    ]
    deploy = service["deploy"]
    assert (deploy["replicas"], deploy["placement"]) == (
        2,
        {"max_replicas_per_node": 1, "constraints": ["node.id!=abc"]},
    )
    assert deploy["restart_policy"] == {"condition": "on-failure", "delay": "5s", "max_attempts": 3}
    assert service["labels"] == deploy["labels"] == {JOB_LABEL: "swarm-mine"}
    wanted = [{"discrete_resource_spec": {"kind": "NVIDIA_GPU", "value": 1}}]
    assert deploy["resources"] == {"reservations": {"generic_resources": wanted}}
    mounted = {volume.get("source"): volume["target"] for volume in service["volumes"]}
    hub, datasets = PLAIN.cache
    assert mounted == {
        PLAIN.run_dir: PLAIN.run_dir,
        hub: "/cache/hub",
        datasets: "/cache/datasets",
        None: "/dev/shm",
    }


def test_no_restarts_are_none_and_not_any_number():
    assert read(replace(PLAIN, restarts=0).text())["services"][SERVICE]["deploy"][
        "restart_policy"
    ] == {"condition": "none"}


LINE = st.text(
    st.characters(exclude_categories=("C", "Z")) | st.sampled_from(" $${}:#&*!|>%@`'\"[],?-=~\\"),
    max_size=30,
)


@pytest.mark.slow
@settings(max_examples=60)
@given(st.data())
def test_no_value_adds_a_mount_a_service_a_variable_or_a_word(data: st.DataObject):
    """Whatever a recipe's paths, the flags and the user's variables hold, it comes out as that one
    value and nothing else.
    """
    draw = lambda: data.draw(LINE)  # noqa: E731
    stack = Stack(
        name=draw(), run_dir=draw(), image=draw(), nodes=2, endpoint=draw(), restarts=1, user=(1, 1), cache=(draw(), draw()),
        gpus=(draw(), 1), excluded=(draw(),), mounts=((draw(), draw()), (draw(), draw())), secrets=(("HF_TOKEN", draw()),),
        environment=(("NCCL_DEBUG", draw()),),
    )  # fmt: skip
    assert read(stack.text()) == stack.values()


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\x1b[2J", "a\u2028b", "a\x85b", "a\0b"])
@pytest.mark.parametrize("field", ["name", "run_dir", "image", "endpoint"])
def test_a_line_break_adds_nothing(field: str, value: str):
    stack = replace(PLAIN, **{field: value})
    assert json.loads(stack.text()) == stack.values()


def test_a_file_of_the_users_adds_mounts_and_variables_and_all_that_is_made_has_our_label(
    tmp_path: Path,
):
    extra = tmp_path / "extra.yaml"
    extra.write_text(
        "services: {ranks: {volumes: [{type: bind, source: /data, target: /data}], environment: {A: b}, command: [true]}}\n"
        "configs: {mine: {file: ./x}}\n"
    )
    plain, found = PLAIN.values(), read(PLAIN.text(extra))
    service = found["services"][SERVICE]
    assert service["volumes"] == [
        *plain["services"][SERVICE]["volumes"],
        {"type": "bind", "source": "/data", "target": "/data"},
    ]
    assert service["environment"] == plain["services"][SERVICE]["environment"] | {"A": "b"}
    assert service["command"] == [True]
    assert found["configs"]["mine"]["labels"] == {JOB_LABEL: "swarm-mine"}
    extra.write_text("- a list\n")
    with refuses(UsageError, where=str(extra)):
        PLAIN.text(extra)


@pytest.mark.swarm
def test_docker_reads_the_same(tmp_path: Path):
    """Docker's own reader, which needs no daemon, with a folder that looks like a variable, a
    mapping and a boolean.
    """
    if shutil.which("docker") is None:
        pytest.skip("lacks docker: make cluster-tools")
    stack = replace(
        PLAIN,
        run_dir="/runs/$HOME ${A:-b} on: yes # no",
        environment=(("NCCL_DEBUG", "on"), ("NCCL_NET", "1_0")),
    )
    command = ["docker", "stack", "config", "--compose-file", "-"]
    done = subprocess.run(
        command,
        input=stack.text(),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"A": "c"},
    )
    if "unknown" in done.stderr or "not a docker command" in done.stderr:
        pytest.skip("this docker has no `stack config`")
    assert done.returncode == 0, done.stderr
    service = YAML(typ="safe", pure=True).load(done.stdout)["services"][SERVICE]
    assert service["volumes"][0]["source"] == stack.run_dir
    assert service["command"][-1] == f"{stack.run_dir}/launch/recipe.yaml"
    assert (service["environment"]["NCCL_DEBUG"], service["environment"]["NCCL_NET"]) == (
        "on",
        "1_0",
    )
    assert json.dumps(service["ulimits"]["memlock"]) == "-1"


@pytest.mark.parametrize(
    "name",
    ["", ".ssh", ".ssh/keys.json", ".docker", ".cache/huggingface", ".cache/huggingface/token"],
)
def test_folders_with_keys_and_tokens_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / ".cache/huggingface/token")
    )
    (tmp_path / "link").symlink_to(tmp_path / name)
    for path in (tmp_path / name, tmp_path / "link"):
        with refuses(UsageError, where=str(path), names=[path]):
            check_exposed(path)
    check_exposed(tmp_path / "runs" / "mine")


def test_a_home_behind_a_link_is_refused_by_both_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "disk" / "home" / ".ssh").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("HOME", str(tmp_path / "link" / "home"))
    for name in ("disk", "disk/home", "disk/home/.ssh", "link/home/.ssh/keys.json"):
        with refuses(UsageError, where=str(tmp_path / name)):
            check_exposed(tmp_path / name)
    check_exposed(tmp_path / "disk" / "home" / "runs")


@pytest.mark.parametrize(
    "path", ["/", "/usr/lib", "/etc/passwd", "/var/run/docker.sock", "/run", "/var", "/home"]
)
def test_the_systems_folders_are_refused(path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/u")
    with refuses(UsageError, where=path):
        check_exposed(Path(path))


def test_two_rendered_stacks_are_alike(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    here = SwarmNode("", "", None)
    monkeypatch.setattr(deploy, "find_nodes", lambda *_: ([here], [], ""))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(tiny, tmp_path, held=False)))
    texts = []
    for _ in range(2):
        assert main(["launch", "swarm", str(tmp_path / "recipe.yaml"), "--render"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert "127.0.0.1:29500" in texts[0]


MERGED = {"NCCL_IB_HCA": "=rocep1s0f1,roceP2p1s0f1", "NCCL_IB_MERGE_NICS": "1"}


@pytest.mark.parametrize(
    ("own", "devices", "expected"),
    [
        ({}, ["rocep1s0f1", "roceP2p1s0f1"], MERGED),
        ({}, [], {}),
        ({"NCCL_IB_HCA": "mlx5"}, [], {"NCCL_IB_HCA": "mlx5", "NCCL_IB_MERGE_NICS": "1"}),
        (
            {"NCCL_IB_MERGE_NICS": "0"},
            ["rocep1s0f1", "roceP2p1s0f1"],
            MERGED | {"NCCL_IB_MERGE_NICS": "0"},
        ),
    ],
)
def test_both_functions_of_a_port_are_used_as_one(
    own: dict[str, str],
    devices: list[str],
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
):
    for name in MERGED:
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    passed = variables_of_ranks(devices)
    assert {name: value for name, value in passed.items() if name.startswith("NCCL_IB")} == expected
