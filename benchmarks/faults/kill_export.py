"""Kill `tunesmith export` and `merge` all along their way: what stands under the final name is complete.

    python benchmarks/faults/kill_export.py --dir /tmp/kill-export --kills 20 --json docs/measurements/kills-of-exports.json

A small random model with an adapter is exported as a file and as a folder for Ollama, and merged. Each
command runs once to its end: the seconds that its processor was busy before its first byte and until
its end. Then it is started again and killed (SIGKILL) when it has used a certain share of these, so
that a busy machine does not move the place: two of 20 before the first byte, the others spread over
writing and check. A kill that came too late is given again, a little earlier. After each one the same
command runs over what it left, once for every command to its end. It ends with 1 where a killed one
left anything under the final name, or anything in sight beside it, or where the last one is not equal
to the first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from conftest import write_tiny_llama
from export.tiny_gguf import chat_tokenizer
from runs import make_run, peft_model
from warm import Warm

# Two threads of llama.cpp wait for each other without an end where the cores have other work.
EXPORT = ["export", "--threads", "1", "--to"]
COMMANDS = {
    "gguf": [*EXPORT, "gguf", "--quant", "q8_0", "--output", "model.gguf"],
    "ollama": [*EXPORT, "ollama", "--output", "ollama"],
    "merge": ["merge", "--dtype", "bf16", "--output", "merged"],
}
BEFORE = 0.1  # of the kills come before the first byte
EARLIER = 0.97  # a kill that came too late is given again at this share of its time
POLL = 0.002  # seconds
# Their figures carry rounding, and the order in which threads add.
RECORDS = ("merge.json", "README.md")


@dataclass
class Spent:
    """Seconds that a processor was busy with a command: until its first byte, and in all."""

    before: float
    total: float


def write_run(folder: Path) -> Path:
    """A random Llama of two layers with a tokenizer that llama.cpp reads, and a run."""
    tokenizer = chat_tokenizer()
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    base = folder / "base"
    write_tiny_llama(base, vocab_size=len(tokenizer), **sizes)
    tokenizer.save_pretrained(base)
    make_run(folder / "run", base, peft_model(base))
    return folder / "run"


def start(run: Path, words: list[str], folder: Path) -> Warm:
    """The command in a process of its own, forked from one that has imported torch."""
    return Warm([words[0], run, *words[1:], "--device", "cpu"], cwd=folder)


def busy_seconds(process: Warm) -> float:
    """Of a processor, until now."""
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


def parts(goal: Path) -> list[Path]:
    return list(goal.parent.glob(f".{goal.name}.*.part"))


def bytes_in(folders: list[Path]) -> int:
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def watch_to_the_end(process: Warm, goal: Path) -> Spent:
    before = None
    total = 0.0
    while process.poll() is None:
        try:
            total = busy_seconds(process)
        except psutil.NoSuchProcess:
            break
        if before is None and parts(goal):
            before = total
        time.sleep(POLL)
    assert process.wait() == 0
    assert before is not None
    return Spent(before, total)


def kill_at(process: Warm, seconds: float) -> bool:
    """Kill it when its processor was busy for so long; whether it was still there."""
    while process.poll() is None:
        try:
            if busy_seconds(process) >= seconds:
                break
        except psutil.NoSuchProcess:
            break
        time.sleep(POLL)
    process.kill()
    return process.wait() != 0


def moment(number: int, kills: int, spent: Spent) -> float:
    """The busy seconds at which a kill comes: a few before the first byte, the others behind it."""
    first = round(kills * BEFORE)
    if number < first:
        return spent.before * (number + 0.5) / first
    share = (number - first + 0.5) / (kills - first)
    return spent.before + (spent.total - spent.before) * share


def contents(goal: Path) -> dict[str, str]:
    """The sum of each file of an output but those of RECORDS."""
    files = [goal] if goal.is_file() else [file for file in goal.rglob("*") if file.is_file()]
    sums = {}
    for file in files:
        if file.name not in RECORDS and not file.name.endswith(".gguf.json"):
            sums[str(file.relative_to(goal))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return sums


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def kill_command(run: Path, words: list[str], folder: Path, kills: int) -> dict[str, object]:
    """All kills of one command, in an empty folder."""
    goal = folder / words[-1]
    clear(folder)
    spent = watch_to_the_end(start(run, words, folder), goal)
    finished = contents(goal)
    size = bytes_in([folder])
    clear(folder)
    places = []
    in_sight = 0
    for number in range(kills):
        seconds = moment(number, kills, spent)
        while not kill_at(start(run, words, folder), seconds):
            clear(folder)
            seconds *= EARLIER
        visible = sorted(path.name for path in folder.iterdir() if path.name[0] != ".")
        in_sight += bool(visible)
        written = bytes_in(parts(goal)) / size
        places.append({"share_written": round(written, 3), "in_sight": visible})
    # The last one runs over what the killed ones have left.
    assert start(run, words, folder).wait() == 0
    hidden = sorted(path.name for path in folder.iterdir() if path.name[0] == ".")
    return {
        "command": " ".join(words),
        "busy_seconds": round(spent.total, 2),
        "busy_seconds_before_the_first_byte": round(spent.before, 2),
        "kills": kills,
        "left_in_sight": in_sight,
        "hidden_after_the_next": hidden,
        "next_is_equal": contents(goal) == finished,
        "places": places,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="where it is written")
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--json", type=Path, help="where the result is written")
    options = parser.parse_args()
    folder = options.dir.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    outputs = folder / "outputs"
    outputs.mkdir(parents=True)
    run = write_run(folder)
    report: dict[str, object] = {
        "command": f"python benchmarks/faults/kill_export.py --dir DIR --kills {options.kills}"
    }
    wrong = 0
    for name, words in COMMANDS.items():
        result = kill_command(run, words, outputs, options.kills)
        report[name] = result
        wrong += bool(result["left_in_sight"] or result["hidden_after_the_next"])
        wrong += not result["next_is_equal"]
        print(name, json.dumps(result), flush=True)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
