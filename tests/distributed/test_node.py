"""The node agent: what it needs of a node, and two nodes of two ranks in network namespaces of
their own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from errors import holds, lines_with, refuses
from namespaces import start_in
from recipes import recipe
from tunesmith.errors import MachineError, UsageError
from tunesmith.launch import node
from tunesmith.launch.rendezvous import find_endpoint, start_store
from waiting import wait_for
from warm import Warm

pytestmark = pytest.mark.slow

TIME = 300  # seconds, on a busy machine


def test_an_endpoint_is_of_this_node_or_of_another():
    here = find_endpoint("127.0.0.1", 0)
    assert (here.is_here, here.interface) == (True, "lo")
    with refuses(MachineError, where="--endpoint", names=["no-such-host.invalid"]):
        find_endpoint("no-such-host.invalid", 1)


def test_a_port_that_is_taken_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with refuses(MachineError, fix=["--endpoint"]) as caught:
            start_store(find_endpoint("127.0.0.1", port))
    assert str(port) in caught.value.where


@pytest.mark.parametrize(
    ("named", "count"), [("0,1,3", 3), ("", 0), ("0,-1,2", 1), ("MIG-a1,MIG-b2", 2)]
)
def test_gpus_are_those_that_the_environment_shows(
    named: str, count: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert node.count_gpus() == count


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"NCCL_IB_HCA": "=rocep1s0f1,roceP2p1s0f1"}, "1"),
        ({"NCCL_IB_HCA": "mlx5", "NCCL_IB_MERGE_NICS": "0"}, "0"),
        ({}, None),
    ],
)
def test_an_agent_joins_the_functions_of_a_port_where_devices_are_named(
    own: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
):
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **own}
    monkeypatch.setattr(os, "environ", environment)
    node.prepare_environment(1, "lo")
    assert environment.get("NCCL_IB_MERGE_NICS") == expected


@pytest.mark.parametrize(
    ("output", "count"),
    [
        ("0, NVIDIA H200, 143771\n1, NVIDIA H200, 143771\n", 2),
        ("0, NVIDIA GB10, [N/A]\n\n", 1),
        ("No devices were found\n", 0),
        ("", 0),
    ],
)
def test_lines_of_nvidia_smi_that_name_no_gpu_are_not_counted(
    output: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{output}END\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert node.count_gpus() == count


def test_an_endpoint_without_a_host_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(tiny, tmp_path)))
    before = signal.getsignal(signal.SIGTERM)
    words = ["--ranks", "2", "--endpoint", "29500", "--", "train", str(file)]
    assert node.run_agent(words) == UsageError.exit_code
    assert signal.getsignal(signal.SIGTERM) is before, (
        "every process that is started later would ignore it too"
    )
    assert "where: --endpoint" in capsys.readouterr().err


@pytest.fixture
def spaces() -> Iterator[list[str]]:
    """Two network namespaces on a cable, 10.91.0.1 and 10.91.0.2."""
    if os.getuid() or not shutil.which("ip"):
        pytest.skip("needs root and iproute2: make cluster-tools")
    names = [f"ts-{os.getpid()}-{i}" for i in (1, 2)]

    def ip(line: str) -> None:
        subprocess.run(["ip", *line.split()], check=True, capture_output=True, timeout=60)

    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add cable0 netns {names[0]} type veth peer name cable0 netns {names[1]}")
        for i, name in enumerate(names, 1):
            ip(f"-n {name} addr add 10.91.0.{i}/24 dev cable0")
            ip(f"-n {name} link set cable0 up")
            ip(f"-n {name} link set lo up")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    finally:
        for name in names:
            subprocess.run(
                ["ip", "netns", "del", name], check=False, capture_output=True, timeout=60
            )


def test_ranks_get_the_words_of_the_command_and_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """All users of a machine see the words of its processes."""
    programs: list[list[str]] = []
    monkeypatch.setattr(
        node, "run_program", lambda args, ranks, program, out: programs.append(program)
    )
    monkeypatch.setenv("HF_TOKEN", "hf_CANARY0123456789")
    words = ["eval", "runs/mine", "--json"]
    node.run_node(node.parser().parse_args(["--ranks", "2", "--", *words]))
    assert programs == [["-m", "tunesmith", *words]]


def test_debug_lets_ranks_and_nccl_say_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "run_program", lambda *words: 0)
    monkeypatch.setenv("NCCL_DEBUG", "TRACE")  # the user's own
    monkeypatch.setenv("TUNESMITH_DEBUG", "0")
    node.run_node(node.parser().parse_args(["--ranks", "2", "--debug", "--", "eval", "runs/mine"]))
    assert (os.environ["TUNESMITH_DEBUG"], os.environ["NCCL_DEBUG"]) == ("1", "TRACE")


def start_agent(space: str, out: Path, tiny: Path, **changes: Any) -> Warm:
    """The agent of one of two nodes with a rank each, in a network namespace; what it says goes to
    `said` in the folder.
    """
    out.mkdir(exist_ok=True)
    file = out / "recipe.yaml"
    values = recipe(tiny, out.parent, held=False, output_dir=str(out / "run"), **changes)
    file.write_text(json.dumps(values))
    options = ["--nodes", "2", "--ranks", "1", "--endpoint", "10.91.0.1:29571"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(out.parent)}
    with (out / "said").open("w") as said:  # no pipe: the agent that is not read would wait
        streams = (None, said.fileno(), said.fileno())
        return Warm(
            [*options, "--", "train", str(file)], program="tunesmith.launch.node",
            prepare=partial(start_in, space), env=environ, streams=streams,
        )  # fmt: skip


@contextmanager
def two_agents(spaces: list[str], tiny: Path, folders: list[Path]) -> Iterator[list[Warm]]:
    """The agents of two nodes whose ranks have trained their first step; killed at the end."""
    changes = {"train": {"duration": "100000 steps"}}
    agents = [start_agent(*pair, tiny, **changes) for pair in zip(spaces, folders, strict=True)]
    try:
        wait_for((folders[0] / "run/metrics.jsonl").exists)
        yield agents
    finally:
        for agent in agents:
            agent.kill()


def test_the_agent_names_a_killed_rank_to_the_other_node_which_blames_no_network(
    spaces: list[str], tiny: Path, tmp_path: Path
):
    folders = [tmp_path / "node1", tmp_path / "node2"]
    with two_agents(spaces, tiny, folders) as agents:
        psutil.Process(agents[1].pid).children()[0].kill()
        codes = [agent.wait(timeout=TIME) for agent in agents]
    said = [(folder / "said").read_text() for folder in folders]
    assert codes == [1, 1], said
    failure = json.loads((folders[0] / "run/failure.json").read_text())
    assert failure["cause"] == "killed", said
    assert holds(failure["what"], "SIGKILL")
    assert (failure["rank"], failure["host"]) == (1, socket.gethostname())
    assert "cause: link" not in said[0]
    assert [line for line in lines_with(said[1], "rank 1", "SIGKILL") if line.startswith("error: ")]


@pytest.mark.nightly
def test_two_nodes_meet_on_the_cable_alone_stop_together(
    spaces: list[str], tiny: Path, tmp_path: Path
):
    """Each node has a disk of its own; SIGTERM to the second node's agent saves on both, and the
    same command goes on.
    """
    changes = {
        "train": {"duration": "100000 steps"},
        "checkpoint": {"every": "1000 steps", "keep": 1},
    }

    def start(number: int) -> Warm:
        return start_agent(spaces[number - 1], tmp_path / f"node{number}", tiny, **changes)

    def said() -> list[str]:
        return [(tmp_path / f"node{number}" / "said").read_text() for number in (2, 1)]

    def steps() -> int:
        file = tmp_path / "node1" / "run" / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    for _ in range(2):
        before, agents = steps(), [start(2), start(1)]  # the one that holds the store comes last
        try:
            deadline = time.monotonic() + TIME
            while steps() < before + 3:
                assert all(agent.poll() is None for agent in agents), said()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            for space, address in zip(spaces, ("10.91.0.1", "10.91.0.2"), strict=True):
                command = ["ip", "netns", "exec", space, "ss", "-Hltn"]
                listening = subprocess.check_output(command, text=True, timeout=60).split("\n")[:-1]
                assert {line.split()[3].rpartition(":")[0] for line in listening} == {address}
            agents[0].send_signal(signal.SIGTERM)
            codes = [agent.wait(timeout=TIME) for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
        assert codes == [75, 75], said()
        assert "checkpoint-" in said()[1]
