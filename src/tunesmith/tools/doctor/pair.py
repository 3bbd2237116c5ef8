"""Checks of a pair of nodes: the checks of each node, and a comparison of both."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any

from tunesmith.errors import MachineError
from tunesmith.host.child_output import last_line
from tunesmith.launch.ssh import check_other_node, try_on
from tunesmith.tools.doctor import checks
from tunesmith.tools.doctor.checks import System, examine, properties
from tunesmith.tools.doctor.findings import TEXTS, Finding, finding


def check_pair(host: str) -> list[Finding]:
    """Check this node, the other node, and whether the two match. Return all findings."""
    check_other_node(host, "--pair")
    system = System()
    # The program is one file, so that the other node needs only ssh and python3.
    program = Path(checks.__file__).read_text(encoding="utf-8")
    with ThreadPoolExecutor(1) as pool:
        # Run the checks of both nodes concurrently.
        peer = pool.submit(try_on, host, "python3", "-", sys.executable, text=program)
        findings = [finding(key, **values) for key, values in examine(system, pair=True)]
    try:
        done = peer.result()
        # Parse only the last line, because modules that Python imports at its start may print other
        # lines.
        found, there = json.loads(done.stdout.strip().rpartition("\n")[2])
    except MachineError as error:
        message = error.why or error.what
        # Select the first key `ssh/WORDS` of TEXTS whose WORDS occur in ssh's error message. The
        # last key is `ssh/`, which always matches, because its WORDS are empty.
        cases = [key for key in TEXTS if key.startswith("ssh/") and key != "ssh/ok"]
        key = next(key for key in cases if key.removeprefix("ssh/") in message)
        return [*findings, finding(key, host, message=message)]
    except ValueError:
        return [*findings, finding("ssh/python3", host, message=last_line(done.stderr))]
    findings += [finding(key, host, **values) for key, values in found]
    both = [finding("ssh/ok", host), *_compare(properties(system), there, host)]
    return findings + [replace(result, host="the pair") for result in both]


def _compare(here: dict[str, Any], there: dict[str, Any], host: str) -> list[Finding]:
    """Compare the properties of both nodes, which must be in one swarm and in one subnet."""
    findings = []
    # Skip a node without a swarm or without a cable, because `examine` already reports it.
    managers = here["managers"], there["managers"]
    if all(managers) and set(managers[0]).isdisjoint(managers[1]):
        findings.append(finding("swarm/two", host))
    cables = here["cable"], there["cable"]
    if all(cables) and _subnets(cables[0]).isdisjoint(_subnets(cables[1])):
        findings.append(finding("address/apart", host, **cables[0][0]))
    return findings


def _subnets(cable: list[dict[str, Any]]) -> set[IPv4Network]:
    """Return the IPv4 networks of a port's interfaces, such as 192.168.100.0/24."""
    return {
        IPv4Interface(f"{address['local']}/{address['prefixlen']}").network
        for interface in cable
        for address in interface["addr_info"]
        if address["family"] == "inet"
    }
