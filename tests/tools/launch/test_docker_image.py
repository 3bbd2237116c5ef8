"""The images of docker/, built by a real Docker daemon without a registry or a network."""

from __future__ import annotations

import errno
import os

import pytest

from launch.conftest import USER, Place, call

pytestmark = [pytest.mark.nightly, pytest.mark.long]


def test_a_run_trains_in_the_cpu_image_as_any_user(
    daemon: dict[str, str], place: Place, cpu_image: str
) -> None:
    """The command is the first process, so that signals reach it; nothing of pip is left."""
    code = "import os, getpass, subprocess; open(os.path.expanduser('~/x'), 'w'); print(os.getpid(), os.getuid(), getpass.getuser());"
    code += "[subprocess.run(['tunesmith', word], check=True) for word in ('--version', 'recipes')]"
    run = ("docker", "run", "--rm", "--user", "54321:54321", cpu_image)
    first, version, *recipes = call(daemon, *run, "python", "-u", "-c", code).stdout.splitlines()
    assert first.split() == ["1", "54321", "user54321"]
    assert version.startswith("tunesmith ")
    assert any("smollm2" in line for line in recipes)
    folders = ("/build", "/tmp/wheels", "/etc/pip.conf", "/root/.cache")
    look = call(daemon, "docker", "run", "--rm", cpu_image, "ls", *folders, check=False)
    assert look.stderr.count(os.strerror(errno.ENOENT)) == 4
    changes = ("train.duration=3 steps", "train.compile=off")
    place.finish("launch", "docker", "recipe.yaml", f"--image={cpu_image}", *changes)
    out = place.folder / "run"
    assert (out / "metrics.jsonl").read_text().count("\n") == 3
    assert (out / "final/manifest.json").is_file()
    assert {path.lstat().st_uid for path in (out, *out.rglob("*"))} == {USER}
