"""One ordered script for each host that fixes what the checks report; for review, never run."""

import ipaddress
import re
import shlex
from itertools import count
from pathlib import Path
from typing import Any

from tunesmith.errors import MachineError
from tunesmith.launch.doctor.system import OK, Finding

# check/case -> the parts of fix.sh that fix it. A script has them in the order of fix.sh.
PARTS = {
    "ssh/Permission denied": ("keys",),
    "cable/down": ("cable",),
    "mtu/other": ("cable",),
    "address/none": ("cable",),
    "address/lost": ("cable",),
    "address/apart": ("cable",),
    "gid/none": ("cable",),
    "toolkit/absent": ("toolkit", "restart"),
    "toolkit/swarm": ("toolkit", "restart"),
    "daemon.json/runtime": ("daemon", "restart"),
    "daemon.json/resource": ("daemon", "restart"),
    "daemon.json/old": ("restart",),
    "swarm-resource/absent": ("swarm-resource", "restart"),
    "swarm-resource/other": ("swarm-resource", "restart"),
    "docker/group": ("group",),
    "swarm/absent": ("swarm",),
}


def fix_scripts(findings: list[Finding], nodes: list[dict[str, Any]], peer: str) -> dict[str, str]:
    """Host -> script.

    Args:
        nodes: the properties of this machine and of the peer, if it was reached.
        peer: its ssh name.
    """
    template = Path(__file__).with_name("fix.sh").read_text(encoding="utf-8")
    # `#@ NAME` heads a part; the text before the first one is in every script.
    head, *pieces = re.split(r"^#@ ([\w-]+)\n", template, flags=re.M)
    parts = dict(zip(pieces[::2], pieces[1::2], strict=True))
    ends = cable_addresses(nodes)
    # Where there is no cable: the addresses of the ssh connection, here and there
    fallbacks = ["", ""]
    if len(nodes) > 1:
        fallbacks = [*nodes[1]["reached"], *fallbacks]
    addresses = []
    for end, fallback in zip(ends, fallbacks, strict=False):
        addresses.append(next(iter(end.values()), fallback).partition("/")[0])
    scripts = {}
    for index, (properties, end) in enumerate(zip(nodes, ends, strict=True)):
        is_first = index == 0
        hosts = [properties["host"], "the pair"]
        # A peer that ssh does not reach is under its ssh name; the key is created here.
        if is_first:
            hosts.append(peer)
        chosen = {"end"}
        by_hand = []
        for finding in findings:
            if finding.level == OK or finding.host not in hosts:
                continue
            parts_of_fix = PARTS.get(f"{finding.check}/{finding.case}", ())
            chosen.update(parts_of_fix)
            if not parts_of_fix:
                # What the host said may have several lines, which would be commands.
                by_hand.append(" ".join(f"# by hand: {finding.what}: {finding.fix}".split()) + "\n")
        if not end:
            chosen.discard("cable")
        # The first node makes the swarm, the other joins it.
        if "swarm" in chosen and addresses[0]:
            chosen.add("init" if is_first else "join")
        steps = [part for name, part in parts.items() if name in chosen]
        text = "".join([head, *by_hand, *steps])
        values = {
            "PEER": peer,
            "MANAGER": addresses[0],
            "ADDRESS": addresses[index],
            "FUNCTIONS": " ".join(end),
            "NETPLAN": _netplan(end),
            "UUIDS": " ".join(require_word(uuid, r"[\w-]+") for uuid in properties["uuids"]),
        }
        # Only the variables that the chosen parts use.
        assignments = [
            f"{name}={shlex.quote(value)}\n"
            for name, value in values.items()
            if re.search(rf"\${name}\b", text)
        ]
        scripts[properties["host"]] = text.replace("# VALUES\n", "".join(assignments))
    return scripts


def _netplan(end: dict[str, str]) -> str:
    """The file of netplan that gives the functions of the cable their addresses."""
    lines = ["network:", "  version: 2", "  ethernets:"]
    for name, address in end.items():
        lines.append(f"    {name}: {{dhcp4: false, mtu: 9000, addresses: [{address}]}}")
    return "\n".join(lines)


def cable_addresses(nodes: list[dict[str, Any]]) -> list[dict[str, str]]:
    """For each node {function of the cable: address/prefix}.

    The address is what the function has, else one in the subnet of the other end's function, else
    one in a subnet that no interface of the nodes is in.
    """
    used = []
    for properties in nodes:
        for addresses in properties["interfaces"].values():
            used += [ipaddress.IPv4Interface(address).network for address in addresses]
    candidates = (ipaddress.IPv4Network(f"192.168.{n % 256}.0/24") for n in count(177))
    free_subnets = (net for net in candidates if not any(net.overlaps(other) for other in used))
    ends: list[dict[str, str]] = [{} for _ in nodes]
    # A function is linked to the one at the same place of the other end.
    # The subnet of the addresses that are there already; a free one for a new cable.
    for functions in zip(*(properties["cable"] for properties in nodes), strict=False):
        present = [ipaddress.IPv4Interface(a) for row in functions for a in row["addresses"]]
        # 169.254.0.0/16 may be another address at each start.
        present = [address for address in present if not address.is_link_local]
        subnet = present[0].network if present else next(free_subnets)
        used_ips = [address.ip for address in present]
        free_ips = (ip for ip in subnet.hosts() if ip not in used_ips)
        for end, function in zip(ends, functions, strict=True):
            # Linux bounds the name of an interface to 15 bytes.
            name = require_word(function["name"], r"[\w.-]{1,15}")
            for address in function["addresses"]:
                if ipaddress.IPv4Interface(address).network == subnet:
                    end[name] = address
                    break
            # No `break`: the function has no address in the subnet yet.
            else:
                end[name] = f"{next(free_ips)}/{subnet.prefixlen}"
    return ends


def require_word(word: str, form: str) -> str:
    """A word from a machine that goes into a script; MachineError unless it has its form."""
    if not re.fullmatch(form, word):
        raise MachineError(
            f"{word!r} is not the name of an interface or GPU",
            where="doctor --fix",
            fix="fix it by hand",
        )
    return word
