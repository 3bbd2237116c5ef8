"""Speed beside TRL on a CPU or a GPU: the same model, rows and batch, interleaved in one run.

    python benchmarks/speed/against_trl.py --model DIR --data rows.json --json out.json

Each round starts one process per contender, in turn, so that a noisy machine is noisy for all.
Reported for each: non-padding tokens/s over the timed steps (data loading included), peak memory
(allocated on a GPU, else resident), the loss of each step, and the ratio of the medians. Rows are
alpaca-like JSON; every contender trains on the same text in the same order, on every token. `--busy
N` starts N processes beside them that compute without end. A model of a true shape with random
weights: benchmarks/speed/random_model.py.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEXT = (
    "Below is an instruction that describes a task. Write a response that completes the request.\n"
    "### Instruction: {}\n\n### Input: {}\n\n### Response: {}"
)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTENDERS = {
    "tunesmith": {},
    "trl default": {},
    # The fastest of its settings on a CPU that we know
    "trl best": {"gradient_checkpointing": False},
}


def texts(path: str, count: int, eos: str = "") -> list[str]:
    """The first `count` rows as text, repeated if there are fewer."""
    rows = json.loads(Path(path).read_text())
    out = [TEXT.format(r["instruction"], r.get("input") or "", r["output"]) + eos for r in rows]
    return (out * (count // len(out) + 1))[:count]


def tunesmith_run(a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """tunesmith, through the same `train` that the command calls."""
    from tunesmith import train  # which prepares this process's threads before it loads torch
    from tunesmith.config.load import from_mapping

    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts(a.data, a.steps * a.batch))
    )
    recipe = {
        "model": {"name": a.model, "dtype": a.dtype},
        "adapter": {"kind": "lora", "rank": 8, "alpha": 16},
        "data": {"train": {"source": str(rows), "format": "text"}, "seq_len": a.seq, "train_on": "all", "shuffle": False},
        "train": {
            "duration": f"{a.steps} steps", "global_batch": f"{a.batch} examples", "learning_rate": 1e-4,
            "schedule": "linear", "warmup": "0 steps", "compile": a.compile,
        },
        "checkpoint": {"every": None}, "log": {"tensorboard": False}, "output_dir": str(folder / "run"),
    }  # fmt: skip
    result = train(from_mapping(recipe, where="benchmark", base=folder))
    timed = result.records[a.skip :]
    return {
        "tokens": sum(r.tokens for r in timed),
        "seconds": sum(r.step_seconds for r in timed),
        "loss": [r.loss for r in result.records],
    }


def trl_run(a: argparse.Namespace, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """TRL's SFTTrainer with PEFT, as its documentation sets it up, and `options` on top."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    seen: list[Any] = []
    clock: dict[int, float] = {}

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any, *rest: Any, **kw: Any) -> Any:
            # Read at the end, so that nothing here waits for the device
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
        max_steps=a.steps, per_device_train_batch_size=a.batch, max_length=a.seq, learning_rate=1e-4,
        lr_scheduler_type="linear", bf16=a.dtype == "bf16", save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), output_dir=str(folder / "run"), **options,
    )  # fmt: skip
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(
            a.model, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[a.dtype]
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict(
            {"text": texts(a.data, a.steps * a.batch, tokenizer.eos_token)}
        ),
        args=config,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()
    return {
        "tokens": sum(int(count) for count in seen[a.skip :]),
        "seconds": clock[a.steps] - clock[a.skip],
        "loss": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }


def contend(a: argparse.Namespace) -> None:
    """Run one contender in this process; its report is the last line of stdout."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = (
            tunesmith_run(a, folder)
            if a.contender == "tunesmith"
            else trl_run(a, folder, CONTENDERS[a.contender])
        )
    from tunesmith.metrics import hardware
    from tunesmith.runtime.device import choose_device

    out |= {
        "tokens_per_second": out["tokens"] / out["seconds"],
        "peak_gib": hardware.memory_gib(choose_device()),
    }
    print("REPORT " + json.dumps(out))


def report_of(contender: str, launch: Sequence[str] = (), **environment: str) -> dict[str, Any]:
    """What a contender of this script, run in new processes that `launch` starts, prints behind
    REPORT.
    """
    command = [sys.executable, *launch, *sys.argv, "--contender", contender]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    if done.returncode or not found:
        sys.exit(f"{contender} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(found[-1].removeprefix("REPORT "))


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """`count` processes that compute without end."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def main() -> None:
    """Run all contenders in turn, `--rounds` times, and print the table."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="a Transformers folder")
    p.add_argument("--data", required=True, help="alpaca-like rows, a JSON array")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seq", type=int, default=512)
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--skip", type=int, default=2, help="first steps that are not timed")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument(
        "--busy",
        type=int,
        default=0,
        metavar="N",
        help="processes beside them that compute without end",
    )
    p.add_argument(
        "--dtype",
        default="bf16",
        choices=["bf16", "fp32"],
        help="of all contenders; fp32 where a CPU emulates bf16",
    )
    p.add_argument("--compile", default="auto", choices=["auto", "on", "off"])
    p.add_argument("--json", help="write the report here")
    p.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    a = p.parse_args()
    a.model = str(Path(a.model).resolve()) if Path(a.model).exists() else a.model
    if a.contender:
        contend(a)
        return
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    with neighbours(a.busy):
        for round_ in range(a.rounds):
            for name, done in runs.items():
                done.append(report_of(name))
                speed, peak = (done[-1][figure] for figure in ("tokens_per_second", "peak_gib"))
                print(
                    f"round {round_ + 1}  {name:12}  {speed:8.1f} tok/s  {peak:.2f} GiB", flush=True
                )
    table = {
        name: {
            "tokens_per_second": statistics.median(r["tokens_per_second"] for r in done),
            "peak_gib": max(r["peak_gib"] for r in done),
        }
        for name, done in runs.items()
    }
    ours = table["tunesmith"]["tokens_per_second"]
    for name, row in table.items():
        row["times_slower_than_tunesmith"] = ours / row["tokens_per_second"]
        speed, ratio = row["tokens_per_second"], row["times_slower_than_tunesmith"]
        print(
            f"{name:12} {speed:8.1f} tok/s  {row['peak_gib']:5.2f} GiB  tunesmith is {ratio:.2f} x"
        )
    if a.json:
        Path(a.json).write_text(
            json.dumps({"command": sys.argv, "median": table, "runs": runs}, indent=1)
        )


if __name__ == "__main__":
    main()
