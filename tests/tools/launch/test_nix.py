"""flake.nix with the real nix, which needs no daemon and no /nix here; `nix_stub` takes the place
of nixpkgs and of uv.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
STUB = Path(__file__).with_name("nix_stub")
PARTS = "flake.nix flake.lock LICENSE README.md nix pyproject.toml recipes scripts src".split()
SCRIPTS = {
    "LLAMA3_3B_FULL_SCRIPT": "Llama3_3B_full_finetuning.py",
    "LLAMA3_8B_LORA_SCRIPT": "Llama3_8B_LoRA_finetuning.py",
    "LLAMA3_70B_LORA_SCRIPT": "Llama3_70B_LoRA_finetuning.py",
    "LLAMA3_70B_QLORA_SCRIPT": "Llama3_70B_qLoRA_finetuning.py",
}
LIMIT = 300  # seconds; each command takes about one


@dataclass(frozen=True)
class Nix:
    store: Path
    root: Path

    @property
    def flake(self) -> Path:
        return self.root / "flake"

    def __call__(
        self, *words: str, stub: bool = True, **more: str
    ) -> subprocess.CompletedProcess[str]:
        kinds = ("store", "state", "log", "conf")
        environment = {f"NIX_{kind.upper()}_DIR": str(self.store / kind) for kind in kinds} | {
            "PATH": os.environ["PATH"], "HOME": str(self.root / "home"), "XDG_CACHE_HOME": str(self.root / "cache"),
            "LD_LIBRARY_PATH": "/of/the/host", "NIX_REMOTE": "", **more,
        }  # fmt: skip
        if stub:
            given = ("--override-input", "nixpkgs", f"path:{STUB}", "--no-write-lock-file")
            words = (*words[:2], *given, *words[2:])
        return subprocess.run(
            ["nix", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )

    def shell_variables(self, script: str, **more: str) -> tuple[dict[str, str], str]:
        """The lines `name=value` that a script prints in the dev shell, and its stderr."""
        at = f"path:{self.flake}#pytorch-fine-tune"
        done = self("develop", at, "--quiet", "--command", "bash", "-euc", script, **more)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if re.match(r"[\w-]+=", line)]
        return dict(line.split("=", 1) for line in lines), done.stderr


@pytest.fixture(scope="module")
def nix_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("nix"):
        pytest.skip("nix is missing: make cluster-tools installs it")
    store = tmp_path_factory.mktemp("nix")
    for folder in ("store", "state", "log", "conf"):
        (store / folder).mkdir()
    (store / "conf" / "registry.json").write_text('{"flakes": [], "version": 2}')
    (store / "conf" / "nix.conf").write_text(
        "experimental-features = nix-command flakes\nsubstituters =\nbuild-users-group =\nsandbox = false\n"
        f"flake-registry = {store}/conf/registry.json\n"
    )
    return store


@pytest.fixture
def nix(nix_store: Path, tmp_path: Path) -> Nix:
    for folder in ("home", "cache", "flake"):
        (tmp_path / folder).mkdir()
    for name in PARTS:
        copy: Callable[..., object] = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / "flake" / name)
    return Nix(nix_store, tmp_path)


@pytest.mark.nightly
@pytest.mark.nix
def test_the_flake_evaluates_for_both_systems_and_its_lock_file_is_its_own(nix: Nix):
    shown = nix("flake", "show", f"path:{nix.flake}", "--json")
    assert shown.returncode == 0, shown.stderr
    outputs, systems = json.loads(shown.stdout), ["aarch64-linux", "x86_64-linux"]
    kinds = ("apps", "checks", "devShells", "packages")
    assert {kind: sorted(found) for kind, found in outputs.items()} == dict.fromkeys(kinds, systems)
    for system in systems:
        assert sorted(outputs["devShells"][system]) == ["default", "pytorch-fine-tune"]
        assert sorted(outputs["checks"][system]) == ["help", "scripts", "tunesmith"]
    # Without the stand-in nix would have to ask the network for an input that the lock file lacks.
    look = ("flake", "metadata", "--json", "--no-update-lock-file", f"path:{nix.flake}")
    told = nix(*look, stub=False)
    assert told.returncode == 0, told.stderr
    locked = json.loads(told.stdout)["locks"]["nodes"]["nixpkgs"]["locked"]
    assert locked["rev"] in (ROOT / "flake.nix").read_text()
    checked = nix("flake", "check", f"path:{nix.flake}", "--quiet")
    assert checked.returncode == 0, checked.stderr


@pytest.mark.nightly
@pytest.mark.nix
def test_the_shell_has_the_programs_and_the_scripts(nix: Nix):
    names = "tunesmith hf accelerate python uv cc"
    script = f"env; for name in {names}; do echo at-$name=$(type -P $name); done"
    found, told = nix.shell_variables(script)
    environment = Path(found["VIRTUAL_ENV"])
    assert environment.parent == nix.root / "cache" / "tunesmith" / "nix"
    assert environment.parent.stat().st_mode & 0o777 == 0o700
    for name in ("tunesmith", "hf", "accelerate", "python"):
        assert found[f"at-{name}"] == str(environment / "bin" / name)
    assert found["at-uv"].startswith(str(nix.store / "store"))
    assert found["at-cc"]
    assert "LD_LIBRARY_PATH" not in found, "the host's libraries, or a driver that is not there"
    assert "no NVIDIA driver" in told
    for variable, name in SCRIPTS.items():
        assert Path(found[variable]).read_text() == (ROOT / "scripts" / name).read_text()
        assert Path(found[variable]).with_name("playbook.py").is_file()
    wanted = ROOT / "nix" / "requirements.txt"
    assert (environment / "synced.txt").read_text() == wanted.read_text()
    ran = nix("run", f"path:{nix.flake}#tunesmith", "--quiet", "--", "recipes", "a  b")
    assert (ran.returncode, ran.stdout) == (0, f"tunesmith of {environment} recipes a  b\n")


@pytest.mark.nightly
@pytest.mark.nix
def test_the_driver_of_the_host_and_nothing_else_of_it(nix: Nix, tmp_path: Path):
    host = tmp_path / "host"
    host.mkdir()
    ours = {f"lib{name}.so.1" for name in ("cuda", "nvidia-ml", "nvidia-ptxjitcompiler", "cudadebugger")}  # fmt: skip
    for name in (*ours, "libcudart.so.13", "libc.so.6", "libstdc++.so.6"):
        (host / name).touch()
    found, told = nix.shell_variables("env", TUNESMITH_DRIVER=str(host))
    folder = Path(found["LD_LIBRARY_PATH"])
    assert found["TRITON_LIBCUDA_PATH"] == str(folder)
    assert {file.name for file in folder.iterdir()} == {*ours, "libcuda.so"}
    assert {file.readlink() for file in folder.iterdir()} == {host / name for name in ours}
    assert "no NVIDIA driver" not in told


def locked_versions(file: Path) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", file.read_text(), flags=re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def test_the_locked_packages_are_those_of_the_project():
    """In the ranges of pyproject.toml, at the versions of constraints.txt, every one with a hash."""
    text = (ROOT / "nix" / "requirements.txt").read_text()
    locked = locked_versions(ROOT / "nix" / "requirements.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "nix" / "requirements.in").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("#")] + project["dependencies"]
    for extra in ("nf4", "gguf", "tensorboard"):
        lines += project["optional-dependencies"][extra]
    assert len(lines) > 20
    for requirement in map(Requirement, lines):
        version = locked[canonicalize_name(requirement.name)]
        fits = requirement.specifier.contains(version, prereleases=True)
        assert fits, f"{requirement}: {version}; sh nix/lock.sh"
    tested = locked_versions(ROOT / "constraints.txt")
    both = tested.keys() & locked.keys()
    assert {name: locked[name] for name in both} == {name: tested[name] for name in both}
    hashed = re.findall(r"^[\w.-]+==[^\n]*\\\n    --hash=sha256:[0-9a-f]{64}", text, flags=re.M)
    assert len(locked) == len(hashed)
