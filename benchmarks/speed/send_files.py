"""Folders sent to another node: `launch.ship` beside rsync, in turns, with the CPU time of both ends.

    python benchmarks/speed/send_files.py --pairs 5 --json docs/measurements/send-files.json

Two network namespaces joined by veth pairs, each with an ssh server and a RAM disk of its own
(`tests/launch/spark_pair.py`). Needs root and `make cluster-tools`. Interpreter start and the
hashes that name the files here are not in the times: both ways need them. CPU seconds are
those of all processes of both nodes (cpuacct), ssh and sshd among them.
"""

from __future__ import annotations

import argparse
import filecmp
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from launch.spark_pair import SBIN, Spark, SparkPair, wait_until
from tunesmith.checkpoint.manifest import digest_of_file
from tunesmith.hub.download import FetchProgress
from tunesmith.launch import receiver, ship

HOST = "spark-b"
FOLDER = Path("/run/ship")  # on each node a file system of its own
GROUP = Path("/sys/fs/cgroup/cpuacct/send-files")
AES = ("-c", "aes128-gcm@openssh.com")
CHACHA = ("-c", "chacha20-poly1305@openssh.com")  # what ssh chooses by itself
STREAMS = 8
CASES = {
    "large": "8 large files",
    "small": "2,000 files of 20 KB",
    "half": "8 large files, of each the first half is there",
    "same": "8 large files, all are there",
}


def send_by_ship(files: Sequence[ship.ShippedFile], case: str, options: Sequence[str]) -> None:
    ship.SSH[1:1] = options
    ship.ship(files, HOST, FetchProgress(lambda text: None))


def send_by_rsync(files: Sequence[ship.ShippedFile], case: str, target: str) -> None:
    """As many rsync at a time as there are streams, each with a list of files of equal bytes."""
    lists: list[list[str]] = [[] for _ in range(STREAMS)]
    sizes = [0] * STREAMS
    for file in files:
        index = sizes.index(min(sizes))
        lists[index].append(file.source.name)
        sizes[index] += file.size
    words = ["rsync", "--partial-dir=.rsync-partial", "--size-only", "--files-from=-"]
    words += ["-e", " ".join(["ssh", *AES])]
    processes = []
    for names in filter(None, lists):
        process = subprocess.Popen(
            [*words, f"{files[0].source.parent}/", target], stdin=subprocess.PIPE, text=True
        )
        assert process.stdin is not None
        process.stdin.write("\n".join(names))
        process.stdin.close()
        processes.append(process)
    assert not sum(process.wait() for process in processes)


WAYS: dict[str, Callable[[Sequence[ship.ShippedFile], str], None]] = {
    "ship": functools.partial(send_by_ship, options=()),
    "ship, chacha20-poly1305": functools.partial(send_by_ship, options=CHACHA),
    "rsync, ssh, aes128-gcm": functools.partial(send_by_rsync, target=f"{HOST}:{FOLDER}/there/"),
}


def shipped_files(source: Path, digests: dict[str, str]) -> list[ship.ShippedFile]:
    files = []
    for file in sorted(source.iterdir()):
        place = str(FOLDER / "there" / file.name)
        files.append(ship.ShippedFile(file, place, file.stat().st_size, digests[file.name], True))
    return files


def send_once(way: str, case: str, source: Path, digests: dict[str, str]) -> None:
    """On the first node: send when a line comes, and print the seconds that it took."""
    files = shipped_files(source, digests)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    WAYS[way](files, case)
    print(time.perf_counter() - began, flush=True)


def outside(node: Spark, path: Path) -> Path:
    """A node's path, as this process sees it."""
    return Path(f"/proc/{node.holder.pid}/root{path}")


def prepare(there: Path, source: Path, way: str, case: str, digests: dict[str, str]) -> None:
    """The other node's folder, as the way would have left it."""
    shutil.rmtree(there, ignore_errors=True)
    there.mkdir()
    for file in source.iterdir() if case in ("half", "same") else ():
        if case == "same":
            shutil.copy2(file, there)
            continue
        place = there / file.name
        pieces = file.stat().st_size // 2 // ship.PIECE
        if way.startswith("ship"):
            place = Path(receiver._partial(str(place), digests[file.name]))
            journal = "".join(f"{index}\n" for index in range(pieces))
            Path(f"{place}.pieces").write_text(journal)
        else:
            place = there / ".rsync-partial" / file.name
            place.parent.mkdir(exist_ok=True)
        with file.open("rb") as opened:
            place.write_bytes(opened.read(pieces * ship.PIECE))


def cpu_seconds() -> float:
    return int((GROUP / "cpuacct.usage").read_text()) / 1e9


def enter_group(pid: int) -> None:
    (GROUP / "cgroup.procs").write_text(str(pid))


def measure(
    pair: SparkPair, servers: set[int], way: str, case: str, source: Path, digests: dict[str, str]
) -> dict[str, float]:
    there = outside(pair.b, FOLDER / "there")
    source_outside = outside(pair.a, source)
    prepare(there, source_outside, way, case, digests)
    program = [sys.executable, __file__, "--send", way, case, str(source)]
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:{SBIN}"}
    sender = subprocess.Popen(
        pair.a.command(*program),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert sender.stdin is not None
    assert sender.stdout is not None
    sender.stdin.write(json.dumps(digests) + "\n")
    sender.stdin.flush()
    assert sender.stdout.readline() == "ready\n"
    enter_group(sender.pid)
    before = cpu_seconds()
    sender.stdin.write("\n")
    sender.stdin.flush()
    seconds = float(sender.stdout.readline())
    after = cpu_seconds()
    sender.stdin.close()
    assert sender.wait() == 0
    # What is left of sshd's children ends before the next turn.
    group = GROUP / "cgroup.procs"
    wait_until(lambda: {*map(int, group.read_text().split())} <= servers)
    for file in source_outside.iterdir():
        assert filecmp.cmp(file, there / file.name, shallow=False), (way, file)
    return {"seconds": round(seconds, 4), "cpu_seconds": round(after - before, 4)}


def write_sources(folder: Path, large: int) -> None:
    sizes = {"large": (8, large), "small": (2000, 20_000)}
    for name, (count, size) in sizes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"model-{index:05}.safetensors").write_bytes(os.urandom(size))


def summary(rows: list[dict[str, object]], sizes: dict[str, int]) -> dict[str, dict[str, object]]:
    """Medians for each case and way; `ratio`: of `ship` to this one in the same pair."""
    table: dict[str, dict[str, object]] = {}
    for case in CASES:
        ours = [row["seconds"] for row in rows if (row["case"], row["way"]) == (case, "ship")]
        table[case] = {}
        for way in WAYS:
            chosen = [row for row in rows if (row["case"], row["way"]) == (case, way)]
            seconds = [row["seconds"] for row in chosen]
            cpu = statistics.median(row["cpu_seconds"] for row in chosen)
            ratios = [theirs / own for own, theirs in zip(ours, seconds, strict=True)]
            table[case][way] = {
                "seconds": statistics.median(seconds),
                "seconds_beside_ship": round(statistics.median(ratios), 2),
                "cpu_seconds": round(cpu, 2),
            }
            if sizes[case]:
                table[case][way]["cpu_seconds_per_GB"] = round(cpu / sizes[case] * 1e9, 2)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--mib", type=int, default=256, help="of a large file, a multiple of 128")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--send", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.send:
        way, case, source = args.send
        send_once(way, case, Path(source), json.loads(sys.stdin.readline()))
        return
    GROUP.mkdir(exist_ok=True)
    rows = []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        pair = stack.enter_context(SparkPair(Path(folder)))
        for node in (pair.a, pair.b):
            node.sh(f"mkdir {FOLDER} && mount -t tmpfs -o size=5g tmpfs {FOLDER}")
        here = outside(pair.a, FOLDER)
        write_sources(here, args.mib << 20)
        servers = {pair.b.sshd.pid}
        enter_group(pair.b.sshd.pid)
        digests = {}
        for name in ("large", "small"):
            files = (here / name).iterdir()
            digests[name] = {file.name: digest_of_file(file) for file in files}
        order = [*WAYS]
        for _ in range(args.pairs):
            for case in CASES:
                name = "small" if case == "small" else "large"
                for way in order:
                    source = FOLDER / name
                    figures = measure(pair, servers, way, case, source, digests[name])
                    rows.append({"case": case, "way": way, **figures})
                    print(rows[-1], flush=True)
            order.reverse()
    GROUP.rmdir()
    large = 8 * (args.mib << 20)
    sizes = {"large": large, "small": 2000 * 20_000, "half": large // 2, "same": 0}
    found = {
        "command": f"python benchmarks/speed/send_files.py --pairs {args.pairs} --mib {args.mib}",
        "machine": machine(),
        "cases": CASES,
        "medians": summary(rows, sizes),
        "rows": rows,
    }
    print(json.dumps(found["medians"], indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def machine() -> dict[str, object]:
    from tunesmith.metrics.hardware import describe_machine

    described = describe_machine([])
    versions = {}
    for name, words in {"rsync": ["rsync", "--version"], "ssh": ["ssh", "-V"]}.items():
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        versions[name] = (done.stdout or done.stderr).splitlines()[0].strip()
    return {"cpu": described["cpu"], "cpu_cores": described["cpu_cores"], **versions}


if __name__ == "__main__":
    main()
