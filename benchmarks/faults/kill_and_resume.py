"""Test of resumed runs: kill a run with SIGKILL, start the same command again, and compare the
result with an uninterrupted run.

    python benchmarks/faults/kill_and_resume.py RECIPE [key=value ...] [--json FILE]
    python benchmarks/faults/kill_and_resume.py --shape llama3-3b --layers 4 --tokenizer DIR \\
        --data rows.json [--json FILE]
    python benchmarks/faults/kill_and_resume.py RECIPE [key=value ...] --kills 30 [--seed 0]
    python benchmarks/faults/kill_and_resume.py --family qwen3_5 --adapter lora --kills 30
    python benchmarks/faults/kill_and_resume.py --family llama --method kto --adapter none \\
        --kills 10
    python benchmarks/faults/kill_and_resume.py --family qwen3_5 parallel.shard=2 --ranks 4 \\
        --kills 6
    python benchmarks/faults/kill_and_resume.py --family llama --layers 6 --stream 5 --kills 30
    python benchmarks/faults/kill_and_resume.py --family qwen2_5_vl --rows pictures --kills 20
    python benchmarks/faults/kill_and_resume.py --family llama --rows documents --kills 10
    python benchmarks/faults/kill_and_resume.py --family llama --method grpo --kills 30

Both runs are `tunesmith train` with deterministic algorithms, STEPS steps and a checkpoint every
CHECKPOINT_EVERY steps. The run is killed one step after its first complete checkpoint. The losses,
the gradient norms and the metrics of a preference method are compared bit for bit for all steps,
and the bytes of the final weights. The exit code is 1 if they differ. `--json` writes the result to
a file.

- `--shape`: a model with the sizes of this shape, random weights and `--layers` layers
- `--family`: a tiny random model of the tests: llama, qwen3_moe, or the text model of a family of
  `vision_models.FAMILIES`
- `--method`: preference training on generated pairs or rated answers. The reference of a full
  fine-tuning run is stored in a cache that all starts share. With grpo, the report has the steps
  that were killed before their answers were written, and the rollout files are compared too.
- `--rows pictures`: a family of `vision.FAMILIES`, and two of three rows have a picture
- `--rows documents`: texts that are longer than a packed row
- `--kills N`: runs of LONG_STEPS steps with a checkpoint every LONG_CHECKPOINT_EVERY steps are
  killed N times in total, at random times between their first step and their end. A run is killed
  up to KILLS_A_RUN times before it may finish, and there are as many runs as needed. The
  optimizer's state in the last checkpoint is compared too.
- `--stream N`: the frozen matrices of N layers are streamed from the host in the killed runs, but
  not in the uninterrupted run
- `--ranks N`: N processes on this machine train together with gloo. Each kill hits a random rank,
  and the other ranks must end within SURVIVORS_END seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = 12
CHECKPOINT_EVERY = 4
LONG_STEPS = 120
LONG_CHECKPOINT_EVERY = 7
KILLS_A_RUN = 6
COMPARED = ("loss", "grad_norm", "learning_rate", "tokens", "examples")
# Prefixes of the names of a preference method's metrics
OF_METHOD = ("reward", "logps", "kl", "answer_length", "cut_share", "entropy", "groups")
# Scorer of grpo
REWARD = """
def letters(answer, row):
    return sum(letter in "abcde" for letter in answer) / max(1, len(answer))
"""
DEADLINE = 600.0  # maximum seconds of a run
SURVIVORS_END = 120.0  # maximum seconds until the other ranks end after a kill


def train_command(
    words: list[str], output_dir: Path, *, is_long: bool = False, streamed: int = 0
) -> list[str]:
    """Return the `tunesmith train` command for the recipe and keys in `words`."""
    steps = LONG_STEPS if is_long else STEPS
    every = LONG_CHECKPOINT_EVERY if is_long else CHECKPOINT_EVERY
    keys = [
        f"train.duration={steps} steps",
        f"checkpoint.every={every} steps",
        "train.deterministic=true",
        "validate.every=null",
        "log.tensorboard=false",
        "log.samples=0",
        f"output_dir={output_dir}",
    ]
    command = ["-m", "tunesmith", "train"]
    if streamed:
        command = [str(Path(__file__).with_name("train_streamed.py")), str(streamed)]
    return [sys.executable, *command, *words, *keys]


def read_records(output_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run directory, without an incomplete last line."""
    file = output_dir / "metrics.jsonl"
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    complete_lines = text[: text.rfind("\n") + 1].splitlines()
    return [json.loads(line) for line in complete_lines]


def start(
    words: list[str],
    output_dir: Path,
    ranks: int,
    *,
    is_long: bool = False,
    streamed: int = 0,
    **options: Any,
) -> list[subprocess.Popen[bytes]]:
    """Start the processes of a run, each in its own session. Return them in the order of ranks."""
    command = train_command(words, output_dir, is_long=is_long, streamed=streamed)
    environments: list[dict[str, str]] = [{}]
    if ranks > 1:
        environments = environments_of(ranks)
    processes = []
    for of_rank in environments:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **of_rank}
        process = subprocess.Popen(command, start_new_session=True, env=environment, **options)
        processes.append(process)
    return processes


def environments_of(ranks: int) -> list[dict[str, str]]:
    """Return the environment variables that torchrun sets, for each rank of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def train(
    words: list[str],
    output_dir: Path,
    ranks: int = 1,
    *,
    is_long: bool = False,
    streamed: int = 0,
) -> float:
    """Train to the end, and return the duration in seconds. Raise SystemExit if the run fails."""
    began = time.monotonic()
    processes = start(words, output_dir, ranks, is_long=is_long, streamed=streamed)
    try:
        codes = [process.wait(DEADLINE) for process in processes]
    finally:
        for process in processes:
            kill(process)
    if any(codes):
        raise SystemExit(f"error: the run in {output_dir} ended with exit codes {codes}")
    return time.monotonic() - began


def train_until_killed(words: list[str], output_dir: Path) -> int:
    """Start a run, and kill all its processes one step after its first complete checkpoint.

    Return the last recorded step.
    """
    [run] = start(words, output_dir, 1)
    manifest = output_dir / f"checkpoint-{CHECKPOINT_EVERY}" / "manifest.json"
    deadline = time.monotonic() + DEADLINE
    steps_done = 0
    while not manifest.exists() or steps_done <= CHECKPOINT_EVERY:
        if run.poll() is not None:
            raise SystemExit(
                f"error: the run ended before the kill, step {steps_done}: exit {run.returncode}"
            )
        if time.monotonic() > deadline:
            kill(run)
            raise SystemExit(f"error: the run wrote no checkpoint within {DEADLINE:.0f} s")
        time.sleep(0.01)
        steps_done = len(read_records(output_dir))
    kill(run)
    return steps_done


def last_line(output_dir: Path) -> str:
    """Return the last line of the records, which may be incomplete. Return "" if there is none."""
    file = output_dir / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return lines[-1] if lines else ""


def train_and_kill(
    words: list[str],
    output_dir: Path,
    delay: float,
    ranks: int = 1,
    victim: int = 0,
    streamed: int = 0,
) -> int | None:
    """Start a run, and kill the rank `victim` `delay` seconds after the first new record.

    Return the last recorded step. Return None if the run ended before the kill.
    """
    before = last_line(output_dir)
    processes = start(
        words, output_dir, ranks, is_long=True, streamed=streamed, stdout=subprocess.DEVNULL
    )
    run = processes[victim]
    deadline = time.monotonic() + DEADLINE
    while run.poll() is None and last_line(output_dir) == before and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    has_ended = run.poll() is not None
    if not has_ended:
        kill(run)
    codes = wait_for_all(processes)
    if has_ended:
        if any(codes):
            raise SystemExit(f"error: the run in {output_dir} ended with exit codes {codes}")
        return None
    records = read_records(output_dir)
    return records[-1]["step"] if records else 0


def wait_for_all(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Return the exit codes of all ranks. Raise SystemExit if ranks continue after the kill."""
    deadline = time.monotonic() + SURVIVORS_END
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired as error:
        raise SystemExit(
            f"error: other ranks still run {SURVIVORS_END:.0f} s after a rank was killed"
        ) from error
    finally:
        for process in processes:
            kill(process)


def training_seconds(output_dir: Path) -> float:
    """Return the total seconds of all steps of a run."""
    return sum(float(record["step_seconds"]) for record in read_records(output_dir))


def kill_at_random(
    words: list[str], folder: Path, kills: int, seed: int, ranks: int = 1, streamed: int = 0
) -> dict[str, Any]:
    """Kill runs `kills` times in total, complete each, and compare it with an uninterrupted run."""
    rng = random.Random(seed)
    whole = folder / "whole"
    train(words, whole, ranks, is_long=True)
    seconds = training_seconds(whole)
    killed_at: list[list[int]] = []
    sampling: list[int] = []
    victims: list[list[int]] = []
    reports = []
    while sum(map(len, killed_at)) < kills:
        output_dir = folder / f"killed-{len(killed_at)}"
        steps: list[int] = []
        victims.append([])
        left = kills - sum(map(len, killed_at))
        while len(steps) < min(KILLS_A_RUN, left):
            victim = rng.randrange(ranks)
            delay = rng.uniform(0, seconds)
            step = train_and_kill(words, output_dir, delay, ranks, victim, streamed)
            if step is None:
                break
            steps.append(step)
            victims[-1].append(victim)
            rollouts = output_dir / "rollouts"
            if rollouts.exists() and not (rollouts / f"step-{step + 1}.safetensors").exists():
                sampling.append(step + 1)
        train(words, output_dir, ranks, is_long=True, streamed=streamed)
        killed_at.append(steps)
        report = compare(whole, output_dir)
        report["unequal_optimizer"] = optimizer_state(whole) != optimizer_state(output_dir)
        reports.append(report)
    unequal = [
        report
        for report in reports
        if report["unequal_steps"] or report["unequal_weight_files"] or report["unequal_optimizer"]
    ]
    killed_ranks = {"ranks": ranks, "killed_ranks": victims} if ranks > 1 else {}
    return {
        "kills": sum(map(len, killed_at)),
        "killed_at_steps": killed_at,
        **killed_ranks,
        "killed_while_sampling": sampling,
        "steps": LONG_STEPS,
        "checkpoint_every": LONG_CHECKPOINT_EVERY,
        "streamed_layers": streamed,
        "runs": len(reports),
        "unequal_runs": unequal,
        "equal": not unequal,
    }


def optimizer_state(output_dir: Path) -> dict[str, bytes]:
    """Return the content of the optimizer's files in the last checkpoint, by file name.

    There is one file, or one file per rank.
    """
    last = LONG_STEPS - LONG_STEPS % LONG_CHECKPOINT_EVERY
    checkpoints = sorted(output_dir.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    if not checkpoints or int(checkpoints[-1].name.split("-")[1]) < last:
        raise SystemExit(f"error: {output_dir} has no checkpoint-{last}")
    files = (checkpoints[-1] / "state").glob("optimizer*.safetensors")
    state = {file.name: file.read_bytes() for file in files}
    if not state:
        raise SystemExit(f"error: {checkpoints[-1]} has no optimizer state")
    return state


def compared(record: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a record that must be equal: all that do not depend on time."""
    of_method = [key for key in record if key.startswith(OF_METHOD)]
    return {key: record[key] for key in (*COMPARED, *of_method)}


def compare(whole: Path, resumed: Path) -> dict[str, Any]:
    """Compare the records and the files of the final weights of two run directories.

    Return the differences.
    """
    records = list(zip(read_records(whole), read_records(resumed), strict=True))
    unequal_steps = [left["step"] for left, right in records if compared(left) != compared(right)]
    # A step of grpo whose groups have equal rewards has the loss 0.
    largest = max(
        abs(left["loss"] - right["loss"]) / (abs(left["loss"]) or 1.0) for left, right in records
    )
    files = [*(whole / "final").glob("*.safetensors"), *(whole / "rollouts").glob("*.safetensors")]
    weights = [str(file.relative_to(whole)) for file in sorted(files)]
    unequal_files = [
        name for name in weights if (whole / name).read_bytes() != (resumed / name).read_bytes()
    ]
    return {
        "steps": len(records),
        "unequal_steps": unequal_steps,
        "largest_relative_difference_of_loss": largest,
        "weight_files": len(weights),
        "unequal_weight_files": unequal_files,
    }


def recipe_of_shape(options: argparse.Namespace, folder: Path) -> list[str]:
    """Write a model of the shape with random weights, and a recipe for it.

    Return the words of the command line that select the recipe.
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "speed"))
    from random_model import write_random_model

    write_random_model(folder / "model", options.shape, options.tokenizer, options.layers)
    recipe = {
        "model": {"name": str(folder / "model")},
        "adapter": {"kind": "lora", "rank": 8, "dropout": 0.1},
        "data": {
            "train": {"source": str(Path(options.data).resolve()), "format": "alpaca"},
            "seq_len": 2048,
        },
        "train": {"global_batch": "16384 tokens"},
        "output_dir": "runs/kill-and-resume",
    }
    file = folder / "recipe.json"  # JSON is YAML
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return [str(file)]


def recipe_of_family(options: argparse.Namespace, folder: Path) -> list[str]:
    """Write a tiny random model of the family, and a recipe for it.

    Return the words of the command line that select the recipe.
    """
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    os.environ["TUNESMITH_CACHE"] = str(folder / "cache")
    file = folder / "recipe.json"  # JSON is YAML
    changes: dict[str, Any] = {"adapter": {"kind": options.adapter}}
    if options.rows == "pictures":
        from picture_runs import picture_recipe, write_mixed, write_vision_model

        model = write_vision_model(folder / "model", options.family)
        values = picture_recipe(model, write_mixed(folder, 24), **changes)
        file.write_text(json.dumps(values), encoding="utf-8")
        return [str(file)]
    import vision_models
    from conftest import write_mixture, write_tiny_llama
    from recipes import WORDS, recipe, write_feedback, write_pairs

    model = write_tiny_llama(folder / "tiny", num_hidden_layers=options.layers)
    if options.family == "qwen3_moe":
        model = write_mixture(folder / "model", model)
    elif options.family != "llama":
        # In Llama 4, every fourth layer attends to the entire document.
        text = {"num_hidden_layers": 4, "floor_scale": 4} if options.family == "llama4" else {}
        model = vision_models.build(options.family, folder / "model", model, **text)
    if options.rows == "documents":
        rows = folder / "documents.jsonl"
        rng = random.Random(0)
        texts = [" ".join(rng.choices(WORDS, k=rng.randrange(20, 400))) for _ in range(24)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        rows.write_text("".join(lines), encoding="utf-8")
        changes["data"] = {"train": {"source": str(rows), "format": "text"}}
    if options.method == "grpo":
        (folder / "rewards.py").write_text(REWARD, encoding="utf-8")
        method = {"name": "grpo", "reward": "rewards.py:letters", "group": 4, "answer_tokens": 24}
        changes |= {"method": method, "train": {"global_batch": "4 examples"}}
    elif options.method:
        write, data_format = write_pairs, "preference"
        if options.method == "kto":
            write, data_format = write_feedback, "feedback"
        rows = write(folder / "preferences.jsonl", 48)
        changes["method"] = options.method
        changes["data"] = {"train": {"source": str(rows), "format": data_format}}
    values = recipe(model, folder, held=False, **changes)
    file.write_text(json.dumps(values), encoding="utf-8")
    return [str(file)]


def kill_once(words: list[str], folder: Path) -> dict[str, Any]:
    """Kill a run one step after its first checkpoint, resume it, and compare the results."""
    whole_seconds = train(words, folder / "whole")
    killed_at = train_until_killed(words, folder / "resumed")
    resumed_seconds = train(words, folder / "resumed")
    report = {"killed_at_step": killed_at, **compare(folder / "whole", folder / "resumed")}
    report |= {
        "whole_seconds": round(whole_seconds, 1),
        "resumed_seconds": round(resumed_seconds, 1),
    }
    report["equal"] = not report["unequal_steps"] and not report["unequal_weight_files"]
    return report


def main() -> None:
    """Run the test, and print the result as one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="RECIPE | key=value")
    parser.add_argument("--shape")
    parser.add_argument("--family")
    parser.add_argument("--method", choices=("dpo", "orpo", "simpo", "kto", "grpo"))
    parser.add_argument("--rows", choices=("pictures", "documents"), help="requires --family")
    parser.add_argument("--adapter", choices=("lora", "none"), default="lora")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokenizer")
    parser.add_argument("--data")
    parser.add_argument("--kills", type=int, metavar="N", help="kill N times at random times")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the times and ranks of the kills"
    )
    parser.add_argument(
        "--stream", type=int, default=0, metavar="N", help="stream N layers; requires --kills"
    )
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="use N ranks; requires --kills"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_intermixed_args()
    keys = [word for word in options.words if "=" in word]
    recipes = len(options.words) - len(keys)
    if recipes + bool(options.shape) + bool(options.family) != 1:
        parser.error("pass either a recipe, or --shape with --tokenizer and --data, or --family")
    if options.rows and (options.method or not options.family):
        parser.error("--rows requires --family and does not support --method")
    if (options.ranks > 1 or options.stream) and not options.kills:
        parser.error("--ranks and --stream require --kills: add --kills N")
    with tempfile.TemporaryDirectory(prefix="tunesmith-resume-") as name:
        folder = Path(name)
        words = options.words
        if options.shape:
            words = recipe_of_shape(options, folder) + keys
        elif options.family:
            words = recipe_of_family(options, folder) + keys
        if options.kills:
            report = kill_at_random(
                words, folder, options.kills, options.seed, options.ranks, options.stream
            )
        else:
            report = kill_once(words, folder)
    print(json.dumps(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(not report["equal"])


if __name__ == "__main__":
    main()
