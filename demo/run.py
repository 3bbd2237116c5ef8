"""Run the demo (`make demo`): train a small model on a task and show its answers before and after.

Each step is a `tunesmith` command. The demo prints the command before it runs it, so that you can
copy the command and change it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import task
from rich.console import Console
from rich.table import Table

from tunesmith.metrics.record import StepRecord, read_records
from tunesmith.metrics.terminal import format_seconds

HERE = Path(os.path.relpath(Path(__file__).parent))  # relative, to keep the printed commands short
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
RUN = Path("runs/demo")
# The environment of `make demo` is not active in the user's shell.
PROGRAM = os.path.relpath(Path(sys.executable).with_name("tunesmith"))


def find_model() -> str:
    """Return the value of `model.name`: the model from the Hub's cache, from the Hub, or the same
    model in 4 bits from the installed package, in this order.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(HUB_ID, "model.safetensors"), str):
        return HUB_ID
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("1", "ON", "YES", "TRUE"):
        try:
            HfApi().model_info(HUB_ID, timeout=5)
        except Exception as error:  # after any error, the package is used instead
            print(f"the Hub cannot be reached ({type(error).__name__}): using the model `demo`")
        else:
            return HUB_ID
    return "demo"


def tunesmith(*words: str) -> None:
    """Print a command and run it. If it fails, exit with its exit code.

    Ctrl-C also reaches the command: the command saves its state and prints how to go on, and the
    demo waits for it.
    """
    print(f"\n$ {PROGRAM} {shlex.join(words)}", flush=True)
    before = signal.signal(signal.SIGINT, lambda *_: None)  # the command would inherit SIG_IGN
    code = subprocess.Popen([sys.executable, "-m", "tunesmith", *words]).wait()
    signal.signal(signal.SIGINT, before)
    if code:
        sys.exit(code)


def ask(run: str, held_out: Path, answers: Path, *more: str) -> list[dict[str, str]]:
    """Generate the model's answers to the held-out rows and return a dict with the keys asked,
    wanted and got for each row. Answers that an interrupted demo has written are kept.
    """
    # A small batch shows progress on a slow machine, and is all that ctrl-C loses.
    tunesmith("generate", run, *more, "--input", str(held_out), "--output", str(answers),
              "--max-new-tokens", "64", "--batch-size", "8")  # fmt: skip
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    return [
        {
            "asked": row["messages"][0]["content"],
            "wanted": row["messages"][1]["content"],
            "got": row["output"].strip(),
        }
        for row in rows
    ]


def fields_right(row: dict[str, str]) -> int:
    """Return the number of `key: value` fields of the answer that are right."""
    return len(set(row["wanted"].split(" | ")) & set(row["got"].split(" | ")))


def show_scores(
    console: Console, before: list[dict[str, str]], after: list[dict[str, str]]
) -> None:
    """Print a table of the scores of the base model and the tuned model on the same rows."""
    table = Table(
        "on held-out orders",
        "base model",
        "after training",
        title="before and after",
        title_justify="left",
    )
    whole = [sum(row["got"] == row["wanted"] for row in rows) for rows in (before, after)]
    table.add_row(
        "answers right, letter for letter",
        *(f"{n}/{len(before)} ({n / len(before):.0%})" for n in whole),
    )
    fields = sum(len(row["wanted"].split(" | ")) for row in before)
    parts = [sum(map(fields_right, rows)) for rows in (before, after)]
    table.add_row("fields right", *(f"{n}/{fields} ({n / fields:.0%})" for n in parts))
    console.print(table)


def show_answers(
    console: Console, before: list[dict[str, str]], after: list[dict[str, str]], count: int = 3
) -> None:
    """Print the first `count` rows with both answers, whether the answers are right or wrong."""
    for old, new in list(zip(before, after, strict=True))[:count]:
        table = Table(show_header=False, expand=False)
        table.add_row("order", new["asked"])
        table.add_row("wanted", new["wanted"])
        table.add_row("base", old["got"])
        table.add_row("tuned", new["got"])
        console.print(table)


def show_losses(records: list[StepRecord], *, lines: int = 12, width: int = 60) -> None:
    """Print the mean loss of each part of the run as a bar chart."""
    print("\nloss")
    size = -(-len(records) // lines)
    parts = [records[at : at + size] for at in range(0, len(records), size)]
    means = [(part[0].step, sum(r.loss for r in part) / len(part)) for part in parts]
    for step, mean in means:
        bar = "#" * round(width * mean / max(value for _, value in means))
        print(f"  step {step:>4}  {mean:6.3f}  {bar}")
    print()


def main() -> None:
    """Write the rows, train the model, and print losses, answers, scores, files and next commands."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    train, held_out = task.write(HERE / "data")
    print(
        f"{task.TRAIN_ROWS} rows to train on: {train}\n{task.HELD_OUT_ROWS} held-out rows: {held_out}"
    )
    model = find_model()
    RUN.parent.mkdir(exist_ok=True)
    of_model = RUN.parent / f"demo-base-{Path(model).stem}.jsonl"
    before = ask(model, held_out, of_model, "--base", "--resume")
    tunesmith("train", str(HERE / "recipe.yaml"), f"model.name={model}")
    answers = RUN.parent / "demo-tuned.jsonl"
    weights = RUN / "final" / "manifest.json"
    # Answers that are older than the weights are from an earlier run.
    is_of_run = answers.exists() and answers.stat().st_mtime > weights.stat().st_mtime
    after = ask(str(RUN), held_out, answers, "--resume" if is_of_run else "--force")

    records = read_records(RUN / "metrics.jsonl")
    show_losses(records)
    show_answers(console, before, after)
    show_scores(console, before, after)
    print(
        f"the {len(records)} training steps took {format_seconds(sum(record.step_seconds for record in records))}"
    )
    print("\nfiles")
    for path, what in (
        (RUN / "final", "the adapter in PEFT's format"),
        (RUN / "metrics.jsonl", "one record for each step"),
        (RUN.parent / "demo-tuned.jsonl", "the tuned model's answers to the held-out rows"),
        (HERE / "recipe.yaml", "the recipe"),
    ):
        print(f"  {path!s:<24}{what}")
    print(f"""
next
  {PROGRAM} chat {RUN}
  {PROGRAM} eval {RUN} --data {held_out} --score exact
  {PROGRAM} merge {RUN} --output {RUN}-merged
  {PROGRAM} train {HERE / "recipe.yaml"} model.name={shlex.quote(model)} adapter.rank=4 output_dir=runs/demo-r4
  {Path(PROGRAM).with_name("tensorboard")} --logdir {RUN / "tensorboard"}

to write only `tunesmith`, activate the environment: source .venv/bin/activate""")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; to resume the training, run: make demo")
