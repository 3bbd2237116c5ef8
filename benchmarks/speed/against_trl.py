"""Comparison of the speed with TRL on a CPU or a GPU, with the same model, rows and batch.

    python benchmarks/speed/against_trl.py --model DIR --data rows.json --json out.json

Each round starts one process per contender, in turns, so that noise of the machine affects all of
them. The report has for each contender the non-padding tokens/s over the timed steps (including
data loading), the peak memory (allocated memory on a GPU, resident memory on a CPU), and the loss
of each step. It also has the ratios of the median speeds.

Rows are a JSON array in the alpaca format. All contenders train on the same text in the same order,
and all tokens are supervised. benchmarks/speed/random_model.py writes a model of a real shape with
random weights. With --pictures, rows are JSON lines of messages with images, and
benchmarks/speed/picture_model.py writes the model and the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TEXT = (
    "Below is an instruction that describes a task. Write a response that completes the request.\n"
    "### Instruction: {}\n\n### Input: {}\n\n### Response: {}"
)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTENDERS: dict[str, dict[str, Any]] = {
    "tunesmith": {},
    "trl default": {},
    # The fastest settings of TRL on a CPU that we found
    "trl best": {"gradient_checkpointing": False},
}


def texts(path: str, count: int, eos: str = "") -> list[str]:
    """Return the first `count` rows as text. Repeat the rows if there are fewer."""
    rows = json.loads(Path(path).read_text())
    out = [TEXT.format(r["instruction"], r.get("input") or "", r["output"]) + eos for r in rows]
    return (out * (count // len(out) + 1))[:count]


def picture_rows(path: str, count: int) -> list[dict[str, Any]]:
    """Return the first `count` rows with absolute paths of pictures. Repeat the rows if there are
    fewer.
    """
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for row in rows:
        row["images"] = [str(Path(path).resolve().parent / name) for name in row["images"]]
    return (rows * (count // len(rows) + 1))[:count]


def trl_picture_rows(path: str, count: int) -> list[dict[str, Any]]:
    """Return the rows of `picture_rows` in TRL's format: messages of parts, and opened pictures."""
    from PIL import Image

    rows = []
    for row in picture_rows(path, count):
        question, answer = row["messages"]
        marks = question["content"].count("<image>")
        text = question["content"].replace("<image>", "")
        parts = [*[{"type": "image"}] * marks, {"type": "text", "text": text}]
        answers = [{"type": "text", "text": answer["content"]}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answers}]
        images = [Image.open(image).convert("RGB") for image in row["images"]]
        rows.append({"messages": messages, "images": images})
    return rows


def tunesmith_run(a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train with tunesmith by `tunesmith.train`, which the command line calls too."""
    from tunesmith import train  # sets the number of threads of this process before it loads torch
    from tunesmith.config.load import from_mapping

    rows = folder / "rows.jsonl"
    values = [{"text": t} for t in texts(a.data, a.steps * a.batch)] if not a.pictures else []
    if a.pictures:
        values = picture_rows(a.data, a.steps * a.batch)
    rows.write_text("".join(json.dumps(value) + "\n" for value in values))
    recipe = {
        "model": {"name": a.model, "dtype": a.dtype, "vision": a.pictures},
        "adapter": {"kind": "lora", "rank": 8, "alpha": 16},
        "data": {
            "train": {"source": str(rows), "format": "messages" if a.pictures else "text"},
            "seq_len": a.seq, "train_on": "all", "shuffle": False,
        },
        "train": {
            "duration": f"{a.steps} steps", "global_batch": f"{a.batch} examples",
            "learning_rate": 1e-4, "schedule": "linear", "warmup": "0 steps", "compile": a.compile,
        },
        "checkpoint": {"every": None}, "log": {"tensorboard": False},
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    result = train(from_mapping(recipe, where="benchmark", base=folder))
    timed = result.records[a.skip :]
    return {
        "tokens": sum(r.tokens for r in timed),
        "seconds": sum(r.step_seconds for r in timed),
        "loss": [r.loss for r in result.records],
    }


def trl_run(a: argparse.Namespace, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Train with TRL's SFTTrainer and PEFT, set up as in TRL's documentation.

    Args:
        options: additional arguments of SFTConfig.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl import SFTConfig, SFTTrainer

    seen: list[Any] = []
    clock: dict[int, float] = {}

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any, *rest: Any, **kw: Any) -> Any:
            # The sums are read after the training, so that no step waits for the device.
            seen.append(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *rest, **kw)

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._note(0)

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            self._note(state.global_step)

        def _note(self, step: int) -> None:
            if step in (a.skip, a.steps):
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                clock[step] = time.perf_counter()

    tokenizer = AutoTokenizer.from_pretrained(a.model)
    config = SFTConfig(
        max_steps=a.steps, per_device_train_batch_size=a.batch, max_length=a.seq,
        learning_rate=1e-4, lr_scheduler_type="linear", bf16=a.dtype == "bf16", save_strategy="no",
        report_to="none", logging_steps=1, disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), output_dir=str(folder / "run"), **options,
    )  # fmt: skip
    kind = AutoModelForImageTextToText if a.pictures else AutoModelForCausalLM
    targets: Any = LINEARS
    if a.pictures:
        # The vision model stays frozen and gets no adapter.
        targets = f".*language_model.*[.]({'|'.join(LINEARS)})"
        dataset = Dataset.from_list(trl_picture_rows(a.data, a.steps * a.batch))
    else:
        dataset = Dataset.from_dict({"text": texts(a.data, a.steps * a.batch, tokenizer.eos_token)})
    trainer = InOrder(
        model=kind.from_pretrained(
            a.model, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[a.dtype]
        ),
        processing_class=AutoProcessor.from_pretrained(a.model) if a.pictures else tokenizer,
        train_dataset=dataset,
        args=config,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()
    return {
        "tokens": sum(int(count) for count in seen[a.skip :]),
        "seconds": clock[a.steps] - clock[a.skip],
        "loss": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }


def contend(a: argparse.Namespace) -> None:
    """Run one contender in this process. Print its report as the last line of stdout."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if a.contender == "tunesmith":
            out = tunesmith_run(a, folder)
        else:
            out = trl_run(a, folder, CONTENDERS[a.contender])
    from tunesmith.metrics import hardware
    from tunesmith.runtime.device import choose_device

    out |= {
        "tokens_per_second": out["tokens"] / out["seconds"],
        "peak_gib": hardware.memory_gib(choose_device()),
    }
    print("REPORT " + json.dumps(out))


def report_of(contender: str) -> dict[str, Any]:
    """Run a contender in a new process. Return the report from its last line with REPORT."""
    command = [sys.executable, *sys.argv, "--contender", contender]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    reports = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    if done.returncode or not reports:
        sys.exit(f"{contender} failed; its output:\n{done.stdout}\n{done.stderr}")
    report: dict[str, Any] = json.loads(reports[-1].removeprefix("REPORT "))
    return report


def contest(a: argparse.Namespace) -> None:
    """Run the contenders in turns, `--rounds` times. Print the table and write the report.

    Speeds are compared with the first contender, which is tunesmith by default.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in a.only}
    for round_ in range(a.rounds):
        for name, done in runs.items():
            done.append(report_of(name))
            print(f"round {round_ + 1}  {figures_of(name, done[-1])}", flush=True)
    table = {}
    for name, done in runs.items():
        table[name] = {
            "tokens_per_second": statistics.median(run["tokens_per_second"] for run in done),
            "peak_gib": max(run["peak_gib"] for run in done),
        }
    ours = table[a.only[0]]["tokens_per_second"]
    for name, row in table.items():
        row["times_slower_than_tunesmith"] = ours / row["tokens_per_second"]
        slower = f"{row['times_slower_than_tunesmith']:.2f} x"
        print(f"{figures_of(name, row)}  {a.only[0]} is {slower} as fast")
    if a.json:
        report = {"command": sys.argv, "median": table, "runs": runs}
        Path(a.json).write_text(json.dumps(report, indent=1))


def figures_of(name: str, row: dict[str, Any]) -> str:
    return f"{name:12}  {row['tokens_per_second']:8.1f} tok/s  {row['peak_gib']:5.2f} GiB"


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="model folder of Transformers")
    p.add_argument("--data", required=True, help="rows in the alpaca format, a JSON array")
    p.add_argument(
        "--pictures", action="store_true", help="the rows are JSON lines of messages with images"
    )
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seq", type=int, default=512)
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--skip", type=int, default=2, help="number of first steps that are not timed")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument(
        "--dtype",
        default="bf16",
        choices=["bf16", "fp32"],
        help="use fp32 on a CPU that only emulates bf16",
    )
    p.add_argument("--compile", default="auto", choices=["auto", "on", "off"])
    p.add_argument("--only", nargs="+", choices=[*CONTENDERS], default=[*CONTENDERS])
    p.add_argument("--json", help="file for the report")
    p.add_argument("--contender", choices=[*CONTENDERS], help=argparse.SUPPRESS)
    a = p.parse_args()
    if Path(a.model).exists():
        a.model = str(Path(a.model).resolve())
    if a.contender:
        contend(a)
    else:
        contest(a)


if __name__ == "__main__":
    main()
