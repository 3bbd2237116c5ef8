"""`tunesmith doctor --pair` on two nodes in namespaces: broken in every way that we can make, each
named with its mend.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from errors import check_shown, holds
from launch.spark_pair import NEEDED, SBIN, UUIDS, Spark, SparkPair, wait_until
from tunesmith.tools.doctor import pair as pair_module
from tunesmith.tools.doctor.pair import PROGRAM, SENT_FILES

missing = [
    tool for tool in NEEDED if shutil.which(tool, path=f"{os.environ['PATH']}:{SBIN}") is None
]
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.long,
    pytest.mark.skipif(
        os.geteuid() != 0 or bool(missing),
        reason=f"needs root and {', '.join(missing) or 'nothing else'} (make cluster-tools)",
    ),
]


class Case(NamedTuple):
    """One broken thing: a script on node `on` (in $S its stand-ins' answers), its undoing, and the
    finding it must make.
    """

    turn: str  # cases of one turn are broken together
    on: str
    do: str
    undo: str
    finding: str  # host: check: level
    what: str
    fix: str


INFO = "sed -i 's/%s/%s/' $S/docker-info"
KEEP = "[ ! -e {0} ] || cp -a {0} {0}.kept; "
BACK = "rm -rf {0}; [ ! -e {0}.kept ] || mv {0}.kept {0}"
TOML = "/etc/nvidia-container-runtime/config.toml"


def kept(path: str, do: str) -> tuple[str, str]:
    """The script `do`, which changes `path`, and the one that puts `path` back."""
    return KEEP.format(path) + do, BACK.format(path)


def said(name: str, text: str) -> tuple[str, str]:
    return kept(f"$S/{name}", f"cat >$S/{name} <<'X'\n{text}\nX")


GB10 = "NVIDIA GB10, {}, {}"
MEM = "MemTotal: 125500000 kB\nMemFree: {} kB\nMemAvailable: {} kB\nCached: {} kB"
TORCH = '{{"cuda": "{}", "tflops": {}, "fails": "{}"}}'
NO_CODE = r"CUDA error: no kernel image is available for execution on the device\nFor debugging consider CUDA_LAUNCH_BLOCKING=1"
CASES = {
    # one turn: Docker, memory, versions
    "nvidia is not the default runtime": Case("docker", "a", *kept("$S/docker-info", INFO % ('"DefaultRuntime": "nvidia"', '"DefaultRuntime": "runc"')), "spark-a: daemon.json: fault", "not docker's default runtime", "--set-as-default"),
    "the GPU of another machine in daemon.json": Case("docker", "b", INFO % (UUIDS["b"], UUIDS["a"]), INFO % (UUIDS["a"], UUIDS["b"]), "spark-b: daemon.json: fault", f"{UUIDS['a']} as NVIDIA_GPU, but this machine's GPU is {UUIDS['b']}", UUIDS["b"]),
    "toolkit without Swarm": Case("docker", "a", *said("toolkit", "NVIDIA Container Toolkit CLI version 1.18.1"), "spark-a: toolkit: fault", "1.18.1 has no support for Docker Swarm", "--only-upgrade nvidia-container-toolkit"),
    "no toolkit": Case("docker", "b", *said("toolkit", ""), "spark-b: toolkit: fault", "not installed", "apt-get install nvidia-container-toolkit"),
    "the line of the toolkit is commented out": Case("docker", "a", *kept(TOML, f"sed -i 's/^swarm-res/#swarm-res/' {TOML}"), "spark-a: swarm-resource: fault", "does not set swarm-resource to DOCKER_RESOURCE_NVIDIA_GPU", "sed -i"),
    "the toolkit's line names another resource": Case("docker", "b", *kept(TOML, f"sed -i s/NVIDIA_GPU/GPU/ {TOML}"), "spark-b: swarm-resource: fault", "does not set swarm-resource to DOCKER_RESOURCE_NVIDIA_GPU", "sed -i"),
    "no swarm": Case("docker", "b", *kept("$S/docker-info", INFO % ('"active"', '"inactive"') + "; " + INFO % (r'"RemoteManagers": \[[^]]*\]', '"RemoteManagers": null')), "spark-b: swarm: fault", "not in a swarm: inactive", "docker swarm init"),
    "files fill the memory": Case("docker", "a", *said("meminfo.new", MEM.format(900_000, 118_000_000, 110_000_000)), "spark-a: memory: warning", "only 0.9 GiB of memory are free, because 104.9 GiB hold", "drop_caches"),
    "another torch": Case("docker", "b", *kept("$P/torch-2.13.0.dist-info", "sed -i s/2.13.0/2.11.0/ $P/torch-2.13.0.dist-info/METADATA"), "the pair: versions: fault", "torch is 2.13.0 on this node and 2.11.0 on spark-b", "-m pip install"),
    "another tunesmith": Case("docker", "b", *kept("$P/tunesmith-0.1.0.dist-info", "sed -i s/0.1.0/0.0.9/ $P/tunesmith-0.1.0.dist-info/METADATA"), "the pair: versions: fault", "tunesmith is 0.1.0 on this node and 0.0.9 on spark-b", "the same version"),
    "another driver, too old": Case("docker", "b", *said("gpus", GB10.format(UUIDS["b"], "570.86.10")), "spark-b: driver: fault", "570.86.10 is too old", "nvidia-driver-580-open"),
    # the network
    "one function of the cable is down": Case("network", "b", "ip link set enP2p1s0f1np1 down", "ip link set enP2p1s0f1np1 up", "spark-b: cable: fault", "enP2p1s0f1np1 is down", "sudo ip link set dev enP2p1s0f1np1 up"),
    "MTU 1500 on one side": Case("network", "b", "ip link set enp1s0f1np1 mtu 1500", "ip link set enp1s0f1np1 mtu 9000", "spark-b: mtu: fault", "enp1s0f1np1 has MTU 1500", "sudo ip link set dev enp1s0f1np1 mtu 9000"),
    "no GID": Case("network", "b", "D=/sys/class/infiniband/rocep1s0f1/ports/1; mv $D/gids $D/off", "D=/sys/class/infiniband/rocep1s0f1/ports/1; mv $D/off $D/gids", "spark-b: gid: fault", "rocep1s0f1 has no RoCE v2 address", "sudo netplan set ethernets.enp1s0f1np1="),
    "a GID index that is not RoCE v2": Case("network", "a", "", "", "spark-a: gid: fault", "NCCL_IB_GID_INDEX is 0, but RoCE v2 has the index 1 and 3 on rocep1s0f1", "unset NCCL_IB_GID_INDEX"),
    "two swarms": Case("network", "b", *kept("$S/docker-info", INFO % ("192.168.177.1:2377", "10.0.0.9:2377")), "the pair: swarm: fault", "in different swarms", "swarm leave"),
    # the GPU, Docker off
    "nvidia-smi fails": Case("gpu", "a", *said("smi-fails", "Failed to initialize NVML: Driver/library version mismatch"), "spark-a: driver: fault", "version mismatch", "sudo reboot"),
    "nvidia-smi is not on the PATH of ssh": Case("gpu", "b", "mkdir -p /usr/local/cuda/bin; mv /usr/local/bin/nvidia-smi /usr/local/cuda/bin", "mv /usr/local/cuda/bin/nvidia-smi /usr/local/bin", "spark-b: driver: fault", "nvidia-smi is not found", "/usr/bin/nvidia-smi"),
    "no docker daemon": Case("gpu", "b", *said("docker-refuses", "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?"), "spark-b: docker: fault", "does not answer", "systemctl enable --now docker"),
    "no memory": Case("gpu", "a", *said("meminfo.new", MEM.format(900_000, 1_000_000, 500_000)), "spark-a: memory: fault", "only 1.0 of 119.7 GiB of memory are available", "ps -eo rss"),
    "no address": Case("gpu", "b", "ip addr flush dev enP2p1s0f1np1; ip addr replace 10.9.0.7/24 dev enp1s0f1np1; ip addr del 192.168.177.2/24 dev enp1s0f1np1; ip addr add 192.168.177.2/32 dev lo; ip route add 192.168.177.1 dev enp1s0f1np1", "ip addr flush dev enp1s0f1np1; ip addr del 192.168.177.2/32 dev lo; ip addr add 192.168.177.2/24 dev enp1s0f1np1; ip addr add 192.168.178.2/24 dev enP2p1s0f1np1", "the pair: address: fault", "no addresses in the same subnet", "sudo netplan set ethernets.enp1s0f1np1="),
    # ssh, one by one, with one thing of this machine each
    "no ssh server": Case("refused", "b", "", "", "spark-b: ssh: fault", "runs no ssh server", "openssh-server"),
    "a low-power state": Case("refused", "a", *said("torch.json", TORCH.format("13.0", 26, "")), "spark-a: clock: fault", "TFLOP/s in bf16; a GB10 reaches 92", "pull the power plug"),
    "no key": Case("key", "b", *kept("/root/.ssh/authorized_keys", "echo >/root/.ssh/authorized_keys"), "spark-b: ssh: fault", "accepts no ssh key of this user", "ssh-copy-id spark-b"),
    "no code for the chip": Case("key", "a", *said("torch.json", TORCH.format("13.0", 91, NO_CODE)), "spark-a: torch: fault", "has no code for NVIDIA GB10", "--force-reinstall torch"),
    "an unknown host key": Case("unknown", "a", *kept("/root/.ssh/known_hosts", "echo >/root/.ssh/known_hosts"), "spark-b: ssh: fault", "is unknown or has changed", "compare the fingerprint"),
    "torch for CPUs": Case("unknown", "a", *said("torch.json", '{"cuda": null, "tflops": 1, "fails": "Torch not compiled with CUDA enabled"}'), "spark-a: torch: fault", "built for CPUs only", "a build for CUDA 13"),
    "no python3 there": Case("python", "b", *kept("/root/.bashrc", "echo PATH=/nothing >/root/.bashrc"), "spark-b: ssh: fault", "python3 on spark-b", "apt-get install python3"),
    "the GPU is lost": Case("python", "a", *said("torch.json", TORCH.format("13.0", 91, "CUDA error 100: no device")), "spark-a: torch: fault", "does not run on the GPU: RuntimeError: CUDA error 100", "sudo reboot"),
    "no such host": Case("name", "a", "", "", "spark-c: ssh: fault", "the host name spark-c cannot be resolved", "/etc/hosts"),
}  # fmt: skip
# What follows from a case on the side: the other end of a cable, what could not be looked at any
# more.
CONSEQUENCES = {
    "network": {"spark-a: cable: fault"},
    "docker": {"the pair: versions: fault"},
}


@pytest.fixture(scope="module")
def sparks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkPair]:
    with SparkPair(tmp_path_factory.mktemp("sparks")) as pair:
        yield pair


@pytest.fixture(scope="module")
def reports(sparks: SparkPair) -> Any:
    """Turn -> the report of the pair with all cases of that turn broken; each is made once."""
    made: dict[str, dict] = {}

    def report(turn: str) -> dict:
        if turn not in made:
            made[turn] = broken(sparks, turn)
        return made[turn]

    return report


def broken(sparks: SparkPair, turn: str) -> dict:
    cases = [case for case in CASES.values() if case.turn == turn]
    nodes = {"a": sparks.a, "b": sparks.b}

    def script(node: Spark, text: str) -> None:
        node.sh(
            f"S={node.state} P={node.base.parent}/packages-{node.letter}\n{text}\n[ ! -e $S/meminfo.new ] || cat $S/meminfo.new >$S/meminfo"
        )

    for spark in nodes.values():
        spark.tell("meminfo.new", (spark.state / "meminfo").read_text())
    words = ("--pair", "spark-c") if turn == "name" else ()
    try:
        for case in cases:
            script(nodes[case.on], case.do)
        if turn == "refused":
            sparks.b.stop_sshd()
        return sparks.doctor(*words, **({"NCCL_IB_GID_INDEX": "0"} if turn == "network" else {}))
    finally:
        for case in reversed(cases):
            script(nodes[case.on], case.undo)
        if turn == "refused":
            sparks.b.start_sshd()
            wait_until(
                lambda: (
                    sparks.a.run(
                        "ssh", "-oBatchMode=yes", "spark-b", "true", check=False
                    ).returncode
                    == 0
                )
            )


def line_of(finding: dict) -> str:
    return f"{finding['host']}: {finding['check']}: {finding['level']}"


def not_ok(report: dict) -> set[str]:
    return {line_of(one) for one in report["findings"] if one["level"] != "ok"}


@pytest.mark.parametrize("turn", sorted({case.turn for case in CASES.values()}))
def test_each_fault_is_named_with_its_mend_and_nothing_else(turn: str, reports: Any) -> None:
    report = reports(turn)
    shown = json.dumps(report["findings"], indent=1)
    expected = set(CONSEQUENCES.get(turn, ()))
    for name, case in CASES.items():
        if case.turn == turn:
            expected.add(case.finding)
            found = [one for one in report["findings"] if line_of(one) == case.finding]
            assert any(case.what in f["what"] and case.fix in f["fix"] for f in found), (
                name,
                shown,
            )
    assert not_ok(report) <= expected, shown
    assert report["exit"] == 1


def test_a_pair_is_green_when_it_is_healthy_again(sparks: SparkPair, reports: Any) -> None:
    """So each finding above came from its case, and not from an earlier one."""
    for turn in {case.turn for case in CASES.values()}:
        reports(turn)
    report = sparks.doctor()
    assert not_ok(report) == set()
    assert len(report["findings"]) >= 22
    assert report["exit"] == 0
    assert report["passed"]


def test_a_user_who_is_not_in_the_group_docker(sparks: SparkPair) -> None:
    """The real docker command, a socket of root's, and the checks as another node runs them:
    python3 alone.
    """
    docker = next(
        (p for p in ("/usr/bin/docker", "/usr/local/bin/docker") if Path(p).exists()), None
    )
    if docker is None:
        pytest.skip("needs the docker command (make cluster-tools)")
    files = {name: Path(pair_module.__file__).with_name(name).read_text() for name in SENT_FILES}
    program = PROGRAM.format(files=files)
    listen = "import socket; s = socket.socket(socket.AF_UNIX); s.bind('/var/run/docker.sock'); s.listen()"
    script = f'python3 -c "{listen}"; chmod 660 /var/run/docker.sock; mkdir -p /tmp/empty; setpriv --reuid 65534 --regid 65534 --clear-groups env PATH=/usr/bin:/bin /usr/bin/python3 - python3'
    command = sparks.a.command(
        "bash", "-euc", f"export HOME=/tmp; {script}; rm /var/run/docker.sock"
    )
    done = subprocess.run(
        command, input=program, capture_output=True, text=True, timeout=120, check=False
    )
    found = [f for f in json.loads(done.stdout)[0] if f["check"] == "docker"]
    assert [f["level"] for f in found] == ["fault"], done.stderr
    assert holds(found[0]["what"], "group")
    assert "usermod -aG docker" in found[0]["fix"]


def test_a_host_is_no_option(sparks: SparkPair) -> None:
    done = sparks.a.run(
        "python", "-m", "tunesmith", "doctor", "--pair=-oProxyCommand=touch /tmp/pwned", check=False
    )
    assert done.returncode == 2
    check_shown(done.stderr, where="--pair", names=["-oProxyCommand"])
    assert not Path("/tmp/pwned").exists()
