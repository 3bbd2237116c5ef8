"""A pair of nodes: the same checks on both at once, and what only the two show together."""

import ipaddress
import json
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.errors import UsageError
from tunesmith.launch.doctor.checks import TORCH_SECONDS, examine
from tunesmith.launch.doctor.speed import LIMIT, measure_speed
from tunesmith.launch.doctor.system import TEXTS, Finding, System, finding

SENT = ("system.py", "checks.py", "speed.py", "findings.json")
SKEW = 2.0  # seconds between the clocks
# The other node needs ssh and python3 alone: the checks are imported from a folder that is gone
# before they run.
PROGRAM = """
import pathlib, sys, tempfile
with tempfile.TemporaryDirectory(prefix="tunesmith-doctor-") as folder:
    place = pathlib.Path(folder, "tunesmith/launch/doctor")
    place.mkdir(parents=True)
    for path in (place, *place.parents[:2]):
        (path / "__init__.py").touch()
    for name, text in {files!r}.items():
        (place / name).write_text(text, encoding="utf-8")
    sys.path.insert(0, folder)
    from tunesmith.launch.doctor.{module} import {call}
{call}()
"""


def start_remote(host: str, module: str, call: str, word: str) -> "subprocess.Popen[str]":
    """Start a function of the files that are sent on the other node, with one word for it."""
    files = {name: Path(__file__).with_name(name).read_text(encoding="utf-8") for name in SENT}
    remote = f"python3 - {shlex.quote(word)}"
    command = ["ssh", "-oBatchMode=yes", "-oConnectTimeout=10", host, remote]
    # A file, as a pipe would break where ssh ends at once.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as program:
        program.write(PROGRAM.format(files=files, module=module, call=call))
        program.seek(0)
        return subprocess.Popen(
            command, stdin=program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )


def check_pair(host: str, folders: tuple[str, ...]) -> tuple[list[Finding], list[dict[str, Any]]]:
    """All findings, and the properties of this node and, if it was reached, of the other one."""
    is_host = host and host.isprintable() and " " not in host
    # ssh would take -oProxyCommand=... for an option.
    if not is_host or host.startswith("-"):
        raise UsageError(
            f"{host!r} is not a host", where="--pair", fix="tunesmith doctor --pair spark-b"
        )
    # The other node examines itself while this one does.
    peer = start_remote(host, "checks", "answer_peer", sys.executable)
    here = examine(System(folders=folders), pair=True)
    try:
        out, errors = peer.communicate(timeout=TORCH_SECONDS + LIMIT)
    except subprocess.TimeoutExpired:
        peer.kill()
        out = ""
        errors = "no answer in time"
    findings = [Finding(**row) for row in here["findings"]]
    # A shell of the other node may print text of its own, and ssh prints nothing where it fails.
    if not out.startswith("{"):
        return [*findings, _why_ssh_failed(host, errors)], [here["properties"]]
    there = json.loads(out)
    ours = here["properties"]
    theirs = there["properties"]
    both = [finding("ssh/ok", host)]
    both += _compare(ours, theirs, host)
    both += _clock_and_speed(ours, theirs, host)
    findings += [Finding(**row) for row in there["findings"]]
    findings += [replace(result, host="the pair") for result in both]
    return findings, [ours, theirs]


def _why_ssh_failed(host: str, errors: str) -> Finding:
    """The first `ssh/WORDS` whose words are in what ssh said; the last of them has no words."""
    cases = [key.removeprefix("ssh/") for key in TEXTS if key.startswith("ssh/")]
    case = next(words for words in cases if words != "ok" and words in errors)
    message = errors.strip().rpartition("\n")[2]
    return replace(finding(f"ssh/{case}", host, message=message), host=host)


def _compare(here: dict[str, Any], there: dict[str, Any], host: str) -> list[Finding]:
    """What must be the same on both, and the swarm and the subnet that they must share."""
    findings = _compare_versions(here["versions"], there["versions"], host)
    findings += _compare_packages(here["packages"], there["packages"], host)
    if not findings:
        versions = [f"{name} {version}" for name, version in here["versions"].items() if version]
        findings.append(finding("versions/ok", versions=", ".join(versions)))
    # A node without a swarm, or without a cable, has a finding of its own.
    if here["managers"] and there["managers"]:
        is_shared = not {*here["managers"]}.isdisjoint(there["managers"])
        findings.append(finding("swarm/one" if is_shared else "swarm/two", host))
    if here["cable"] and there["cable"] and not shared_address(here, there):
        findings.append(finding("address/apart", host))
    return findings


def _compare_versions(here: dict[str, str], there: dict[str, str], host: str) -> list[Finding]:
    findings = []
    for name, version in here.items():
        other = there[name]
        # One that is missing has a finding of its own.
        if version and other and version != other:
            values = {"here": version, "there": other, "python": sys.executable}
            findings.append(finding(f"versions/{name}", host, **values))
    return findings


def _compare_packages(here: list[str], there: list[str], host: str) -> list[Finding]:
    """packages: `name version` each."""
    differing = sorted({*here} ^ {*there})
    if not differing:
        return []
    names = sorted({package.partition(" ")[0] for package in differing})
    # The first four show which kind of package it is.
    shown = ", ".join(differing[:4])
    return [finding("packages/differ", host, differ=shown, names=" ".join(names))]


def shared_address(here: dict[str, Any], there: dict[str, Any]) -> str:
    """The other node's address on the cable, in a subnet of this one's; empty: there is none."""
    near, far = (
        [ipaddress.IPv4Interface(text) for row in node["cable"] for text in row["addresses"]]
        for node in (here, there)
    )
    subnets = {address.network for address in near}
    for address in far:
        if address.network in subnets:
            return str(address.ip)
    return ""


def _clock_and_speed(here: dict[str, Any], there: dict[str, Any], host: str) -> list[Finding]:
    """Compare the other node's clock with this one's, and measure the speed of TCP between them.

    RDMA, which NCCL uses over the cable, does not show here.
    """
    cable = shared_address(here, there)
    # Without a cable, the address that ssh reached: `reached` ends with the server's side.
    address = cable or (there["reached"] or [host])[-1]
    findings = []
    sent_at = time.time()
    peer = start_remote(host, "speed", "serve_speed", address)
    # A node that stops to answer would hold `readline` for ever.
    deadline = threading.Timer(LIMIT, peer.kill)
    deadline.start()
    try:
        assert peer.stdout is not None
        port, clock = peer.stdout.readline().split()
        findings.append(_clock(host, sent_at, float(clock), time.time()))
        gbs, trip, idle = measure_speed(address, int(port))
    except (OSError, ValueError) as error:
        subnet = f"{address.rpartition('.')[0]}.0/24"
        blocked = finding("speed/blocked", host, address=address, message=error, subnet=subnet)
        return [*findings, blocked]
    finally:
        deadline.cancel()
        peer.kill()
        peer.wait()
    # 1 Gb/s Ethernet carries 0.12 GB/s.
    # `idle` is the share of this node's CPUs: a busy one says nothing of the network, so that case
    # comes before the others.
    is_ethernet = gbs < 0.15
    if idle < 0.25:
        case = "busy"
    elif is_ethernet:
        case = "slow" if cable else "ethernet"
    elif not cable:
        case = "ok"
    elif 1.5 < gbs < 1.9:
        # 13 to 14 Gb/s: the cable was plugged in while the machines ran.
        case = "rail"
    else:
        case = "cable"
    return [*findings, finding(f"speed/{case}", gbs=gbs, trip=trip, address=address)]


def _clock(host: str, sent_at: float, clock: float, answered_at: float) -> Finding:
    """How far the other node's clock is off; it was read between two readings of this one's."""
    # The other clock must lie between the two readings; outside of them it is off by at least this.
    if clock > answered_at:
        seconds, way = clock - answered_at, "ahead of"
    else:
        seconds, way = max(0.0, sent_at - clock), "behind"
    return finding("time/off" if seconds > SKEW else "time/ok", host, seconds=seconds, way=way)
