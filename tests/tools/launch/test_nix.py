"""flake.nix with the real nix, which needs no daemon and no /nix here; `nix_stub` takes the place
of nixpkgs and of uv.

What is built runs: the checks, the dev shell and `nix run`. That the names exist in nixpkgs, and
that a GPU is found, cannot be seen here; docs/nix.md says so.
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

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
STUB = Path(__file__).with_name("nix_stub")
PARTS = (
    "flake.nix",
    "flake.lock",
    "LICENSE",
    "README.md",
    "nix",
    "pyproject.toml",
    "recipes",
    "scripts",
    "src",
)
SCRIPTS = {
    "LLAMA3_3B_FULL_SCRIPT": "Llama3_3B_full_finetuning.py",
    "LLAMA3_8B_LORA_SCRIPT": "Llama3_8B_LoRA_finetuning.py",
    "LLAMA3_70B_LORA_SCRIPT": "Llama3_70B_LoRA_finetuning.py",
    "LLAMA3_70B_QLORA_SCRIPT": "Llama3_70B_qLoRA_finetuning.py",
}
LIMIT = 300  # seconds; each command takes about one


@dataclass(frozen=True)
class Nix:
    """A copy of the flake, a home and a cache in a folder of their own; the store is that of all
    tests here.
    """

    store: Path
    root: Path

    @property
    def flake(self) -> Path:
        return self.root / "flake"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def __call__(
        self, *words: str, stub: bool = True, **more: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.root / "home"),
            "XDG_CACHE_HOME": str(self.cache),
            "LD_LIBRARY_PATH": "/of/the/host",
            "NIX_REMOTE": "",
            **{
                f"NIX_{kind.upper()}_DIR": str(self.store / kind)
                for kind in ("store", "state", "log", "conf")
            },
            **more,
        }
        if stub:
            words = (
                *words[:2],
                "--override-input",
                "nixpkgs",
                f"path:{STUB}",
                "--no-write-lock-file",
                *words[2:],
            )
        command = ["nix", *words]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.flake / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    def shell(self, script: str, **more: str) -> subprocess.CompletedProcess[str]:
        at = f"path:{self.flake}#pytorch-fine-tune"
        return self("develop", at, "--quiet", "--command", "bash", "-euc", script, **more)


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


def exports(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if re.match(r"[\w-]+=", line))


@pytest.mark.nix
def test_every_output_evaluates_for_both_systems(nix: Nix):
    shown = nix("flake", "show", f"path:{nix.flake}", "--json")
    assert shown.returncode == 0, shown.stderr
    outputs = json.loads(shown.stdout)
    assert {kind: sorted(found) for kind, found in outputs.items()} == {
        kind: ["aarch64-linux", "x86_64-linux"]
        for kind in ("apps", "checks", "devShells", "packages")
    }
    for system in ("aarch64-linux", "x86_64-linux"):
        assert sorted(outputs["devShells"][system]) == ["default", "pytorch-fine-tune"]
        assert sorted(outputs["checks"][system]) == ["help", "scripts", "tunesmith"]
    checked = nix("flake", "check", f"path:{nix.flake}", "--no-build")
    assert checked.returncode == 0, checked.stderr


@pytest.mark.nix
def test_an_unknown_name_of_nixpkgs_is_refused(nix: Nix):
    nix.edit("flake.nix", "pkgs.zlib", "pkgs.zlip")
    checked = nix("flake", "check", f"path:{nix.flake}", "--no-build")
    assert checked.returncode == 1
    assert "attribute 'zlip' missing" in checked.stderr


@pytest.mark.nix
def test_the_lock_file_is_that_of_the_flake(nix: Nix):
    """Without the stand-in: nix would have to ask the network for an input that the lock file does
    not hold.
    """
    told = nix(
        "flake", "metadata", "--json", "--no-update-lock-file", f"path:{nix.flake}", stub=False
    )
    assert told.returncode == 0, told.stderr
    locked = json.loads(told.stdout)["locks"]["nodes"]["nixpkgs"]["locked"]
    assert locked["rev"] in (ROOT / "flake.nix").read_text()


@pytest.mark.nix
def test_the_checks_run_and_notice_what_is_broken(nix: Nix):
    passed = nix("flake", "check", f"path:{nix.flake}", "--quiet")
    assert passed.returncode == 0, passed.stderr
    nix.edit("scripts/Llama3_8B_LoRA_finetuning.py", "import sys", "import = sys")
    broken = nix("flake", "check", f"path:{nix.flake}", "--keep-going")
    assert broken.returncode != 0
    assert "tunesmith-scripts.drv' failed" in broken.stderr
    assert "tunesmith-help.drv' failed" not in broken.stderr
    nix.edit("src/tunesmith/cli/main.py", "import argparse", "import argparse, no_such_package")
    assert (
        "tunesmith-help.drv' failed"
        in nix("flake", "check", f"path:{nix.flake}", "--keep-going").stderr
    )


@pytest.mark.nix
def test_the_shell_has_the_programs_and_the_scripts(nix: Nix):
    entered = nix.shell(
        "env; for name in tunesmith hf accelerate python uv cc; do echo at-$name=$(type -P $name); done"
    )
    assert entered.returncode == 0, entered.stderr
    found = exports(entered.stdout)
    environment = Path(found["VIRTUAL_ENV"])
    assert environment.parent == nix.cache / "tunesmith" / "nix"
    assert environment.parent.stat().st_mode & 0o777 == 0o700
    for name in ("tunesmith", "hf", "accelerate", "python"):
        assert found[f"at-{name}"] == str(environment / "bin" / name)
    assert found["at-uv"].startswith(str(nix.store / "store"))
    assert found["at-cc"]
    assert "LD_LIBRARY_PATH" not in found, "the host's libraries, or a driver that is not there"
    assert "no NVIDIA driver" in entered.stderr
    for variable, name in SCRIPTS.items():
        assert Path(found[variable]).read_text() == (ROOT / "scripts" / name).read_text()
        assert Path(found[variable]).with_name("playbook.py").is_file()
    assert (environment / "synced.txt").read_text() == (
        ROOT / "nix" / "requirements.txt"
    ).read_text()

    again = nix.shell("tunesmith train 'a b'")
    assert again.stdout == f"tunesmith of {environment} train a b\n"
    assert "installing" not in again.stderr

    ran = nix("run", f"path:{nix.flake}#tunesmith", "--quiet", "--", "recipes", "a  b")
    assert (ran.returncode, ran.stdout) == (0, f"tunesmith of {environment} recipes a  b\n")


@pytest.mark.nix
def test_libraries_that_wheels_expect_are_loaded_by_path(nix: Nix):
    """So that nothing of them reaches programs of the host through LD_LIBRARY_PATH."""
    ran = nix.shell(
        'python -c \'import ctypes; ctypes.CDLL("libstdc++.so.6"); print(open("/proc/self/maps").read())\''
    )
    assert ran.returncode == 0, ran.stderr
    assert "Error processing" not in ran.stderr
    for name in ("libgcc_s.so.1", "libstdc++.so.6", "libz.so.1"):
        assert (
            str(Path(os.path.realpath(next(nix.store.glob(f"store/*/lib/{name}"))))) in ran.stdout
        )


@pytest.mark.nix
def test_the_driver_of_the_host_and_nothing_else_of_it(nix: Nix, tmp_path: Path):
    host = tmp_path / "host"
    host.mkdir()
    ours = {
        "libcuda.so.1",
        "libnvidia-ml.so.1",
        "libnvidia-ptxjitcompiler.so.1",
        "libcudadebugger.so.1",
    }
    for name in (*ours, "libcudart.so.13", "libc.so.6", "libstdc++.so.6"):
        (host / name).touch()
    entered = nix.shell("env", TUNESMITH_DRIVER=str(host))
    assert entered.returncode == 0, entered.stderr
    found = exports(entered.stdout)
    folder = Path(found["LD_LIBRARY_PATH"])
    assert found["TRITON_LIBCUDA_PATH"] == str(folder)
    assert {file.name for file in folder.iterdir()} == {*ours, "libcuda.so"}
    assert {file.readlink() for file in folder.iterdir()} == {host / name for name in ours}
    assert "no NVIDIA driver" not in entered.stderr


@pytest.mark.nix
def test_an_install_that_fails_says_so_and_is_made_again(nix: Nix):
    for start in (
        nix.shell,
        lambda script, **more: nix("run", f"path:{nix.flake}", "--", script, **more),
    ):
        fault = "no route to the index"
        failed = start("echo in the shell", UV_STANDIN_FAILS=fault)
        assert failed.returncode == 1
        assert f"uv: {fault}" in failed.stderr
        assert "error: " in failed.stderr
        assert failed.stdout == ""
    assert nix.shell("tunesmith").returncode == 0


def locked_versions(file: Path) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", file.read_text(), flags=re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def test_the_locked_packages_are_those_of_the_project():
    """nix/requirements.txt: in the ranges of pyproject.toml, at the versions of constraints.txt,
    every one with a hash.
    """
    text = (ROOT / "nix" / "requirements.txt").read_text()
    locked = locked_versions(ROOT / "nix" / "requirements.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    more = [
        line
        for line in (ROOT / "nix" / "requirements.in").read_text().splitlines()
        if not line.startswith("#")
    ]
    wanted = [
        Requirement(line)
        for line in [*project["dependencies"], *more]
        + [line for extra in ("nf4", "gguf", "tensorboard") for line in extras[extra]]
    ]
    assert len(wanted) > 20
    for requirement in wanted:
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{requirement}: {version}; sh nix/lock.sh"
        )
    tested = locked_versions(ROOT / "constraints.txt")
    assert {
        name: locked[name] for name in locked if name in tested and locked[name] != tested[name]
    } == {}
    assert len(locked) == len(
        re.findall(r"^[\w.-]+==[^\n]*\\\n    --hash=sha256:[0-9a-f]{64}", text, flags=re.MULTILINE)
    )


def test_the_page_lists_what_is_taken_from_nixpkgs_and_the_versions():
    page = (ROOT / "docs" / "nix.md").read_text()
    taken = set(
        re.findall(r"(?<!nix)pkgs\.([a-z][\w-]*(?:\.cc)*)", (ROOT / "flake.nix").read_text())
    )
    assert len(taken) > 6
    table = page[page.index("| attribute |") :]
    assert {name for name in taken if f"`{name}`" not in table} == set()
    locked = locked_versions(ROOT / "nix" / "requirements.txt")
    rows = re.findall(r"^\| ([\w-]+) \| \S+ \| >=.* \| (\S+) \|$", page, flags=re.MULTILINE)
    assert len(rows) == 8
    assert dict(rows) == {name: locked[canonicalize_name(name)] for name, _ in rows}
    assert f"{len(installed_on_linux())} wheels" in page


def installed_on_linux() -> list[str]:
    """The locked packages that a Linux machine gets."""
    text = (ROOT / "nix" / "requirements.txt").read_text()
    lines = re.findall(r"^([\w.-]+==[^\\\n]+?) *\\$", text, flags=re.MULTILINE)
    linux = {
        "sys_platform": "linux",
        "platform_machine": "aarch64",
        "python_full_version": "3.13.14",
    }
    found = [Requirement(line) for line in lines]
    return [each.name for each in found if each.marker is None or each.marker.evaluate(linux)]
