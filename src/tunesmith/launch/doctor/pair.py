"""A pair of nodes: the same checks on both at once, and what only the two show together."""

import ipaddress
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from json import loads
from pathlib import Path
from typing import Any

from tunesmith.errors import UsageError
from tunesmith.launch.doctor.checks import TORCH_SECONDS, examine
from tunesmith.launch.doctor.speed import LIMIT, measure_speed
from tunesmith.launch.doctor.system import TEXTS, Finding, System, say

SENT = ("system.py", "checks.py", "speed.py", "findings.json")
SKEW = 2.0  # seconds between the clocks
# The other node needs ssh and python3 alone: the checks are imported from a folder that is gone before they run.
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


def ask(host: str, module: str, call: str, word: str) -> "subprocess.Popen[str]":
    """Start a function of the files that are sent on the other node, with one word as its argument."""
    files = {name: Path(__file__).with_name(name).read_text(encoding="utf-8") for name in SENT}
    command = [
        "ssh",
        "-oBatchMode=yes",
        "-oConnectTimeout=10",
        host,
        f"python3 - {shlex.quote(word)}",
    ]
    with tempfile.TemporaryFile(
        "w+", encoding="utf-8"
    ) as program:  # a pipe would break where ssh ends at once
        program.write(PROGRAM.format(files=files, module=module, call=call))
        program.seek(0)
        return subprocess.Popen(
            command, stdin=program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )


def check_pair(host: str, folders: tuple[str, ...]) -> tuple[list[Finding], list[dict[str, Any]]]:
    """All findings, and the properties of this node and, if it was reached, of the other one."""
    if not host.isprintable() or host[:1] in ("", "-") or " " in host:
        raise UsageError(
            f"{host!r} is not a host", where="--pair", fix="tunesmith doctor --pair spark-b"
        )
    asked = ask(host, "checks", "answer_peer", sys.executable)
    here = examine(System(folders=folders), pair=True)
    try:
        out, said = asked.communicate(timeout=TORCH_SECONDS + LIMIT)
    except subprocess.TimeoutExpired:
        asked.kill()
        out, said = "", "no answer in time"
    found = [Finding(**row) for row in here["findings"]]
    if not out.startswith("{"):
        case = next(
            key for key in TEXTS if key.startswith("ssh/") and key[4:] != "ok" and key[4:] in said
        )
        found.append(replace(say(case, host, said=said.strip().rpartition("\n")[2]), host=host))
        return found, [here["properties"]]
    there = loads(out)
    ours, theirs = here["properties"], there["properties"]
    both = [
        say("ssh/ok", host),
        *_compare(ours, theirs, host),
        *_clock_and_speed(ours, theirs, host),
    ]
    found += [Finding(**row) for row in there["findings"]]
    return [*found, *(replace(f, host="the pair") for f in both)], [ours, theirs]


def _compare(here: dict[str, Any], there: dict[str, Any], host: str) -> list[Finding]:
    """What must be the same on both, and the swarm and the subnet that they must share."""
    mine, other, python = here["versions"], there["versions"], sys.executable
    wrong = [name for name in mine if mine[name] and other[name] and mine[name] != other[name]]
    found = [
        say(f"versions/{name}", host, here=mine[name], there=other[name], python=python)
        for name in wrong
    ]
    if differ := sorted({*here["packages"]} ^ {*there["packages"]}):
        names = " ".join(sorted({line.partition(" ")[0] for line in differ}))
        found.append(say("packages/differ", host, differ=", ".join(differ[:4]), names=names))
    if not found:
        found.append(
            say(
                "versions/ok",
                versions=", ".join(f"{name} {mine[name]}" for name in mine if mine[name]),
            )
        )
    if here["managers"] and there["managers"]:
        found.append(
            say("swarm/one" if {*here["managers"]} & {*there["managers"]} else "swarm/two", host)
        )
    if here["cable"] and there["cable"] and not shared_address(here, there):
        found.append(say("address/apart", host))
    return found


def shared_address(here: dict[str, Any], there: dict[str, Any]) -> str:
    """The other node's address on the cable, in a subnet of this one's; empty where there is none."""
    near = [ipaddress.ip_interface(a).network for row in here["cable"] for a in row["addresses"]]
    far = [ipaddress.ip_interface(a) for row in there["cable"] for a in row["addresses"]]
    return next((str(address.ip) for address in far if address.network in near), "")


def _clock_and_speed(here: dict[str, Any], there: dict[str, Any], host: str) -> list[Finding]:
    """The clock there beside this one, and what plain TCP reaches and means; RDMA does not show here."""
    cable = shared_address(here, there)
    address = cable or (there["reached"] or [host])[-1]
    sent, asked, found = time.time(), ask(host, "speed", "serve_speed", address), []
    deadline = threading.Timer(LIMIT, asked.kill)
    deadline.start()
    try:
        assert asked.stdout is not None
        port, clock = asked.stdout.readline().split()
        # It was asked between the two
        ahead = max(0.0, float(clock) - time.time()) + min(0.0, float(clock) - sent)
        case, way = "off" if abs(ahead) > SKEW else "ok", "ahead of" if ahead > 0 else "behind"
        found.append(say(f"time/{case}", host, seconds=abs(ahead), way=way))
        gbs, trip, idle = measure_speed(address, int(port))
    except (OSError, ValueError) as error:
        subnet = f"{address.rpartition('.')[0]}.0/24"
        return [*found, say("speed/blocked", host, address=address, said=error, subnet=subnet)]
    finally:
        deadline.cancel()
        asked.kill()
        asked.wait()
    slow, fast = ("slow", "rail" if 1.5 < gbs < 1.9 else "cable") if cable else ("ethernet", "ok")
    case = "busy" if idle < 0.25 else slow if gbs < 0.15 else fast
    return [*found, say(f"speed/{case}", gbs=gbs, trip=trip, address=address)]
