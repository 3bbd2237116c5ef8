"""Use fifteen minutes of one GPU with 80 GB or more, without a network, in two calls.

    bash benchmarks/first_gpu_prep.sh ROWS TOKENIZER .gpu                  # with a network: packages, rows, tokenizer
    python benchmarks/gpu_session.py 1 --output results                    # on the GPU machine: 540 seconds
    python benchmarks/gpu_session.py 2 --output results                    # 240 seconds
    python benchmarks/gpu_session.py 1 --output results --dry-run          # on a CPU: tiny shapes

Each step is a command with a limit. After each step OUTPUT/results-CALL.json is written, so that a
call that is killed keeps what ran before; OUTPUT/log-CALL.txt has what the steps printed. A step
that does not fit into the rest of the call is skipped, and a step that fails ends nothing.

--dry-run runs the same commands on this machine, with tiny models in place of the true shapes, so
that errors are found without a GPU. Kernels for GPUs are left out, and their tests are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent / "speed"))
from step_reports import read_report

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"1": 540, "2": 240}  # seconds of a call
DRY_LIMIT = 900  # seconds of a step of a dry run: its machine may be slow
MISSING_PACKAGES = 3  # exit status of device_facts.py
# A step begins if this share of its seconds is left.
FITS = 0.6
# Read by each Python of a dry run before anything else: all shapes become tiny.
TINY = """
from dataclasses import replace
from tunesmith.model.shapes import SHAPES
small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
small |= {"head_dim": 8, "num_hidden_layers": 2, "vocab_size": 512}
experts = {"moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2}
for name, shape in SHAPES.items():
    config = {**shape.config, **small}
    config |= {key: value for key, value in experts.items() if key in config}
    SHAPES[name] = replace(shape, config=config)
"""


class Step(NamedTuple):
    """A command of a call, the seconds that it may take, and what it shows."""

    name: str
    seconds: int
    shows: str
    command: list[str]


def steps_of_call(call: str, folder: Path, work: Path, *, dry: bool) -> list[Step]:
    """Return the steps of a call, the most important first."""

    def script(name: str, *words: str) -> list[str]:
        return [sys.executable, f"benchmarks/{name}.py", *words]

    def report(name: str) -> list[str]:
        return ["--json", str(work / f"{name}.json")]

    def shape(name: str, *words: str) -> list[str]:
        inputs = ["--tokenizer", str(folder / "tokenizer"), "--data", str(folder / "rows.json")]
        return ["--shape", name, *inputs, *words]

    def steps(timed: int, warmup: int) -> list[str]:
        return ["--steps", str(1 if dry else timed), "--warmup", str(0 if dry else warmup)]

    def batch(tokens: int) -> list[str]:
        if dry:
            return ["train.global_batch=512 tokens", "data.seq_len=256"]
        return [f"train.global_batch={tokens} tokens"]

    def streamed(name: str, cases: str, timed: int) -> list[str]:
        words = ["--only", cases, "--steps", str(2 if dry else timed), *tiny]
        return script("speed/streamed", *words, "--output", str(work / f"{name}.json"))

    def pictures(family: str) -> list[str]:
        return script("speed/picture_steps", "--family", family, *tiny, *report(family))

    def compared(name: str, variant: str, *words: str) -> list[str]:
        """The command of `bench` with these words, as it is and with other code."""
        options = ["--only", variant, "--rounds", "1", *report(name)]
        return script("speed/ablation", *words, *options)

    tiny = ["--small"] if dry else []
    nf4 = "model.quantize=nf4"
    tests = [
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-n",
        "0" if dry else "6",
        "-rs",
        "-p",
        "no:cacheprovider",
    ]
    # A start takes 8 s, and to build a 70B in nf4 19 s more; each comparison has two of both.
    first = [
        Step("device", 15, "the machine",
             script("speed/device_facts", "--output", str(work / "device.json"))),
        Step("tests", 100, "no waits, equal numbers, memory, NCCL",
             [sys.executable, *tests, "--junitxml", str(work / "tests.xml")]),
        Step("qwen2_5_vl", 70, "towers that wait, plans for picture sizes", pictures("qwen2_5_vl")),
        Step("gemma3", 60, "attention over pictures, peak beside the plan", pictures("gemma3")),
        Step("70b-nf4", 95, "our nf4 kernel in a step",
             compared("70b-nf4", "nf4 kernel", *shape("llama3-70b", nf4, *batch(8192), *steps(2, 1)))),
        Step("3b-attention", 70, "our attention with 3 query heads a key head",
             compared("3b-attention", "attention everywhere",
                      *shape("llama3-3b", "adapter.kind=none", *batch(32768), *steps(2, 1)))),
        Step("8b-streamed", 60, "copies beside the step, also staged",
             streamed("8b-streamed", "link,8b resident,8b staged", 3)),
        Step("30b-experts", 60, "row kernels: 27,374 tokens/s on an H200",
             [sys.executable, "-m", "tunesmith", "bench", *report("30b-experts"),
              *shape("qwen3-30b-a3b", *batch(32768), *steps(4, 2))]),
    ]  # fmt: skip
    second = [
        Step("decoding-8b", 20, "decoding", script("speed/decoding", *shape("llama3-8b"), *report("decoding-8b"))),
        Step("decoding-70b-nf4", 45, "decoding on nf4",
             script("speed/decoding", *shape("llama3-70b", nf4), *report("decoding-70b-nf4"))),
        Step("experts-streamed", 110, "experts from the host", streamed("experts-streamed", "experts", 3)),
        Step("planned", 60, "layers that stay after the trial", streamed("planned", "planned", 3)),
    ]  # fmt: skip
    return first if call == "1" else second


def run_step(step: Step, limit: float, environment: dict[str, str], log: Path) -> int:
    """Run a step. Return its exit status, or 124 if it was killed at its limit."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n== {step.name}: {shlex.join(step.command)}\n")
        file.flush()
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the step's own processes end with it
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return 124
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def make_environment(folder: Path, work: Path, *, dry: bool) -> dict[str, str]:
    """Unpack the wheels of `folder`, and return the environment of the steps."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    site = work / "site"
    site.mkdir()
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    if dry:
        (site / "sitecustomize.py").write_text(TINY, encoding="utf-8")
    paths = [site, folder / f"site-{version}", ROOT / "src", os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, filter(None, paths))),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Most of the tests' time is compiling; each of six workers has two processes for that.
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
    }


def write_tiny_inputs(folder: Path) -> None:
    """Write the rows and the tokenizer of a dry run."""
    from streamed import write_inputs

    write_inputs(folder, 64)
    row = {"instruction": "Count to seven.", "input": "", "output": "one two three four five six"}
    (folder / "rows.json").write_text(json.dumps([row] * 200), encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object, or an empty one if the file does not hold one."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def run_call(options: argparse.Namespace) -> bool:
    """Run the steps of a call. Return whether all of them ended with 0."""
    began = time.monotonic()
    limit = options.limit or (float("inf") if options.dry_run else LIMITS[options.call])
    output = options.output.resolve()
    work = output / f"work-{options.call}"
    work.mkdir(parents=True)
    folder = options.folder.resolve()
    if options.dry_run:
        folder = work
        write_tiny_inputs(folder)
    environment = make_environment(folder, work, dry=options.dry_run)
    steps = steps_of_call(options.call, folder, work, dry=options.dry_run)
    log = output / f"log-{options.call}.txt"
    commit = folder / "commit"
    done: dict[str, dict[str, Any]] = {}
    for step in steps:
        if options.only and step.name not in options.only:
            continue
        left = limit - (time.monotonic() - began)
        if left < FITS * step.seconds:
            done[step.name] = {"exit": None, "seconds": 0, "limit": 0}
            print(f"{step.name}: skipped, {left:.0f} of {step.seconds} s are left", flush=True)
        else:
            most = min(DRY_LIMIT if options.dry_run else step.seconds, left)
            started = time.monotonic()
            if options.dry_run:
                print(f"$ {shlex.join(step.command)}", flush=True)
            status = run_step(step, most, environment, log)
            seconds = time.monotonic() - started
            done[step.name] = {"exit": status, "seconds": round(seconds), "limit": round(most)}
            found = read_report(work, step.name)
            if found is not None:
                done[step.name]["report"] = found
            ended = f"ended with {status} after {seconds:.0f} s ({step.shows})"
            print(f"{step.name}: {ended}", flush=True)
            if step.name == "device" and status == MISSING_PACKAGES:
                print(log.read_text(encoding="utf-8").splitlines()[-1])
                return False
        results = {
            "stage": options.call,
            "dry_run": options.dry_run,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit.read_text(encoding="utf-8").strip() if commit.exists() else "",
            "device": read_json(work / "device.json"),
            "steps": done,
        }
        # The file is replaced at once, because the call may be killed at any moment.
        partial = output / "partial.json"
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        partial.replace(output / f"results-{options.call}.json")
    return all(step["exit"] == 0 for step in done.values())


def main() -> None:
    """Run one call; exit status 1 if a step failed or was skipped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("call", choices=LIMITS)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--folder", type=Path, default=Path(".gpu"), help="of first_gpu_prep.sh")
    parser.add_argument("--limit", type=float, help="seconds of the call")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    parser.add_argument("--dry-run", action="store_true", help="tiny models, on any machine")
    options = parser.parse_args()
    if (options.output / f"work-{options.call}").exists():
        parser.error(f"--output {options.output} holds call {options.call} already: name another")
    if not options.dry_run and not (options.folder / "rows.json").exists():
        parser.error(
            f"{options.folder}/rows.json is not there: bash benchmarks/first_gpu_prep.sh ROWS "
            f"TOKENIZER {options.folder}"
        )
    sys.exit(0 if run_call(options) else 1)


if __name__ == "__main__":
    main()
