"""Test of the memory guard in a control group with a memory limit. A run must stop before the
kernel kills a process, while another process in the group allocates all memory.

    sudo python benchmarks/faults/memory_guard.py \\
        --times 20 --json docs/measurements/memory-guard.json

An unmodified `tunesmith train` starts in a control group (version 1 or 2, created by root). Then a
second process starts that allocates memory at a constant rate. The stop is clean if the run ends
with exit code 75, stopped.json contains the reason `memory`, and the kernel has killed no process
until then. Afterwards the same command resumes the run outside the group, and its records are
compared bit for bit with those of an uninterrupted run. The exit code is 3 if the control group
cannot be created on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

ROOT = Path("/sys/fs/cgroup")
RATES = (100, 50, 200, 25, 300)  # MiB per second
COMPARED = ("loss", "grad_norm", "learning_rate", "tokens", "examples")
BEFORE, AFTER = 4, 4  # steps before the other process starts, and steps after the resume
TIME = 300.0  # maximum seconds of a start or an end on a busy machine
HOG = """
import sys, time
rate, held, began = float(sys.argv[1]) * 2**20, [], time.monotonic()
while True:
    held.append(b"x" * (1 << 20))
    time.sleep(max(0.0, len(held) * 2**20 / rate - time.monotonic() + began))
"""


class Group:
    """A new control group whose processes can use `mib` MiB together."""

    def __init__(self, mib: int) -> None:
        first = (ROOT / "memory").is_dir()
        parent = ROOT / "memory" if first else ROOT
        self.folder = parent / f"tunesmith-guard-{os.getpid()}"
        self.folder.mkdir()
        for name in (
            ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if first else ("memory.max",)
        ):
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).write_text(str(mib << 20))
        self.events = self.folder / ("memory.oom_control" if first else "memory.events")

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        """Start a process in the group."""
        words = [
            "sh",
            "-c",
            'echo $$ > "$0"; exec "$@"',
            str(self.folder / "cgroup.procs"),
            *command,
        ]
        return subprocess.Popen(words, text=True, **options)

    def kills(self) -> int:
        """Return the number of processes of the group that the kernel has killed."""
        return int(dict(line.split() for line in self.events.read_text().splitlines())["oom_kill"])

    def remove(self) -> None:
        for _ in range(50):  # its processes may still be exiting
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.1)


@contextlib.contextmanager
def group(mib: int) -> Iterator[Group]:
    """Create a group for the duration of the block. Exit with code 3 if it cannot be created."""
    try:
        made = Group(mib)
    except OSError as error:
        print(
            f"a control group with a memory limit cannot be created (root is required): {error}",
            file=sys.stderr,
        )
        raise SystemExit(3) from error
    try:
        yield made
    finally:
        made.remove()


def write_model_and_rows(folder: Path) -> Path:
    """Write a small random Llama and rows.jsonl; return the model's folder."""
    from conftest import write_tiny_llama
    from recipes import write_rows

    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 16}
    write_rows(folder / "rows.jsonl", 400)
    return write_tiny_llama(folder / "small", **sizes, num_key_value_heads=8)


def write_recipe(folder: Path, model: Path, out: str) -> Path:
    """Write a recipe with short steps and practically no end. Return the file."""
    rows, file = folder / "rows.jsonl", folder / f"{out}.json"
    recipe = {
        "model": {"name": str(model), "dtype": "fp32"},
        "adapter": {"kind": "lora", "rank": 8, "dropout": 0.1},
        "data": {"train": {"source": str(rows), "format": "prompt-completion"}, "seq_len": 128},
        "train": {"duration": "100000 steps", "global_batch": "16 examples", "micro_batch": "256 tokens", "schedule": "constant"},
        "checkpoint": {"every": "1000 steps"},
        "log": {"tensorboard": False},
        "output_dir": str(folder / out),
    }  # fmt: skip
    file.write_text(json.dumps(recipe))
    return file


def records(out: Path) -> list[dict[str, Any]]:
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [{key: record[key] for key in COMPARED} for record in map(json.loads, lines)]


def wait_for_steps(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIME
    while len(records(out)) < count:
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(
                f"error: the run in {out} did not reach {count} steps: exit code {process.poll()}"
            )
        time.sleep(0.05)


def train_until(recipe: Path, out: Path, steps: int) -> list[dict[str, Any]]:
    """Train at least `steps` steps outside the group. Return the records."""
    process = subprocess.Popen(command(recipe), text=True, stderr=subprocess.DEVNULL)
    wait_for_steps(out, steps, process)
    process.send_signal(signal.SIGTERM)
    process.wait(TIME)
    return records(out)


def command(recipe: Path) -> list[str]:
    return [sys.executable, "-m", "tunesmith", "train", str(recipe)]


def once(folder: Path, model: Path, name: str, mib: int, rate: int) -> dict[str, Any]:
    """Train while another process allocates `rate` MiB per second. Return how the run ended."""
    recipe, out = write_recipe(folder, model, name), folder / name
    with group(mib) as made, (folder / f"{name}.said").open("w") as said:
        run = made.start(command(recipe), stderr=said)
        hog = None
        try:
            wait_for_steps(out, BEFORE, run)
            began, hog = time.monotonic(), made.start([sys.executable, "-c", HOG, str(rate)])
            code = run.wait(TIME)
            kills, lived = made.kills(), hog.poll() is None
        finally:
            for process in (run, hog):
                if process is not None:
                    process.kill()
                    process.wait()
    file = out / "stopped.json"
    stopped = json.loads(file.read_text()) if file.exists() else {}
    figures = stopped.get("figures", {})
    clean = code == 75 and stopped.get("reason") == "memory" and not kills and lived
    return {
        "mib_per_second": rate, "clean": clean, "exit_code": code, "killed_by_kernel": kills, "step": stopped.get("step"),
        "seconds": round(time.monotonic() - began, 2), "limit_mib": mib,
        "left_mib": (figures["limit_bytes"] - figures["used_bytes"]) >> 20 if figures else None,
        "floor_mib": figures["floor_bytes"] >> 20 if figures else None,
    }  # fmt: skip


def measure(
    times: int, mib: int, rates: Sequence[int], folder: Path, *, stop_only: bool
) -> list[dict[str, Any]]:
    """Stop `times` runs, resume each run, and compare it with an uninterrupted run."""
    model = write_model_and_rows(folder)
    found = []
    for number in range(times):
        found.append(once(folder, model, f"run{number}", mib, rates[number % len(rates)]))
        print(found[-1], file=sys.stderr)
        if found[-1]["clean"] and not stop_only:
            out = folder / f"run{number}"
            found[-1]["records"] = train_until(
                folder / f"run{number}.json", out, found[-1]["step"] + AFTER
            )
    if stop_only:
        return found
    longest = max((len(row.get("records", ())) for row in found), default=0)
    whole = train_until(write_recipe(folder, model, "whole"), folder / "whole", longest)
    for row in found:
        own = row.pop("records", None)
        row["equal"] = own is not None and own == whole[: len(own)]
    return found


def main() -> None:
    """Run the test, and print how many stops were clean."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--times", type=int, default=5)
    p.add_argument(
        "--limit", type=int, default=3072, metavar="MIB", help="memory limit of the control group"
    )
    p.add_argument(
        "--rates",
        type=int,
        nargs="+",
        default=RATES,
        metavar="MIB",
        help="MiB per second, used in turn",
    )
    p.add_argument("--stop-only", action="store_true", help="do not resume the runs")
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="tunesmith-guard-") as folder:
        found = measure(a.times, a.limit, a.rates, Path(folder), stop_only=a.stop_only)
    told = {"times": len(found), "clean": sum(r["clean"] for r in found)}
    if not a.stop_only:
        told["equal"] = sum(r["equal"] for r in found)
    if a.json:
        a.json.write_text(json.dumps({**told, "runs": found}, indent=1) + "\n")
    print(json.dumps(told))
    sys.exit(len({*told.values()}) != 1)


if __name__ == "__main__":
    main()
