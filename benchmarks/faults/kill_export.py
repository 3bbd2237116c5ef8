"""Kill `tunesmith export` and `merge` at random moments: what stands under the final name is complete.

    python benchmarks/faults/kill_export.py RUN --dir /tmp/kill-export --kills 20

Each command runs once to its end, which says how long it takes; then it is killed (SIGKILL) at
moments spread over that time, its start and its check among them. After all kills it runs once more
to its end over what they left behind. It ends with 1 where a killed one left an output that differs
from a finished one; a kill that came after the output had its name leaves that.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "gguf": ["export", "--to", "gguf", "--quant", "q8_0", "--output", "model.gguf"],
    "ollama": ["export", "--to", "ollama", "--output", "ollama"],
    "fp8": ["export", "--to", "vllm", "--quant", "fp8", "--output", "fp8"],
    "merge": ["merge", "--output", "merged"],
}


def start(run: Path, words: list[str], folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tunesmith", words[0], str(run), *words[1:]]
    quiet = subprocess.DEVNULL
    return subprocess.Popen([*command, "--device", "cpu"], cwd=folder, stdout=quiet, stderr=quiet)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def contents(path: Path) -> dict[str, str]:
    """The sum of each file of an output but merge.json, whose figures carry rounding, by its name."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    sums = {}
    for file in files:
        if file.name != "merge.json":
            sums[str(file.relative_to(path))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return sums


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run with an adapter")
    parser.add_argument("--dir", type=Path, required=True, help="where it is written")
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    run = options.run.resolve()
    draw = random.Random(0)
    left = 0
    for name, words in COMMANDS.items():
        goal = options.dir / words[-1]
        remove(goal)
        began = time.monotonic()
        assert start(run, words, options.dir).wait() == 0, name
        seconds = time.monotonic() - began
        finished = contents(goal)
        remove(goal)
        done = complete = 0
        for number in range(options.kills):
            process = start(run, words, options.dir)
            time.sleep(seconds * (number + draw.random()) / options.kills)
            process.kill()
            if process.wait() == 0:
                done += 1  # it was faster this time
                remove(goal)
            elif goal.exists() and contents(goal) == finished:
                complete += 1
                remove(goal)
            elif goal.exists():
                left += 1
                print(f"{name}: a killed one left {goal}")
                remove(goal)
        assert start(run, words, options.dir).wait() == 0, name
        others = sorted(path.name for path in options.dir.iterdir() if path != goal)
        print(
            f"{name}: {seconds:.1f} s, {options.kills - done} kills, "
            f"{complete} after the output had its name, {left} torn outputs; "
            f"beside the last one: {others}",
            flush=True,
        )
        remove(goal)
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
