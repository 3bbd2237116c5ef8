"""`tunesmith doctor`: its words, a recipe's model, what its commands do.

No root is needed.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from errors import holds
from hub.standin import Repo, StandIn
from launch.spark_pair import TORCH
from tunesmith.host.chips import peak_of
from tunesmith.tools.doctor import checks
from tunesmith.tools.doctor.checks import examine
from tunesmith.tools.doctor.system import FAULT, OK, TEXTS, VERSIONS_PROGRAM, System, finding

ROOM = Path(checks.__file__).parent
DOCS = Path(__file__).parents[3] / "docs"


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
    for name in ("system", "checks"):
        tree = ast.parse((ROOM / f"{name}.py").read_text(), feature_version=(3, 9))
        found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        found |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        others = {m for m in found if m and m.partition(".")[0] not in sys.stdlib_module_names}
        assert others <= {"tunesmith.tools.doctor.system"}


def test_torch_is_found_beside_a_source_tree_that_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "torch-2.11.0.dist-info").mkdir()
    (tmp_path / "torch-2.11.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.11.0\n")
    command, env = (
        [sys.executable, "-S", "-c", VERSIONS_PROGRAM],
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
    findings, _ = examine(System(), pair=False)
    report = {"findings": [asdict(result) for result in findings]}
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
    from tunesmith.hub.download import RemoteFile
    from tunesmith.hub.fetch import RepoListing
    from tunesmith.tools.doctor import access

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmn")

    large = RemoteFile("model.safetensors", "", 1 << 50, "")
    listing = RepoListing("main", "", False, {large.name: large})
    monkeypatch.setattr("tunesmith.hub.fetch.list_repo", lambda *_, **__: listing)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: None)
    found = {f.check: f for f in access.check_model(Model(name="someone/model"))}
    assert found["room"].level == FAULT
    assert "takes 1048576.0 GiB" in found["room"].what


def test_a_hub_that_never_answers_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from tunesmith.config.schema import Model
    from tunesmith.hub.hub_calls import TRANSPORT
    from tunesmith.tools.doctor import access

    asked = []

    def never_answers(*_: object, timeout: float | None, **__: object) -> None:
        asked.append(timeout)
        raise TRANSPORT("timed out")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", never_answers)
    found = {f.check: f for f in access.check_model(Model(name="someone/model"))}
    assert found["hub"].level == FAULT
    assert asked == [access.HUB_TIMEOUT_SECONDS]


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


def test_the_command_for_the_resource_of_swarm_keeps_what_else_is_set(tmp_path: Path) -> None:
    file = tmp_path / "daemon.json"
    file.write_text('{"log-driver": "local", "node-generic-resources": ["NVIDIA_GPU=other"]}')
    fix = finding("daemon.json/resource", named="other", uuids="GPU-1 GPU-2").fix
    command = fix.replace("/etc/docker/daemon.json", str(file)).replace("sudo ", "")
    subprocess.run(["bash", "-c", command.partition(" && ")[0]], check=True)
    assert json.loads(file.read_text()) == {
        "log-driver": "local",
        "node-generic-resources": ["NVIDIA_GPU=GPU-1", "NVIDIA_GPU=GPU-2"],
    }


def test_the_speed_of_a_spark_is_that_of_the_table() -> None:
    """checks.py has it a second time, as it runs where the rest of tunesmith may be missing."""
    assert peak_of("NVIDIA GB10").tflops == checks.GB10_TFLOPS
