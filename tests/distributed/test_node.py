"""The node agent: what it needs of a node, and two nodes in network namespaces of their own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
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


@pytest.mark.parametrize(("named", "count"), [("0,1,3", 3), ("", 0), ("0,-1,2", 1)])
def test_gpus_are_those_that_the_environment_shows(named, count, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert node.count_gpus() == count


def test_an_endpoint_without_a_host_is_refused(tiny, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(tiny, tmp_path)))
    words = ["--ranks", "2", "--endpoint", "29500", "--", "train", str(file)]
    assert node.run_agent(words) == UsageError.exit_code
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
    monkeypatch.setattr(node, "run_program", lambda args, ranks, program: programs.append(program))
    monkeypatch.setenv("HF_TOKEN", "hf_CANARY0123456789")
    words = ["eval", "runs/mine", "--json"]
    node.run_node(node.parser().parse_args(["--ranks", "2", "--", *words]))
    assert programs == [["-m", "tunesmith", *words]]


def start_agent(space: str, out: Path, tiny: Path, **changes: Any) -> Warm:
    """Start the agent of one of two nodes with a rank each; its output goes to `said`."""
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


def test_the_agent_names_a_killed_rank_to_the_other_node_which_blames_no_network(
    spaces: list[str], tiny: Path, tmp_path: Path
):
    folders = [tmp_path / "node1", tmp_path / "node2"]
    long = {"duration": "100000 steps"}
    agents = [start_agent(*pair, tiny, train=long) for pair in zip(spaces, folders, strict=True)]
    try:
        wait_for((folders[0] / "run/metrics.jsonl").exists)
        psutil.Process(agents[1].pid).children()[0].kill()
        codes = [agent.wait(timeout=TIME) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    said = [(folder / "said").read_text() for folder in folders]
    assert codes == [1, 1], said
    failure = json.loads((folders[0] / "run/failure.json").read_text())
    assert failure["cause"] == "killed", said
    assert holds(failure["what"], "SIGKILL")
    assert (failure["rank"], failure["host"]) == (1, socket.gethostname())
    assert "cause: link" not in said[0]
    assert [line for line in lines_with(said[1], "rank 1", "SIGKILL") if line.startswith("error: ")]
