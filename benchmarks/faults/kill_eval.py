"""Kill an `eval --score` with SIGKILL again and again, and compare its answers with those of one
that nothing interrupted.

    python benchmarks/faults/kill_eval.py RUN DATA [--kills 10] [--seed 0] [-- --max-new-tokens 32 ...]

Each start is killed at a random moment after it has written some answers; the last one finishes.
Answers and scores are compared byte for byte. Exit status 1: they differ.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def start(run: str, data: str, output: Path, more: list[str]) -> subprocess.Popen[bytes]:
    words = [
        "eval",
        run,
        "--data",
        data,
        "--score",
        "exact",
        "--score",
        "f1",
        "--output",
        str(output),
        *more,
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "tunesmith", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, error = process.communicate()
    if process.returncode:
        raise SystemExit(error.decode(errors="replace"))


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("data")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    # argparse takes what follows -- for positional arguments, and only where no option is before it.
    words = sys.argv[1:]
    more: list[str] = []
    if "--" in words:
        more = words[words.index("--") + 1 :]
        words = words[: words.index("--")]
    args = parser.parse_args(words)
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.jsonl"
        began = time.monotonic()
        finish(start(args.run, args.data, whole, more))
        total = lines(whole)
        print(f"not killed: {total - 1} answers in {time.monotonic() - began:.0f} s", flush=True)
        killed = Path(folder) / "killed.jsonl"
        for kill in range(1, args.kills + 1):
            process = start(args.run, args.data, killed, more)
            # Each start gets a part of what is left, so that the last ones have something to do.
            aim = lines(killed) + max(1, (total - lines(killed)) // (args.kills + 2 - kill))
            while process.poll() is None and lines(killed) < aim:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.2))
            process.kill()
            process.communicate()
            if process.returncode == 0:
                raise SystemExit("it finished before the kill: give more rows")
            tail = killed.read_bytes().rpartition(b"\n")[2]
            print(
                f"kill {kill}: {lines(killed) - 1} answers, {len(tail)} bytes of a torn line",
                flush=True,
            )
        finish(start(args.run, args.data, killed, more))
        pairs = [
            (whole, killed),
            (whole.with_name("whole.scores.json"), killed.with_name("killed.scores.json")),
        ]
        same = [first.read_bytes() == second.read_bytes() for first, second in pairs]
        print(
            f"after {args.kills} kills: answers {'equal' if same[0] else 'DIFFER'}, scores {'equal' if same[1] else 'DIFFER'}"
        )
        if not all(same):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
