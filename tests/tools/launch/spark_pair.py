"""Two nodes that look like two DGX Sparks on a cable: network, mount and host-name namespaces of
this machine.

Real: the network (veth pairs with the names of the cable's functions), ssh with keys, files below
/etc, the disks, users. From files in the formats of the real thing: /sys/class/infiniband,
/proc/meminfo. Stand-ins on the PATH, which print what the real commands print: nvidia-smi,
nvidia-ctk, docker; and a package torch with CUDA, for there is no GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

FUNCTIONS = ("enp1s0f1np1", "enP2p1s0f1np1")
DEVICES = ("rocep1s0f1", "roceP2p1s0f1")
NEEDED = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "sshd")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
UUIDS = {
    "a": "GPU-45cbf7b3-f919-7228-7a26-b06628ebefa1",
    "b": "GPU-9d1f02aa-1c55-4e0b-8f0e-2b6d2ac7c001",
}

SMI = """#!/bin/sh
if [ -e {state}/smi-fails ]; then cat {state}/smi-fails; exit 9; fi
cat {state}/gpus
"""
DOCKER = """#!/bin/sh
if [ -e {state}/docker-refuses ]; then cat {state}/docker-refuses >&2; exit 1; fi
case "$1" in info) cat {state}/docker-info ;; esac
"""
CTK = "#!/bin/sh\ncat {state}/toolkit\n"
TORCH = '''"""The part of torch that the load of the doctor uses, with a GPU's answers."""
import json, os, time, types
STATE = json.load(open(os.environ["SPARK_STATE"] + "/torch.json"))
version = types.SimpleNamespace(cuda=STATE["cuda"])
bfloat16 = "bf16"
BUSY = []  # until when: the products queue, as on a GPU
class Matrix:
    def __matmul__(self, other):
        BUSY[:] = [(BUSY or [time.monotonic()])[0] + 2 * 4096**3 / (STATE["tflops"] * 1e12)]
        return self
def randn(*size, device, dtype):
    if STATE["fails"]:
        raise RuntimeError(STATE["fails"])
    return Matrix()
cuda = types.SimpleNamespace(synchronize=lambda: time.sleep(max(0, BUSY[0] - time.monotonic())))
'''
MEMINFO = "MemTotal: 125500000 kB\nMemFree: {free} kB\nMemAvailable: {available} kB\nCached: {cached} kB\nShmem: 9000 kB\nMlocked: 0 kB\n"


class Spark:
    """One of the two. `state` holds what its stand-ins answer; `run` runs a command on it."""

    def __init__(self, base: Path, letter: str) -> None:
        self.letter, self.name, self.base = letter, f"spark-{letter}", base / letter
        self.state, self.netns = self.base / "state", f"tsd{os.getpid()}{letter}"
        self.address = f"192.168.177.{' ab'.index(letter)}"
        self.env = {"SPARK_STATE": str(self.state), "PYTHONPATH": f"{base}/packages-{letter}:{os.environ.get('PYTHONPATH', '')}",
                    "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip

    def command(self, *words: str) -> list[str]:
        into = f"nsenter --net=/run/netns/{self.netns} --target={self.holder.pid} --mount --uts --"
        return [*into.split(), *words]

    def run(self, *words: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        full = {**os.environ, **self.env, "PATH": f"{os.environ['PATH']}:{SBIN}", **env}
        return subprocess.run(
            self.command(*words), env=full, capture_output=True, text=True, check=check, timeout=120
        )

    def sh(self, script: str) -> str:
        return self.run("bash", "-euc", script).stdout

    def start(self) -> None:
        """The namespaces, held by a process that sleeps."""
        for folder in ("state", "disk"):
            (self.base / folder).mkdir(parents=True)
        subprocess.run(["ip", "netns", "add", self.netns], check=True)
        b = self.base
        overlay = "\n".join(
            f"mount -t overlay overlay -o lowerdir={lower},upperdir={b}/disk/{upper},workdir={b}/disk/work-{upper} {lower}"
            for lower, upper in (("/etc", "etc"), ("/root", "root"), ("/usr/local", "local"))
        )
        script = f"""mount --make-rprivate /
hostname {self.name}
mount -t tmpfs -o size=64g tmpfs {b}/disk
mkdir {b}/disk/{{etc,root,local,work-etc,work-root,work-local,cache,runs}}
mount -t tmpfs -o size=64g tmpfs {b}/disk/cache
{overlay}
mount -t sysfs sysfs /sys
mkdir -p {b}/net; mount --bind /sys/class/net {b}/net
mount -t tmpfs tmpfs /sys/class; mkdir /sys/class/net /sys/class/infiniband; mount --bind {b}/net /sys/class/net
mount -t tmpfs tmpfs /proc/driver; mkdir /proc/driver/nvidia; echo NVRM version: 580.95.05 >/proc/driver/nvidia/version
mount --bind {b}/state/meminfo /proc/meminfo
mount -t tmpfs tmpfs /run; mkdir -p /run/sshd
ip link set lo up
touch {b}/ready; exec sleep infinity"""
        (self.state / "meminfo").write_text(
            MEMINFO.format(free=90_000_000, available=110_000_000, cached=8_000_000)
        )
        into = f"nsenter --net=/run/netns/{self.netns} unshare --mount --uts bash -euc"
        self.holder = subprocess.Popen(
            [*into.split(), script], stdin=subprocess.DEVNULL, stderr=(b / "log").open("w")
        )
        wait_until(lambda: (b / "ready").exists() or self.holder.poll() is not None)
        assert self.holder.poll() is None, (b / "log").read_text()

    def furnish(self) -> None:
        """All that a healthy node has."""
        stands = {"nvidia-smi": SMI, "docker": DOCKER, "nvidia-ctk": CTK}
        for name, text in stands.items():
            self.tell(name, text.replace("{state}", str(self.state)))
            # inside: an overlay's upper folder is its own
            self.sh(f"install -m 755 {self.state}/{name} /usr/local/bin/{name}")
        managers = [{"NodeID": "m", "Addr": "192.168.177.1:2377"}]
        swarm = {"LocalNodeState": "active", "NodeAddr": self.address, "Error": "", "RemoteManagers": managers,
                 "ControlAvailable": self.letter == "a"}  # fmt: skip
        gpu = {"Kind": "NVIDIA_GPU", "Value": UUIDS[self.letter]}
        info = {"ServerVersion": "29.2.1", "DefaultRuntime": "nvidia", "Swarm": swarm,
                "GenericResources": [{"NamedResourceSpec": gpu}]}  # fmt: skip
        self.tell("docker-info", json.dumps(info))
        self.tell("toolkit", "NVIDIA Container Toolkit CLI version 1.19.0\ncommit: 1.19.0\n")
        self.tell("gpus", f"NVIDIA GB10, {UUIDS[self.letter]}, 580.95.05\n")
        torch = {"cuda": "13.0", "tflops": 91, "fails": ""}
        self.tell("torch.json", json.dumps(torch))
        packages = self.base.parent / f"packages-{self.letter}"
        (packages / "torch").mkdir(parents=True)
        (packages / "torch" / "__init__.py").write_text(TORCH)
        for name, version in (("torch", "2.13.0"), ("tunesmith", "0.1.0")):
            (packages / f"{name}-{version}.dist-info").mkdir()
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            (packages / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata)
        self.sh(f"""
mkdir -p /etc/nvidia-container-runtime /root/.ssh; chmod 700 /root/.ssh
cat >/etc/nvidia-container-runtime/config.toml <<'X'
swarm-resource = "DOCKER_RESOURCE_NVIDIA_GPU"

[nvidia-container-runtime]
mode = "auto"
X
printf '127.0.0.1 localhost\\n192.168.177.1 spark-a\\n192.168.177.2 spark-b\\n' >/etc/hosts
ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519 <<<y >/dev/null
ssh-keygen -q -t ed25519 -N '' -f {self.base}/host_key
""")
        for index, (name, device) in enumerate(zip(FUNCTIONS, DEVICES, strict=True)):
            last = self.address[-1]
            self.sh(f"""
ip link set dev {name} mtu 9000 up; ip addr add 192.168.{177 + index}.{last}/24 dev {name}
d=/sys/class/infiniband/{device}; mkdir -p $d/device/net/{name} $d/ports/1/gids $d/ports/1/gid_attrs/types
i=0; for gid in fe80:0000:0000:0000:4ebb:47ff:fe00:000{last} fe80:0000:0000:0000:4ebb:47ff:fe00:000{last} \\
  0000:0000:0000:0000:0000:ffff:c0a8:b10{last} 0000:0000:0000:0000:0000:ffff:c0a8:b10{last} 0000:0000:0000:0000:0000:0000:0000:0000; do
  echo $gid >$d/ports/1/gids/$i; if [ $((i % 2)) = 1 ]; then echo RoCE v2; else echo IB/RoCE v1; fi >$d/ports/1/gid_attrs/types/$i; i=$((i+1))
done""")

    def serve(self, other: Spark) -> None:
        """The ssh server, which takes the other's key."""
        env = " ".join(f'"{name}={value}"' for name, value in self.env.items())
        lines = ["Port 22", f"ListenAddress {self.address}", f"HostKey {self.base}/host_key", "PidFile none", "UsePAM no",
                 "StrictModes no", f"SetEnv {env}"]  # fmt: skip
        (self.base / "sshd_config").write_text("\n".join(lines) + "\n")
        key = other.sh("cat /root/.ssh/id_ed25519.pub")
        keys = "/root/.ssh/authorized_keys"
        self.sh(f"cat >{keys} <<<{key.strip()!r}; chmod 600 {keys}")
        self.start_sshd()
        host = (self.base / "host_key.pub").read_text().rsplit(" ", 1)[0]
        other.sh(f"cat >>/root/.ssh/known_hosts <<<'{self.name},{self.address} {host}'")
        words = ("ssh", "-oBatchMode=yes", self.name, "true")
        wait_until(lambda: other.run(*words, check=False).returncode == 0)

    def start_sshd(self) -> None:
        sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:{SBIN}") or "sshd"
        words = self.command(sshd, "-D", "-e", "-f", f"{self.base}/sshd_config")
        self.sshd = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stderr=(self.base / "sshd.log").open("w")
        )

    def stop_sshd(self) -> None:
        self.sshd.kill()
        self.sshd.wait()

    def tell(self, name: str, text: str) -> None:
        (self.state / name).write_text(text)

    def stop(self) -> None:
        for process in (getattr(self, "sshd", None), getattr(self, "holder", None)):
            if process is not None:
                process.kill()
                process.wait()
        subprocess.run(["ip", "netns", "del", self.netns], check=False)


def wait_until(true: object, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


class SparkPair:
    """`with SparkPair(folder) as pair: pair.doctor()`: the report of `doctor --pair spark-b` on
    spark-a.
    """

    def __init__(self, base: Path) -> None:
        self.a, self.b = Spark(base, "a"), Spark(base, "b")

    def __enter__(self) -> SparkPair:
        try:
            self.a.start()
            self.b.start()
            for name in FUNCTIONS:
                ends = [f"{name} netns {node.netns}" for node in (self.a, self.b)]
                words = f"ip link add {ends[0]} type veth peer name {ends[1]}"
                subprocess.run(words.split(), check=True)
            self.a.furnish()
            self.b.furnish()
            self.b.serve(self.a)
            self.a.serve(self.b)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *args: object) -> None:
        self.a.stop()
        self.b.stop()

    def doctor(self, *words: str, **env: str) -> dict:
        # Runs and the cache lie on a disk of the node's own: the machine's may be nearly full
        command = ["env", f"--chdir={self.a.base}/disk/runs", sys.executable, "-m", "tunesmith"]
        command += ["doctor", *(words or ("--pair", "spark-b")), "--json"]
        done = self.a.run(*command, check=False, HF_HOME=str(self.a.base / "disk" / "cache"), **env)
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return {**json.loads(done.stdout), "exit": done.returncode}
