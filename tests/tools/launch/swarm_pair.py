"""Two machines on a cable: two dockerd, two ssh servers, two network namespaces of one machine.

A user without root's rights, TUNER, has ssh keys for both and is in the docker group. Needs root
and the packages of `make cluster-tools`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

from launch.dockerd import RUNC, remove_groups
from waiting import wait_for

TUNER, UID = "tuner", 4711
TOOLS = "docker dockerd runc containerd tini sshd ip nsenter setpriv ssh-keygen rsync".split()
SSH = """Port 22
HostKey {d}/host_key
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
AuthorizedKeysFile .ssh/authorized_keys
"""


def missing_tools() -> str:
    """What keeps this machine from having such a pair; empty if nothing does."""
    if os.getuid() != 0:
        return "needs root"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    lacking = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if lacking:
        return f"lacks {', '.join(lacking)}: make cluster-tools"
    words = "unshare --net --mount --pid --fork true".split()
    made = subprocess.run(words, capture_output=True, check=False)
    return "" if made.returncode == 0 else "may not make namespaces"


class Node:
    """One of the machines: number 1 or 2, 10.77.0.1 or .2, `spark-a` or `spark-b`."""

    def __init__(self, pair: Pair, number: int, gpus: int) -> None:
        self.pair, self.number, self.gpus = pair, number, gpus
        self.name, self.address = f"spark-{'ab'[number - 1]}", f"10.77.0.{number}"
        self.folder, self.netns = pair.folder / str(number), f"{pair.tag}n{number}"
        self.home = self.folder / "home" / TUNER
        self.process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Its disk, keys and configuration: made once, and there again after a crash."""
        d = self.folder
        for name in ("data", "home", "exec"):
            (d / name).mkdir(parents=True)
        (self.home / ".ssh").mkdir(parents=True)
        for key in (d / "host_key", self.home / ".ssh/id_ed25519"):
            subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", key], check=True)
        hosts = "127.0.0.1 localhost\n10.77.0.1 spark-a\n10.77.0.2 spark-b\n"
        (d / "hosts").write_text(hosts)
        user = f"{TUNER}:*:{UID}:{UID}::/home/{TUNER}:/bin/bash\n"
        (d / "passwd").write_text(Path("/etc/passwd").read_text() + user)
        groups = Path("/etc/group").read_text().splitlines()
        lines = [line for line in groups if not line.startswith("docker:")]
        lines += [f"docker:x:4710:{TUNER}", f"{TUNER}:x:{UID}:\n"]
        (d / "group").write_text("\n".join(lines))
        (d / "sshd").write_text(SSH.format(d=d))
        (d / "runc").write_text(RUNC.replace("{places}", "[]"))
        (d / "runc").chmod(0o755)
        config = {
            "node-generic-resources": [f"NVIDIA_GPU=GPU-{self.name}-{i}" for i in range(self.gpus)],
            "storage-driver": "overlay2", "runtimes": {"lowered": {"path": str(d / "runc")}}, "default-runtime": "lowered",
            "bridge": "none", "iptables": False, "ip6tables": False, "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "cgroup-parent": f"/{self.netns}", "data-root": str(d / "data"), "exec-root": str(d / "exec"),
            "pidfile": str(d / "docker.pid"), "hosts": ["unix:///run/docker.sock"], "group": "docker", "log-level": "warn",
        }  # fmt: skip
        (d / "daemon.json").write_text(json.dumps(config))
        (d / "boot").write_text(self._boot())

    def _boot(self) -> str:
        """The first process's script; the interpreter may be below /root, as one of pyenv."""
        d, python = self.folder, sys.base_prefix
        lines = [f"hostname {self.name}"]
        lines += [f"mount --bind {d}/{name} /etc/{name}" for name in ("hosts", "passwd", "group")]
        lines += [f"mount --bind {d}/home /home"]
        if python.startswith("/root/"):
            hidden = f"mkdir -p {d}/python && mount --bind {python} {d}/python"
            lines += [hidden, "mount -t tmpfs tmpfs /root", f"chmod 755 /root && mkdir -p {python}"]
            lines += [f"mount --move {d}/python {python}"]
        lines += [
            f"mkdir -p {place} && mount -t tmpfs tmpfs {place}"
            for place in ("/etc/docker", "/run", "/var/lib/docker")
        ]
        lines += ["mkdir -p /run/sshd", f"/usr/sbin/sshd -f {d}/sshd -E {d}/sshd.log"]
        lines += [f"exec tini -s -- dockerd --config-file {d}/daemon.json"]
        return "\n".join(["set -e", *lines, ""])

    def start(self) -> None:
        """Switch it on."""
        # Killing the one outer process takes all others of the node with it. Not `ip netns exec`,
        # which mounts /sys anew and hides the control groups of version 1.
        shutil.rmtree(self.folder / "exec", ignore_errors=True)
        (self.folder / "docker.pid").unlink(missing_ok=True)
        command = ["nsenter", f"--net=/run/netns/{self.netns}"]
        command += "unshare --uts --mount --pid --fork --kill-child --mount-proc bash".split()
        command += [str(self.folder / "boot")]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(lambda: self.alive() and self.docker("version", ok=True).returncode == 0)

    def alive(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
        return self.inside() is not None

    def inside(self) -> str | None:
        """The process id, out here, of the node's first process."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            return children.read_text().split()[0]
        except (OSError, IndexError):
            return None

    def command(
        self, *words: str, root: bool = False, env: dict[str, str] | None = None
    ) -> list[str]:
        """The words that run a command here, as TUNER or as root."""
        who = [] if root else ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--init-groups"]
        home = "/root" if root else f"/home/{TUNER}"
        given = {"HOME": home, "USER": "root" if root else TUNER, **(env or {})}
        given.setdefault("PATH", f"{os.environ['PATH']}:/usr/sbin")
        if "PYTHONPATH" in os.environ:
            given.setdefault("PYTHONPATH", os.environ["PYTHONPATH"])
        pid = self.inside()
        assert pid is not None, f"{self.name} is off"
        into = ["nsenter", "-t", pid, "--net", "--uts", "--mount", "--pid"]
        variables = (f"{k}={v}" for k, v in given.items())
        return [*into, *who, "env", "-i", f"--chdir={home}", *variables, *words]

    def run(
        self,
        *words: str,
        root: bool = False,
        env: dict[str, str] | None = None,
        ok: bool = False,
        seconds: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command here; `ok`: whatever its exit code."""
        command = self.command(*words, root=root, env=env)
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        assert ok or done.returncode == 0, (
            f"{self.name}: {words} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def docker(self, *words: str, ok: bool = False) -> subprocess.CompletedProcess[str]:
        return self.run("docker", *words, root=True, ok=ok)

    def processes(self) -> list[str]:
        """The command lines of what runs here."""
        script = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '; ps -eo args="
        return self.run("sh", "-c", script, root=True).stdout.splitlines()

    def kill(self) -> None:
        """Pull its plug."""
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
        self.process = None


class Pair:
    """Both nodes, up in a block: one swarm, whose manager is the first."""

    def __init__(self, folder: Path, gpus: int = 0) -> None:
        self.folder, self.tag = folder, f"p{os.getpid()}"
        self.nodes = [Node(self, number, gpus) for number in (1, 2)]

    def __enter__(self) -> Pair:
        try:
            self._up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _up(self) -> None:
        a, b = self.nodes
        for node in self.nodes:
            node.prepare()
            subprocess.run(["ip", "netns", "add", node.netns], check=True)
        link = f"ip link add cable0 netns {a.netns} type veth peer name cable0 netns {b.netns}"
        subprocess.run(link.split(), check=True)
        keys = "".join((node.home / ".ssh/id_ed25519.pub").read_text() for node in self.nodes)
        known = ""
        for node in self.nodes:
            known += f"{node.address},{node.name} {(node.folder / 'host_key.pub').read_text()}"
            address = f"addr add {node.address}/24 dev cable0"
            for words in (address, "link set cable0 up", "link set lo up"):
                subprocess.run(["ip", "-n", node.netns, *words.split()], check=True)
        for node in self.nodes:
            (node.home / ".ssh/authorized_keys").write_text(keys)
            (node.home / ".ssh/known_hosts").write_text(known)
            subprocess.run(["chown", "-R", f"{UID}:{UID}", str(node.home)], check=True)
            (node.home / ".ssh").chmod(0o700)
            node.start()
        at, manager = "--advertise-addr", f"{a.address}:2377"
        a.docker("swarm", "init", at, a.address, "--listen-addr", manager)
        token = a.docker("swarm", "join-token", "-q", "worker").stdout.strip()
        b.docker("swarm", "join", "--token", token, at, b.address, manager)
        wait_for(self.is_ready)

    def is_ready(self) -> bool:
        shown = self.nodes[0].docker("node", "ls", "--format", "{{.Status}}").stdout
        return shown.split() == ["Ready"] * 2

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.kill()
        for node in self.nodes:
            subprocess.run(["ip", "netns", "del", node.netns], check=False, capture_output=True)
            wait_for(lambda node=node: remove_groups(node.netns))
        shutil.rmtree(self.folder, ignore_errors=True)


def write_bare_image(tar: Path) -> None:
    """An image with no files, for containers that get this machine's /usr by a mount."""
    with tarfile.open(tar, "w") as archive:
        # /sbin/docker-init is docker's own
        for folder in ("usr", "etc", "proc", "sys", "dev", "tmp", "run", "sbin"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            archive.addfile(entry)
        for folder in ("bin", "lib", "lib64"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.linkname = tarfile.SYMTYPE, f"usr/{folder}"
            archive.addfile(entry)


def add_host_image(node: Node, name: str = "bare:1") -> None:
    tar = node.folder / "bare.tar"
    write_bare_image(tar)
    node.docker("import", str(tar), name)


def own_environment(variables: dict[str, str], site: str) -> dict[str, object]:
    """What a user's own file adds to the stack, so that the image above runs this checkout."""
    root = Path(__file__).parents[3]
    places = dict.fromkeys(["/usr", sys.prefix, sys.base_prefix, str(root), site])
    bind = {"type": "bind", "read_only": True}
    mounts = [{**bind, "source": place, "target": place} for place in places]
    environment = {
        "PATH": f"{sys.prefix}/bin:/usr/bin", "PYTHONPATH": f"{site}:{root}/src:{root}/tests",
        "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", **variables,
    }  # fmt: skip
    return {"services": {"ranks": {"environment": environment, "volumes": mounts}}}
