"""A pair of nodes: the same checks on both at once, and what only the two show together."""

import ipaddress
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tunesmith.host.child_output import last_line
from tunesmith.launch.ssh import check_host, remote_words, run_on
from tunesmith.tools.doctor.checks import TORCH_SECONDS, examine
from tunesmith.tools.doctor.system import TEXTS, Finding, NodeProperties, System, finding

SENT_FILES = ("system.py", "checks.py", "findings.json")
MAX_SKEW_SECONDS = 2.0  # seconds between the clocks
ANSWER_SECONDS = TORCH_SECONDS + 20  # seconds for the other node's answer
# The other node needs ssh and python3 alone: the checks are imported from a folder that is gone
# before they run.
PROGRAM = """
import pathlib, sys, tempfile
with tempfile.TemporaryDirectory(prefix="tunesmith-doctor-") as folder:
    place = pathlib.Path(folder, "tunesmith/tools/doctor")
    place.mkdir(parents=True)
    for path in (place, *place.parents[:2]):
        (path / "__init__.py").touch()
    for name, text in {files!r}.items():
        (place / name).write_text(text, encoding="utf-8")
    sys.path.insert(0, folder)
    from tunesmith.tools.doctor.checks import answer_peer
answer_peer()
"""


def ask_peer(host: str) -> tuple[str, str]:
    """Run the checks on the other node; return what they print and what ssh says."""
    files = {
        name: Path(__file__).with_name(name).read_text(encoding="utf-8") for name in SENT_FILES
    }
    program = PROGRAM.format(files=files)
    command = remote_words(host, ["python3", "-", sys.executable])
    try:
        answer = subprocess.run(
            command,
            input=program,
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", "no answer in time"
    return answer.stdout, answer.stderr


def check_pair(host: str, folders: tuple[str, ...]) -> list[Finding]:
    """The findings of this node, of the other one, and of what only the two show together."""
    check_host(host, "--pair")
    with ThreadPoolExecutor(1) as pool:
        # The other node examines itself while this one does.
        peer = pool.submit(ask_peer, host)
        findings, here = examine(System(folders=folders), pair=True)
        out, errors = peer.result()
    # A shell of the other node may print text of its own before the answer.
    try:
        rows, there = json.loads(out.strip().rpartition("\n")[2])
    except ValueError:
        return [*findings, _why_ssh_failed(host, errors)]
    both = [finding("ssh/ok", host)]
    both += _compare(here, there, host)
    both.append(_compare_clocks(host))
    findings += [Finding(**row) for row in rows]
    return findings + [replace(result, host="the pair") for result in both]


def _why_ssh_failed(host: str, errors: str) -> Finding:
    """The first `ssh/WORDS` whose words are in what ssh said; the last of them has no words."""
    cases = [key.removeprefix("ssh/") for key in TEXTS if key.startswith("ssh/")]
    case = next(words for words in cases if words != "ok" and words in errors)
    return replace(finding(f"ssh/{case}", host, message=last_line(errors)), host=host)


def _compare(here: NodeProperties, there: NodeProperties, host: str) -> list[Finding]:
    """Compare what must be the same on both, and the swarm and the subnet that they must share."""
    findings = _compare_versions(here["versions"], there["versions"], host)
    findings += _compare_packages(here["packages"], there["packages"], host)
    if not findings:
        versions = [f"{name} {version}" for name, version in here["versions"].items() if version]
        findings.append(finding("versions/ok", versions=", ".join(versions)))
    # A node without a swarm, or without a cable, has a finding of its own.
    if here["managers"] and there["managers"]:
        is_shared = not {*here["managers"]}.isdisjoint(there["managers"])
        findings.append(finding("swarm/one" if is_shared else "swarm/two", host))
    is_apart = _subnets_of_cable(here).isdisjoint(_subnets_of_cable(there))
    if here["cable"] and there["cable"] and is_apart:
        findings.append(finding("address/apart", host, name=here["cable"][0]["name"]))
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


def _subnets_of_cable(node: NodeProperties) -> set[ipaddress.IPv4Network]:
    addresses = [text for function in node["cable"] for text in function["addresses"]]
    return {ipaddress.IPv4Interface(address).network for address in addresses}


def _compare_clocks(host: str) -> Finding:
    """Measure how far the other node's clock is off, by reading it between two of this one's."""
    sent_at = time.time()
    clock = float(run_on(host, "python3", "-c", "import time; print(time.time())"))
    answered_at = time.time()
    # The other clock must lie between the two readings; outside of them it is off by at least this.
    if clock > answered_at:
        seconds, way = clock - answered_at, "ahead of"
    else:
        seconds, way = max(0.0, sent_at - clock), "behind"
    return finding(
        "time/off" if seconds > MAX_SKEW_SECONDS else "time/ok", host, seconds=seconds, way=way
    )
