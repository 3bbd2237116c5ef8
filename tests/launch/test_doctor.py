"""`tunesmith doctor`: its words, a recipe's model, the figures of a link, what goes into a script.

No root is needed.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from errors import holds
from hub.standin import Repo, StandIn
from launch.spark_pair import TORCH
from tunesmith.errors import MachineError
from tunesmith.host.chips import peak_of
from tunesmith.launch.doctor import checks, speed
from tunesmith.launch.doctor.checks import examine
from tunesmith.launch.doctor.fix import PARTS, cable_addresses, fix_scripts
from tunesmith.launch.doctor.system import FAULT, OK, TEXTS, VERSIONS, Finding, System, finding

ROOM = Path(speed.__file__).parent
DOCS = Path(__file__).parents[2] / "docs"


def literals(file: Path) -> str:
    return "\n".join(
        node.value
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def test_each_finding_is_used_and_what_is_wrong_has_a_mend() -> None:
    code = "\n".join(literals(file) for file in ROOM.glob("*.py"))
    for key, (level, what, _, fix) in TEXTS.items():
        check, case = key.split("/", 1)
        assert level in ("ok", "warning", "fault")
        assert what
        assert bool(fix) == (level != "ok"), key
        assert key in code or (
            f"{check}/" in code and (check in ("ssh", "versions") or case in code.split())
        ), key


def test_the_page_names_every_check() -> None:
    page = (DOCS / "doctor.md").read_text()
    listed = set(re.findall(r"^\| ([\w.-]+) \|", page, re.M)) - {"check"}
    assert listed == {key.partition("/")[0] for key in TEXTS}


def test_what_runs_on_the_other_node_needs_nothing_but_python(tmp_path: Path) -> None:
    """The checks' imports are of the standard library and of each other."""
    for name in ("system", "checks", "speed"):
        tree = ast.parse((ROOM / f"{name}.py").read_text(), feature_version=(3, 9))
        found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        found |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        others = {m for m in found if m and m.partition(".")[0] not in sys.stdlib_module_names}
        assert others <= {"tunesmith.launch.doctor.system"}


def test_torch_is_found_beside_a_source_tree_that_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "torch-2.11.0.dist-info").mkdir()
    (tmp_path / "torch-2.11.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.11.0\n")
    command, env = (
        [sys.executable, "-S", "-c", VERSIONS],
        os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == {"tunesmith": "", "torch": "2.11.0"}


def doctor(*words: str, **env: str) -> dict:
    """The report of a process of its own.

    Without docker and GPUs: they are other machines' business here.
    """
    path = os.pathsep.join(
        p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "docker").exists()
    )
    full = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"PATH": path} | env
    command = [sys.executable, "-m", "tunesmith", "doctor", *words, "--json"]
    done = subprocess.run(
        command, env=full, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] == (done.returncode == 0)
    return report


def named(report: dict, check: str) -> tuple[str, str, str]:
    return next(
        (f["level"], f["what"], f["fix"]) for f in report["findings"] if f["check"] == check
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(
        "model: {name: someone/model}\ndata: {train: {source: rows.jsonl, format: text}}\noutput_dir: out\n"
    )
    (file.parent / "rows.jsonl").write_text('{"text": "a"}\n')
    return file


@pytest.fixture
def hub() -> Iterator[StandIn]:
    files = {"config.json": b"{}", "model.safetensors": b"x" * 1000}
    with StandIn({"someone/model": Repo(files)}) as served:
        yield served


SMI = """#!/bin/sh
case "$*" in
  *clocks.sm*) echo '[N/A], 3003, [Not Supported], P0' ;;
  *) printf 'NVIDIA GB10, GPU-a, {driver}, {capability}, {memory}\\n\\n' ;;
esac
"""


@pytest.mark.parametrize("missing", ["[N/A]", "[Not Supported]", "[Insufficient Permissions]"])
def test_figures_that_nvidia_smi_does_not_give(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither driver, compute capability, memory nor clock is a reason to fail; torch stands in for
    one with CUDA.
    """
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI.format(driver=missing, capability=missing, memory=missing))
    smi.chmod(0o755)
    state = {"cuda": "13.0", "archs": ["sm_120"], "tflops": 91, "fails": ""}
    (tmp_path / "torch.json").write_text(json.dumps(state))
    (tmp_path / "packages" / "torch").mkdir(parents=True)
    (tmp_path / "packages" / "torch" / "__init__.py").write_text(TORCH)
    (tmp_path / "packages" / "torch-2.13.0.dist-info").mkdir()
    (tmp_path / "packages" / "torch-2.13.0.dist-info" / "METADATA").write_text(
        "Name: torch\nVersion: 2.13.0\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("SPARK_STATE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    report = examine(System(), pair=False)
    level, what = named(report, "driver")[:2]
    assert (level, what.count(missing)) == (OK, 2)
    assert holds(what, "1 x NVIDIA GB10")
    level, what = named(report, "torch")[:2]
    assert level == OK
    assert holds(what, "torch 2.13.0", "CUDA 13.0")
    assert what.endswith("sm_?")
    assert named(report, "clock")[0] == OK
    assert named(report, "memory")[0] in ("ok", "warning", FAULT)


@pytest.mark.slow
def test_a_model_that_is_open(recipe: Path, hub: StandIn, tmp_path: Path) -> None:
    report = doctor(
        str(recipe), HF_HOME=str(tmp_path), HF_ENDPOINT=hub.url, HF_TOKEN="hf_abcdefghijklmn"
    )
    level, what, fix = named(report, "licence")
    assert (level, fix) == ("ok", "")
    assert holds(what, "someone/model", "apache-2.0")
    assert named(report, "room")[0] == "ok"


@pytest.mark.slow
def test_a_gated_model_without_a_token(recipe: Path, hub: StandIn, tmp_path: Path) -> None:
    hub.repos["someone/model"].gated = True
    report = doctor(str(recipe), HF_HOME=str(tmp_path), HF_ENDPOINT=hub.url)
    assert named(report, "token")[0] == "warning"
    assert "hf auth login" in named(report, "token")[2]
    level, what, fix = named(report, "licence")
    assert level == "fault"
    assert holds(what, "someone/model", "gated")
    assert f"{hub.url}/someone/model" in fix
    assert not report["passed"]


def test_a_model_that_is_larger_than_the_disk(
    recipe: Path, hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from tunesmith.config.schema import Model
    from tunesmith.launch.doctor import access

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmn")

    class Sibling:
        rfilename, size = "model.safetensors", 1 << 50

    class Info:
        sha, card_data, siblings = "main", None, [Sibling]

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: Info)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: None)
    found = {f.check: f for f in access.check_model(Model(name="someone/model"))}
    assert found["room"].level == FAULT
    assert "takes 1048576.0 GiB" in found["room"].what


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached(recipe: Path, tmp_path: Path) -> None:
    report = doctor(
        str(recipe),
        HF_HOME=str(tmp_path),
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_TOKEN="hf_abcdefghijklmn",
    )
    level, what, fix = named(report, "hub")
    assert level == "fault"
    assert holds(what, "Hub", "someone/model")
    assert "HTTPS_PROXY" in fix
    assert "hf_abcdefghijklmn" not in json.dumps(report)


@pytest.mark.slow
def test_a_machine_without_gpu_and_docker(tmp_path: Path) -> None:
    report = doctor(HF_HOME=str(tmp_path))
    assert {f["check"] for f in report["findings"]} == {"driver", "torch", "memory", "disk"}
    assert report["passed"]


def test_a_link_is_measured(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Over loopback, both ends in threads: the bytes that arrived, in a time that the limit bounds."""
    monkeypatch.setattr(speed, "SECONDS", 0.3)
    monkeypatch.setattr("signal.alarm", lambda seconds: 0)
    monkeypatch.setattr(sys, "argv", ["-", "127.0.0.1"])
    server = threading.Thread(target=speed.serve_speed)
    server.start()
    said = ""
    while "\n" not in said:
        said += capfd.readouterr().out
    gbs, trip, idle = speed.measure_speed("127.0.0.1", int(said.split()[0]))
    server.join(30)
    assert not server.is_alive()
    assert gbs > 0
    assert trip > 0
    assert 0 <= idle <= 1


@pytest.mark.parametrize(
    ("gbs", "idle", "cable", "level", "words"),
    [
        (0.02, 0.9, True, "fault", "not the cable"),
        (0.11, 0.9, False, "warning", "ranks that share gradients will wait"),
        (1.7, 0.9, True, "warning", "plugged in while the machines ran"),
        (2.8, 0.9, True, "ok", "at 3: unplug both for 30 s"),
        (0.02, 0.1, True, "ok", "bound by busy CPUs"),
        (1.7, 0.9, False, "ok", "GB/s"),
    ],
)
def test_what_a_figure_means(
    gbs: float, idle: float, cable: bool, level: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.launch.doctor import pair

    def start_remote(*_: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", "import time; print(1, time.time())"],
            stdout=subprocess.PIPE,
            text=True,
        )

    monkeypatch.setattr(pair, "start_remote", start_remote)
    monkeypatch.setattr(pair, "measure_speed", lambda address, port: (gbs, 20.0, idle))
    here = {"cable": [{"addresses": ["10.0.0.1/24"]}] if cable else []}
    there = {"cable": [{"addresses": ["10.0.0.2/24"]}], "reached": ["192.168.1.6", "192.168.1.7"]}
    clock, link = pair._clock_and_speed(here, there, "spark-b")
    assert clock.level == OK
    assert link.level == level
    assert words in f"{link.what} {link.why}"
    assert ("10.0.0.2" if cable else "192.168.1.7") in link.what


def facts(host: str, *functions: dict, **more: object) -> dict:
    return {
        "host": host,
        "cable": list(functions),
        "interfaces": {},
        "uuids": ["GPU-1"],
        "reached": [],
    } | more


def test_addresses_stay_and_new_ones_are_free() -> None:
    a = facts(
        "a",
        {"name": "x", "addresses": ["10.0.0.1/24"]},
        {"name": "y", "addresses": []},
        interfaces={"eth0": ["192.168.177.9/24"]},
    )
    b = facts("b", {"name": "x", "addresses": []}, {"name": "y", "addresses": ["169.254.3.4/16"]})
    assert cable_addresses([a, b]) == [
        {"x": "10.0.0.1/24", "y": "192.168.178.1/24"},
        {"x": "10.0.0.2/24", "y": "192.168.178.2/24"},
    ]


@pytest.mark.parametrize("name", ["x; rm -rf /", "x\ny", "$(id)", "a" * 16])
def test_no_name_becomes_a_command(name: str) -> None:
    nodes = [facts("a", {"name": name, "addresses": []})]
    with pytest.raises(MachineError):
        fix_scripts([Finding("cable", FAULT, "", host="a", case="down")], nodes, "")


def test_a_script_has_only_what_is_needed(tmp_path: Path) -> None:
    """A commented line of the toolkit: no word of addresses, keys or swarms; and the name of a host
    is quoted.
    """
    fault = Finding("swarm-resource", FAULT, "", host="a", case="absent")
    script = fix_scripts([fault], [facts("a")], "")["a"]
    assert "1i swarm-resource" in script
    assert not re.search("netplan|ssh|swarm init|daemon.json", script)
    refused = Finding("ssh", FAULT, "", host="b; id", case="Permission denied")
    script = fix_scripts([refused], [facts("a")], "b; id")["a"]
    assert "PEER='b; id'" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("key", "command"),
    [("docker/down", "usermod -aG"), ("docker/absent", "usermod -aG"),
     ("ssh/resolve hostname", "ssh-copy-id"), ("ssh/Connection refused", "ssh-copy-id"),
     ("daemon.json/old", "daemon.json"), ("swarm/two", "swarm init")],
)  # fmt: skip
def test_a_step_of_another_fault_of_the_same_check_is_not_in_the_script(
    key: str, command: str
) -> None:
    """What no step fixes stands there as a comment, whatever its host said."""
    values = {"host": "b", "message": "first\nreboot", "shown": "", "state": ""}
    found = replace(finding(key, **values), host="b")
    nodes = [facts("a", reached=["10.0.0.1", "10.0.0.2"]), facts("b")]
    for script in fix_scripts([found], nodes, "b").values():
        steps = "\n".join(line for line in script.splitlines() if not line.startswith("#"))
        assert command not in steps
        assert "reboot" not in steps
    if key != "daemon.json/old":
        assert found.fix in script


@pytest.mark.parametrize("key", sorted(PARTS))
def test_each_part_is_of_a_finding(key: str) -> None:
    assert TEXTS[key][0] != OK


def test_without_a_cable_the_swarm_takes_the_addresses_of_ssh() -> None:
    found = [Finding("swarm", FAULT, "", host=host, case="absent") for host in "ab"] + [
        Finding("cable", "warning", "", host="a")
    ]
    scripts = fix_scripts(found, [facts("a"), facts("b", reached=["10.0.0.1", "10.0.0.2"])], "b")
    assert "ADDRESS=10.0.0.1\n" in scripts["a"]
    assert "netplan" not in scripts["a"]
    assert "MANAGER=10.0.0.1\nADDRESS=10.0.0.2\n" in scripts["b"]
    # Of a terminal over ssh
    alone = fix_scripts(found, [facts("a", reached=["192.168.9.9", "10.0.0.1"])], "b")["a"]
    assert "swarm init" not in alone


def test_every_value_of_the_template_is_set() -> None:
    text = (ROOM / "fix.sh").read_text()
    used = set(re.findall(r"\$\{?([A-Z_]+)", text)) - {"SUDO_USER"}
    assert used == {"PEER", "NETPLAN", "FUNCTIONS", "UUIDS", "ADDRESS", "MANAGER"}


def test_the_speed_of_a_spark_is_that_of_the_table() -> None:
    """checks.py has it a second time, as it runs where the rest of tunesmith may be missing."""
    assert peak_of("NVIDIA GB10").tflops == checks.GB10_TFLOPS
