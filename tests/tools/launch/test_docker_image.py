"""The images of docker/, built by a real Docker daemon without a registry or a network."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from launch.conftest import (
    KEPT,
    PYTHON,
    ROOT,
    USER,
    Place,
    build,
    builder,
    call,
    make_context,
    requirements,
)

pytestmark = [pytest.mark.nightly, pytest.mark.long]


def test_a_run_trains_in_the_cpu_image_as_any_user(
    daemon: dict[str, str], place: Place, cpu_image: str
) -> None:
    """The command is the first process, so that signals reach it, in a home that can be written;
    nothing of pip is left.
    """
    code = "import os, getpass, subprocess; open(os.path.expanduser('~/x'), 'w'); print(os.getpid(), os.getuid(), getpass.getuser());"
    code += "[subprocess.run(['tunesmith', word], check=True) for word in ('--version', 'recipes')]"
    run = ("docker", "run", "--rm", "--user", "54321:54321", cpu_image)
    first, version, *recipes = call(daemon, *run, "python", "-u", "-c", code).stdout.splitlines()
    assert first.split() == ["1", "54321", "user54321"]
    assert version.startswith("tunesmith ")
    assert any("smollm2" in line for line in recipes)
    history = call(daemon, "docker", "history", "--no-trunc", cpu_image).stdout
    config = call(daemon, "docker", "image", "inspect", cpu_image).stdout
    assert "index-url" not in history + config
    folders = ("/build", "/tmp/wheels", "/etc/pip.conf", "/root/.cache")
    look = call(daemon, "docker", "run", "--rm", cpu_image, "ls", *folders, check=False)
    assert look.stderr.count(os.strerror(errno.ENOENT)) == 4
    changes = ("train.duration=3 steps", "train.compile=off")
    place.finish("launch", "docker", "recipe.yaml", f"--image={cpu_image}", *changes)
    out = place.folder / "run"
    assert (out / "metrics.jsonl").read_text().count("\n") == 3
    assert (out / "final/manifest.json").is_file()
    assert {path.lstat().st_uid for path in (out, *out.rglob("*"))} == {USER}


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """A wheel of a few texts."""
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        lines = []
        for file, text in files.items():
            archive.writestr(file, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
            lines.append(f"{file},sha256={digest.rstrip(b'=').decode()},{len(text)}\n")
        archive.writestr(f"{info}/RECORD", "".join([*lines, f"{info}/RECORD,,\n"]))
    return path


STANDINS = KEPT / "standins"
STANDIN = """FROM {python}
COPY *.whl /wheels/
RUN python3 -m pip install -q --break-system-packages --no-index --no-deps /wheels/*.whl && rm -r /wheels
COPY nvidia_entrypoint.sh /opt/nvidia/
COPY constraint.txt /etc/pip/
ENV PIP_CONSTRAINT=/etc/pip/constraint.txt
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh"]
"""


@pytest.fixture(scope="module")
def standin(daemon: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """What docker/Dockerfile meets in NVIDIA's image: its own torch, an alpha that is older than that
    of the index and new enough, its entry point, and constraints of all its packages.
    """
    folder, torch = tmp_path_factory.mktemp("standin"), "2.11.0a0+standin.nv26.2"
    wheel(folder, "torch", torch, {"torch/__init__.py": f"__version__ = {torch!r}\n"})
    (folder / "Dockerfile").write_text(STANDIN.format(python=PYTHON))
    (folder / "nvidia_entrypoint.sh").write_text('#!/bin/sh\necho "a banner" >&2\nexec "$@"\n')
    (folder / "nvidia_entrypoint.sh").chmod(0o755)
    (folder / "constraint.txt").write_text("peft==0.0.1\n")
    image, (client, kit) = f"tunesmith-test/standin:{torch.replace('+', '-')}", builder()
    words = ("build", "-q", "--network", "none", "-t", image, str(folder))
    call({**daemon, "DOCKER_BUILDKIT": kit}, client, *words)
    return image


def standin_wheels(wheels: list[Path], **carried: str) -> list[Path]:
    """Empty packages in place of each requirement, a newer torch among them.

    Args:
        carried: text of a file torch/__init__.py that a package has too.
    """
    shutil.rmtree(STANDINS, ignore_errors=True)
    STANDINS.mkdir()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    versions = {
        name.lower().replace("-", "_"): version
        for name, version in pinned.items()
        if " " not in name
    }
    names = {Requirement(text).name.lower().replace("-", "_") for text in requirements()}
    made = []
    for name in sorted(names - {"hatchling", "packaging"}):
        more = {"torch/__init__.py": carried[name]} if name in carried else {}
        made.append(wheel(STANDINS, name, versions[name], {f"standin_{name}.py": ""} | more))
    taken = {file.name.partition("-")[0] for file in made}
    # Those of the build backend are small.
    small = (file for file in wheels if file.stat().st_size < 2 << 20)
    return [*made, *(file for file in small if file.name.partition("-")[0].lower() not in taken)]


def test_the_torch_of_the_base_is_kept(
    daemon: dict[str, str], wheels: list[Path], standin: str
) -> None:
    context, image = make_context(standin_wheels(wheels)), f"{PYTHON}-kept"
    done = build(daemon, context, "Dockerfile", image, standin)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("dist-packages/torch/__init__.py: kept") == 2
    code = "import os, torch, standin_peft; print(os.getpid(), torch.__version__)"
    user = ("docker", "run", "--rm", "--user", "54321:54321")
    said = call(daemon, *user, image, "python", "-c", code)
    assert said.stdout.split() == ["1", "2.11.0a0+standin.nv26.2"]
    assert "a banner" in said.stderr  # NVIDIA's entry point was not lost


@pytest.mark.parametrize("base", ["of NVIDIA", "without torch"])
def test_a_build_that_ends_with_another_torch_or_none_fails_with_a_line(
    daemon: dict[str, str], wheels: list[Path], standin: str, base: str
) -> None:
    carried = {"accelerate": "__version__ = 'another'"} if base == "of NVIDIA" else {}
    context = make_context(standin_wheels(wheels, **carried))
    under = standin if carried else PYTHON
    done = build(daemon, context, "Dockerfile", f"{PYTHON}-refused", under)
    lines = (done.stdout + done.stderr).splitlines()
    faults = [line for line in lines if line.startswith("error: ")]
    assert len(faults) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    if carried:
        assert "2.11.0a0+standin.nv26.2 in /usr/local/lib" in faults[0]
        assert "2.11.0a0+standin.nv26.2 in /opt/tunesmith/lib" in faults[0]
    else:
        assert "--build-arg BASE=nvcr.io/nvidia/pytorch:26.02-py3" in faults[0]
    assert done.returncode == 1
