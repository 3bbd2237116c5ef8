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
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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


def contend(a: argparse.Namespace, run: Callable[[argparse.Namespace, Path], Any]) -> None:
    """Run one contender in this process; its report is the last line of stdout."""
    with tempfile.TemporaryDirectory() as name:
        out = run(a, Path(name))
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


def options_of(description: str, data: str, contenders: Collection[str]) -> argparse.ArgumentParser:
    """What every comparison with TRL asks for; `data` says of which rows."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="a Transformers folder")
    p.add_argument("--data", required=True, help=data)
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
    p.add_argument("--only", nargs="+", choices=list(contenders), default=list(contenders))
    p.add_argument("--json", help="write the report here")
    p.add_argument("--contender", choices=list(contenders), help=argparse.SUPPRESS)
    return p


def parse(p: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with the folder of a model as an absolute path."""
    a = p.parse_args()
    a.model = str(Path(a.model).resolve()) if Path(a.model).exists() else a.model
    return a


def contest(a: argparse.Namespace) -> None:
    """Run the contenders in turn, `--rounds` times, and print the table; the first is ours."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in a.only}
    width = max(map(len, runs))
    with neighbours(a.busy):
        for round_ in range(a.rounds):
            for name, done in runs.items():
                done.append(report_of(name))
                print(f"round {round_ + 1}  {name:{width}}  {figures_of(done[-1])}", flush=True)
    table = {}
    for name, done in runs.items():
        table[name] = {"peak_gib": max(r["peak_gib"] for r in done)}
        for figure in RATES:
            if figure in done[0]:
                table[name][figure] = statistics.median(r[figure] for r in done)
    ours = table[a.only[0]]
    for name, row in table.items():
        ratios = []
        for figure, slower in RATES.items():
            if figure in row:
                row[slower] = ours[figure] / row[figure]
                ratios.append(f"{row[slower]:.2f} x")
        print(f"{name:{width}}  {figures_of(row)}  {a.only[0]} is {', '.join(ratios)}")
    if a.json:
        Path(a.json).write_text(
            json.dumps({"command": sys.argv, "median": table, "runs": runs}, indent=1)
        )


# Figures of which more is better, and the name of their ratio to ours.
RATES = {
    "tokens_per_second": "times_slower_than_tunesmith",
    "tokens_per_core_second": "times_the_core_time_of_tunesmith",
}


def figures_of(row: dict[str, Any]) -> str:
    text = f"{row['tokens_per_second']:8.1f} tok/s"
    if "tokens_per_core_second" in row:
        text += f"  {row['tokens_per_core_second']:7.1f} tok/core-s"
    return f"{text}  {row['peak_gib']:5.2f} GiB"


def main() -> None:
    p = options_of(__doc__, "alpaca-like rows, a JSON array", CONTENDERS)
    a = parse(p)
    if not a.contender:
        contest(a)
    elif a.contender == "tunesmith":
        contend(a, tunesmith_run)
    else:
        contend(a, partial(trl_run, options=CONTENDERS[a.contender]))


if __name__ == "__main__":
    main()
