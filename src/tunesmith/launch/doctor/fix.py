"""One ordered script for each host that mends what was found there; printed for review, never run."""

import ipaddress
import re
import shlex
from itertools import count
from pathlib import Path
from typing import Any

from tunesmith.errors import MachineError
from tunesmith.launch.doctor.system import OK, Finding

# check -> the parts of fix.sh, which stand there in their order
PARTS = {
    "ssh": "keys", "cable": "cable", "mtu": "cable", "address": "cable", "gid": "cable", "toolkit": "toolkit restart",
    "daemon.json": "daemon restart", "swarm-resource": "swarm-resource restart", "docker": "group", "swarm": "swarm",
}  # fmt: skip


def fix_scripts(found: list[Finding], nodes: list[dict[str, Any]], peer: str) -> dict[str, str]:
    """Host -> script. `nodes` are the properties of this machine and of the peer, if it was reached; `peer` is its ssh name."""
    template = Path(__file__).with_name("fix.sh").read_text(encoding="utf-8")
    ends, pieces = cable_addresses(nodes), re.split(r"^#@ ([\w-]+)\n", template, flags=re.M)
    parts, scripts = dict(zip(pieces[1::2], pieces[2::2], strict=True)), {}
    # By ssh, here and there: where there is no cable
    reached = [
        *(nodes[1]["reached"] if nodes[1:] else []),
        "",
        "",
    ]
    places = [
        next(iter(end.values()), address).partition("/")[0]
        for end, address in zip(ends, reached, strict=False)
    ]
    for index, (properties, end) in enumerate(zip(nodes, ends, strict=True)):
        hosts = (properties["host"], "the pair", "" if index else peer)
        wrong = {f.check for f in found if f.level != OK and f.host in hosts}
        chosen = {part for check in wrong for part in PARTS.get(check, "").split()} - (
            {"cable"} if not end else set()
        )
        chosen |= {
            "end",
            *({"join" if index else "init"} if "swarm" in chosen and places[0] else ()),
        }
        text = pieces[0] + "".join(parts[name] for name in parts if name in chosen)
        rows = [
            f"    {name}: {{dhcp4: false, mtu: 9000, addresses: [{place}]}}"
            for name, place in end.items()
        ]
        values = {
            "PEER": peer, "MANAGER": places[0], "ADDRESS": places[index],
            "FUNCTIONS": " ".join(end), "NETPLAN": "\n".join(["network:", "  version: 2", "  ethernets:", *rows]),
            "UUIDS": " ".join(known_word(uuid, r"[\w-]+") for uuid in properties["uuids"]),
        }  # fmt: skip
        needed = [
            f"{name}={shlex.quote(value)}"
            for name, value in values.items()
            if re.search(rf"\${name}\b", text)
        ]
        scripts[properties["host"]] = text.replace(
            "# VALUES\n", "".join(f"{line}\n" for line in needed)
        )
    return scripts


def cable_addresses(nodes: list[dict[str, Any]]) -> list[dict[str, str]]:
    """For each node {function of the cable: address/prefix}: what it has, else one of the other end's or of a free subnet."""
    places = [
        place
        for properties in nodes
        for places in properties["interfaces"].values()
        for place in places
    ]
    taken = [ipaddress.IPv4Interface(place).network for place in places]
    nets = (ipaddress.IPv4Network(f"192.168.{n % 256}.0/24") for n in count(177))
    free = (net for net in nets if not any(net.overlaps(other) for other in taken))
    ends: list[dict[str, str]] = [{} for _ in nodes]
    for functions in zip(*(properties["cable"] for properties in nodes), strict=False):
        had = [
            [a for a in map(ipaddress.IPv4Interface, f["addresses"]) if not a.is_link_local]
            for f in functions
        ]
        net = next((a.network for own in had for a in own), None) or next(free)
        kept = [next((a for a in own if a.network == net), None) for own in had]
        hosts = (ip for ip in net.hosts() if ip not in [a.ip for a in kept if a])
        for end, function, own in zip(ends, functions, kept, strict=True):
            end[known_word(function["name"], r"[\w.-]{1,15}")] = str(
                own or f"{next(hosts)}/{net.prefixlen}"
            )
    return ends


def known_word(word: str, form: str) -> str:
    """A word that a machine told and that goes into a script; MachineError unless it has the form of such a word."""
    if not re.fullmatch(form, word):
        raise MachineError(
            f"{word!r} is no name of an interface or GPU",
            where="doctor --fix",
            fix="mend it by hand",
        )
    return word
