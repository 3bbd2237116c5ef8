"""Measurements on one GPU with 80 GB or more, without a network. Calls 1 and 2 take 15 minutes.

    # On a machine with a network, download packages, rows and tokenizer:
    bash benchmarks/first_gpu_prep.sh ROWS TOKENIZER .gpu
    # On the GPU machine, run call 1 (420 seconds), and call 2 (310 seconds) if time is left:
    python benchmarks/gpu_session.py 1 --output results
    python benchmarks/gpu_session.py 2 --output results
    # Call 3 (220 seconds) repeats measurements that have figures of an earlier release.
    # On a CPU, run the same commands with tiny models:
    python benchmarks/gpu_session.py 1 --output results --dry-run

A call runs a list of steps. Each step is a command with a time limit. OUTPUT/results-CALL.json is
written after each step, so that no finished step is lost if the call is killed. The output of the
steps is in OUTPUT/log-CALL.txt. A step is skipped if too little time is left for it. If a step
fails, the next step runs. A step writes its report after each of its cases, so that a step that is
killed at its limit keeps the cases before. Call 1 begins with reinforcement learning.

With --dry-run, the same commands run on this machine with tiny models instead of the real shapes,
so that errors are found without a GPU. CUDA kernels are not used, and their tests are skipped.
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
LIMITS = {"1": 420, "2": 310, "3": 220}  # maximum seconds of each call
DRY_LIMIT = 900  # maximum seconds of a step in a dry run, whose machine may be slow
MISSING_PACKAGES = 3  # exit status of device_facts.py if packages are missing
# A step starts only if at least this fraction of its seconds is left.
FITS = 0.6
# sitecustomize.py of a dry run. Each Python process runs it at its start. It makes all shapes tiny.
TINY = """
from dataclasses import replace
from tunesmith.model.arch.shapes import SHAPES
small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
small |= {"head_dim": 8, "num_hidden_layers": 2, "vocab_size": 512}
experts = {"moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2}
for name, shape in SHAPES.items():
    config = {**shape.config, **small}
    config |= {key: value for key, value in experts.items() if key in config}
    SHAPES[name] = replace(shape, config=config)
"""


class Step(NamedTuple):
    """A command of a call.

    Attributes:
        seconds: maximum run time.
        shows: what the step measures. The text is printed when the step ends.
    """

    name: str
    seconds: int
    shows: str
    command: list[str]


def steps_of_call(call: str, folder: Path, work: Path, *, dry: bool) -> list[Step]:
    """Return the steps of a call, the most important steps first."""

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

    def decoding(name: str, *words: str) -> list[str]:
        return script("speed/decoding", *words, *report(name))

    def pictures(family: str) -> list[str]:
        return script("speed/picture_steps", "--family", family, *tiny, *report(family))

    def compared(name: str, variant: str, *words: str) -> list[str]:
        """Return the command that compares a variant of ablation.py with the unchanged code."""
        options = ["--only", variant, "--rounds", "1", *report(name)]
        return script("speed/ablation", *words, *options)

    tiny = ["--small"] if dry else []
    nf4 = "model.quantize=nf4"
    slots = ["64", "256", "512"]
    # 160 tokens make the slots grow.
    wide = ["--slots", *slots, "--group", "16", "--prompt-tokens", "150", "--tokens", "160"]
    profile = ["--profile-slots", "256"]
    if dry:
        wide = ["--slots", "16", "32", "--group", "16", "--prompt-tokens", "20", "--tokens", "80"]
        profile = ["--profile-slots", "32"]
    grpo = [
        "method.name=grpo",
        f"method.reward={ROOT / 'benchmarks' / 'parity' / 'rl_rewards.py'}:letters",
        f"train.global_batch={2 if dry else 16} examples",
        "method.group=16",
        f"method.answer_tokens={9 if dry else 100}",
        "data.seq_len=512",
    ]
    # addopts of pyproject.toml has -q: with -vv, pytest prints the name of each test as it ends, so
    # that a killed step leaves the names.
    tests = ["-m", "pytest", "-vv", "-m", "gpu", "-n", "0" if dry else "6", "-rs"]
    tests += ["-p", "no:cacheprovider", "--junitxml", str(work / "tests.xml")]
    # Reinforcement learning has never run on a GPU, so its tests run first.
    tests += ["tests/training/test_grpo_on_devices.py", "tests"]
    # A process needs 8 s to start, and 19 s more to build a 70B model in nf4. Each comparison does
    # both twice.
    calls = {}
    calls["1"] = [
        Step("device", 15, "the machine",
             script("speed/device_facts", "--output", str(work / "device.json"))),
        Step("tests", 60, "equal numbers, no GPU synchronization, memory, NCCL",
             [sys.executable, *tests]),
        Step("slots-4b", 90, "launches per token, microseconds per launch, idle share",
             decoding("slots-4b", *shape("qwen3-4b", *wide, *profile))),
        Step("grpo-4b", 100, "GRPO in bf16 and fp8: KL, memory, compilations",
             script("speed/grpo_steps", *shape("qwen3-4b", *grpo, "--steps", "2"),
                    *report("grpo-4b"))),
        Step("varlen-decoding", 60, "varlen_attn with one query per slot, also in a CUDA graph",
             script("speed/varlen_decoding", *tiny, *report("varlen-decoding"))),
        Step("qwen2_5_vl", 70, "synchronization in vision models, plans for picture sizes",
             pictures("qwen2_5_vl")),
        Step("decoding-8b", 25, "decoding of one answer",
             decoding("decoding-8b", *shape("llama3-8b"))),
    ]  # fmt: skip
    calls["2"] = [
        Step("70b-nf4", 120, "our nf4 kernel in a training step",
             compared("70b-nf4", "nf4 kernel",
                      *shape("llama3-70b", nf4, *batch(8192), *steps(2, 1)))),
        Step("3b-attention", 70, "our attention with 3 query heads per key head",
             compared("3b-attention", "attention everywhere",
                      *shape("llama3-3b", "adapter.kind=none", *batch(32768), *steps(2, 1)))),
        Step("8b-streamed", 60, "overlap of copies with the step, also if staged",
             streamed("8b-streamed", "link,8b resident,8b staged", 3)),
        Step("30b-experts", 60, "row kernels; 27,374 tokens/s were measured on an H200",
             [sys.executable, "-m", "tunesmith", "bench", *report("30b-experts"),
              *shape("qwen3-30b-a3b", *batch(32768), *steps(4, 2))]),
    ]  # fmt: skip
    calls["3"] = [
        Step("gemma3", 60, "attention over pictures, peak memory and plan", pictures("gemma3")),
        Step("decoding-70b-nf4", 35, "decoding with nf4 weights",
             decoding("decoding-70b-nf4", *shape("llama3-70b", nf4))),
        Step("experts-streamed", 80, "experts streamed from the host",
             streamed("experts-streamed", "experts", 3)),
        Step("planned", 45, "layers that stay on the device after the memory trial",
             streamed("planned", "planned", 3)),
    ]  # fmt: skip
    return calls[call]


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
            start_new_session=True,  # so that killpg also kills the processes that the step starts
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
    """Unpack the wheels in `folder`. Return the environment variables of the steps."""
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
        # As `tunesmith` sets it. The scripts of speed/ call torch before the command line does.
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
        # Most of the tests' time is compilation. Each of the six workers starts two processes for
        # it.
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
    }


def write_tiny_inputs(folder: Path) -> None:
    """Write the rows and the tokenizer of a dry run."""
    from streamed import write_inputs

    write_inputs(folder, 64)
    row = {"instruction": "Count to seven.", "input": "", "output": "one two three four five six"}
    (folder / "rows.json").write_text(json.dumps([row] * 200), encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Return {} if the file cannot be read or parsed."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def run_call(options: argparse.Namespace) -> bool:
    """Run the steps of a call. Return whether all steps ran and ended with exit status 0."""
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
            print(
                f"{step.name}: skipped, because {left:.0f} s are left and it may take "
                f"{step.seconds} s",
                flush=True,
            )
        else:
            most = min(DRY_LIMIT if options.dry_run else step.seconds, left)
            started = time.monotonic()
            if options.dry_run:
                print(f"$ {shlex.join(step.command)}", flush=True)
            status = run_step(step, most, environment, log)
            seconds = time.monotonic() - started
            done[step.name] = {"exit": status, "seconds": round(seconds), "limit": round(most)}
            found = read_report(work, step.name, log)
            if found is not None:
                done[step.name]["report"] = found
            ended = f"ended with exit status {status} after {seconds:.0f} s ({step.shows})"
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
        # Write another file and rename it, because the call may be killed at any moment.
        partial = output / "partial.json"
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        partial.replace(output / f"results-{options.call}.json")
    return all(step["exit"] == 0 for step in done.values())


def main() -> None:
    """Run one call. The exit status is 1 if a step failed or was skipped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("call", choices=LIMITS)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--folder", type=Path, default=Path(".gpu"), help="folder that first_gpu_prep.sh wrote"
    )
    parser.add_argument("--limit", type=float, help="maximum seconds of the call")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run only these steps")
    parser.add_argument("--dry-run", action="store_true", help="use tiny models, on any machine")
    options = parser.parse_args()
    if (options.output / f"work-{options.call}").exists():
        parser.error(
            f"--output {options.output} already has results of call {options.call}; "
            "use another folder"
        )
    if not options.dry_run and not (options.folder / "rows.json").exists():
        parser.error(
            f"{options.folder}/rows.json does not exist; run: bash benchmarks/first_gpu_prep.sh "
            f"ROWS TOKENIZER {options.folder}"
        )
    sys.exit(0 if run_call(options) else 1)


if __name__ == "__main__":
    main()
