"""A Docker daemon of the tests' own: in private namespaces, without a network, gone with its test."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

NEEDED = ("dockerd", "docker", "tini", "unshare", "setpriv")
# A runc that asks for no more than this machine grants: without CAP_SYS_RESOURCE a limit cannot be
# raised, and a container with `--ulimit memlock=-1` would not start. It adds the folders of this
# machine that every container is to have.
RUNC = """#!/usr/bin/python3
import json, os, resource, sys
PLACES = {places}
words = sys.argv[1:]
path = ""
if "create" in words and "--bundle" in words:
    path = os.path.join(words[words.index("--bundle") + 1], "config.json")
elif "exec" in words and "--process" in words:
    path = words[words.index("--process") + 1]
if path:
    with open(path) as file:
        config = json.load(file)
    process = config.get("process", config)
    for limit in process.get("rlimits") or []:
        most = resource.getrlimit(getattr(resource, limit["type"]))[1]
        if most != resource.RLIM_INFINITY:
            for kind in ("hard", "soft"):
                limit[kind] = most if limit[kind] < 0 else min(limit[kind], most)
    process["oomScoreAdj"] = max(0, process.get("oomScoreAdj") or 0)
    if "mounts" in config:
        bind = dict(type="bind", options=["rbind", "ro"])
        config["mounts"] += [dict(bind, source=place, destination=place) for place in PLACES]
    with open(path, "w") as file:
        json.dump(config, file)
os.execvp("runc", ["runc", *words])
"""


def missing_tools() -> str:
    """Why no daemon can be started here; empty where one can."""
    if os.geteuid() != 0:
        return "a Docker daemon of the tests' own needs root: sudo make cluster-tools test"
    gone = [name for name in NEEDED if shutil.which(name) is None]
    return f"{', '.join(gone)} not installed: make cluster-tools" if gone else ""


def remove_groups(name: str) -> bool:
    """Remove the control groups of a daemon; tell whether the last of its processes is gone."""
    for group in Path("/sys/fs/cgroup").glob(f"*/{name}"):
        for inner in [*sorted((p for p in group.rglob("*") if p.is_dir()), reverse=True), group]:
            with contextlib.suppress(OSError):
                inner.rmdir()
    return not [*Path("/sys/fs/cgroup").glob(f"*/{name}")]


@contextlib.contextmanager
def docker_daemon(data: Path | None = None, places: Sequence[str] = ()) -> Iterator[dict[str, str]]:
    """The environment in which `docker` talks to a new daemon, whose end is that of its containers.

    `data` keeps its images for the next one. All containers see the folders `places`.
    """
    if fault := missing_tools():
        pytest.skip(fault)
    with tempfile.TemporaryDirectory(
        prefix="td-", dir="/tmp", ignore_cleanup_errors=True
    ) as made:  # a socket's path is short
        place = Path(made)
        place.chmod(0o755)
        runc = place / "runc"
        runc.write_text(RUNC.replace("{places}", repr([*dict.fromkeys(places)])))
        runc.chmod(0o755)
        socket = place / "docker.sock"
        config = {
            "hosts": [f"unix://{socket}"], "data-root": str(data or place / "data"), "exec-root": str(place / "exec"),
            "pidfile": str(place / "pid"), "bridge": "none", "iptables": False, "ip6tables": False,
            "exec-opts": ["native.cgroupdriver=cgroupfs"], "cgroup-parent": f"/{place.name}", "storage-driver": "overlay2",
            "runtimes": {"bounded": {"path": str(runc)}}, "default-runtime": "bounded", "log-level": "warn",
            "builder": {"gc": {"enabled": True, "defaultKeepStorage": "6GB"}},
        }  # fmt: skip
        (place / "daemon.json").write_text(json.dumps(config))
        # The daemon's fixed paths are empty ones of its own; the end of the first process ends the
        # namespace and all in it.
        inside = (
            "for f in /etc/docker /run/docker /run/containerd; do mkdir -p $f; mount -t tmpfs tmpfs $f; done;"
            f" exec tini -s -- dockerd --config-file {place}/daemon.json"
        )
        namespaces = (
            "setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --mount-proc"
        )
        talk = {"DOCKER_HOST": f"unix://{socket}", "DOCKER_CONFIG": str(place)}
        env = {**os.environ, **talk, "DOCKER_BUILDKIT": "0"}
        with (place / "log").open("wb") as log:
            words = [*namespaces.split(), "sh", "-c", inside]
            daemon = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            look: dict[str, Any] = {"env": env, "capture_output": True}
            while subprocess.run(["docker", "version"], check=False, **look).returncode:
                said = (place / "log").read_text(errors="replace")[-2000:]
                assert daemon.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.2)
            socket.chmod(0o666)
            yield env
        finally:
            daemon.kill()
            daemon.wait()
            time.sleep(0.2)
            remove_groups(place.name)
