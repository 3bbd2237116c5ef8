"""Comparison of a GRPO step with TRL on a CPU, with the same model, rows, group and learning rate.

    python benchmarks/speed/grpo_against_trl.py --steps 40 --rounds 3 --json out.json

Each round starts one process per contender, in turns, so that noise of the machine affects both.
The table has means over the timed steps: seconds of a step, of its rollouts (sampling and rewards)
and of the rest, and answers per second. It also has the peak memory of the training process, and
the mean reward of the last quarter of the steps. With several rounds it has their medians. The file
has the reward and the mean length of the answers of each step.

Both contenders answer the prompts of the task `sum` of benchmarks/parity/rl_tasks.py in the same
order, and load the demo model in fp32 from the same folder. TRL's GRPOTrainer samples with
Transformers, and does not recompute activations. Its rewards run in the training process. Ours run
in other processes, and do not compute groups of equal rewards, which have no gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from against_trl import LINEARS, report_of

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
import rl_rewards
from rl_tasks import TASKS, method_of, rows_of, write_rows

from tunesmith.host.demo_model import demo_model

TASK = TASKS["sum"]
RANK, ALPHA = 16, 32
# Arguments of GRPOConfig
CONTENDERS: dict[str, dict[str, Any]] = {
    "tunesmith": {},
    "trl": {},
    "trl continuous batching": {"use_transformers_continuous_batching": True},
}


def prompts_of(a: argparse.Namespace) -> list[dict[str, str]]:
    """Return the rows of all steps. Repeat the rows of the task if there are fewer."""
    rows = rows_of(TASK)
    count = a.steps * a.prompts
    return (rows * (count // len(rows) + 1))[:count]


def tunesmith_run(a: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    from tunesmith import train  # sets the number of threads of this process before it loads torch
    from tunesmith.config.load import from_mapping

    recipe = {
        "model": {"name": a.model, "dtype": "fp32"},
        "adapter": {"kind": "lora", "rank": RANK, "alpha": ALPHA},
        "method": method_of(TASK) | {"group": a.group, "answer_tokens": a.answer_tokens},
        "data": {
            "train": write_rows(folder / "rows.jsonl", prompts_of(a)),
            "seq_len": 128, "shuffle": False,
        },
        "train": {
            "duration": f"{a.steps} steps", "global_batch": f"{a.prompts} examples",
            "learning_rate": a.learning_rate, "schedule": "constant", "warmup": "0 steps",
        },
        "checkpoint": {"every": None}, "log": {"tensorboard": False, "samples": 0},
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    records = train(from_mapping(recipe, where="benchmark", base=folder)).records
    return {
        "step_seconds": [r.step_seconds for r in records],
        "rollout_seconds": [r.extra["rollout_seconds"] for r in records],
        "reward": [r.extra["reward"] for r in records],
        "answer_length": [r.extra["answer_length"] for r in records],
    }


def trl_reward(completions: Any, reference: list[str], **_: Any) -> list[float]:
    """Compute the rewards of answers. TRL passes the answers as messages, and columns of rows."""
    score = getattr(rl_rewards, TASK.reward)
    return [
        score(messages[0]["content"], {"reference": expected})
        for messages, expected in zip(completions, reference, strict=True)
    ]


def trl_run(a: argparse.Namespace, folder: Path, options: dict[str, Any]) -> dict[str, list[float]]:
    """Train with TRL's GRPOTrainer and PEFT.

    Args:
        options: additional arguments of GRPOConfig.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(a.threads)
    ends: list[float] = []
    rollouts: list[float] = []

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            began = time.perf_counter()
            scored = super()._generate_and_score_completions(inputs)
            rollouts.append(time.perf_counter() - began)
            return scored

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    # The loss and the optimizer are those of tunesmith's defaults: advantages without the
    # standard deviation, a mean over all tokens, one update per batch, and AdamW without decay.
    answers = a.prompts * a.group
    micro_batch = a.trl_micro_batch or answers
    config = GRPOConfig(
        max_steps=a.steps, per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=answers // micro_batch, generation_batch_size=answers,
        num_generations=a.group, max_completion_length=a.answer_tokens, temperature=1.0,
        learning_rate=a.learning_rate, lr_scheduler_type="constant", beta=0.0, loss_type="dapo",
        scale_rewards="none", gradient_checkpointing=False, shuffle_dataset=False, bf16=False,
        save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True,
        use_cpu=True, dataloader_pin_memory=False, output_dir=str(folder / "run"), **options,
    )  # fmt: skip
    rows = []
    for row in prompts_of(a):
        messages = [{"role": "user", "content": row["prompt"]}]
        rows.append({"prompt": messages, "reference": row["completion"]})
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(
            a.model, dtype=torch.float32, attn_implementation="sdpa"
        ),
        reward_funcs=trl_reward,
        processing_class=AutoTokenizer.from_pretrained(a.model),
        train_dataset=Dataset.from_list(rows),
        args=config,
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, task_type="CAUSAL_LM"
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "reward" in row]
    return {
        "step_seconds": [end - start for start, end in pairwise(ends)],
        "rollout_seconds": rollouts,
        "reward": [row["reward"] for row in logged],
        "answer_length": [row["completions/mean_length"] for row in logged],
    }


def contend(a: argparse.Namespace) -> None:
    """Run one contender in this process. Print its report as the last line of stdout."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if a.contender == "tunesmith":
            steps = tunesmith_run(a, folder)
        else:
            steps = trl_run(a, folder, CONTENDERS[a.contender])
    from tunesmith.metrics import hardware

    print("REPORT " + json.dumps(steps | {"peak_gib": hardware.memory_gib()}))


def means_of(a: argparse.Namespace, run: dict[str, Any]) -> dict[str, float]:
    """Return means over the timed steps of one run, and its peak memory."""
    step = statistics.mean(run["step_seconds"][a.skip :])
    rollouts = statistics.mean(run["rollout_seconds"][a.skip :])
    return {
        "step_seconds": step,
        "rollout_seconds": rollouts,
        "training_seconds": step - rollouts,
        "answers_per_second": a.prompts * a.group / step,
        "peak_gib": run["peak_gib"],
        "last_quarter_reward": statistics.mean(run["reward"][-max(1, a.steps // 4) :]),
    }


def contest(a: argparse.Namespace) -> None:
    """Run the contenders in turns, `--rounds` times. Print the table and write the report."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in a.only}
    for round_ in range(a.rounds):
        for name, done in runs.items():
            run = report_of(name)
            done.append(run | {"means": means_of(a, run)})
            seconds = done[-1]["means"]["step_seconds"]
            print(f"round {round_ + 1}  {name}: {seconds:.2f} s a step", flush=True)
    table = {}
    for name, done in runs.items():
        means = [run["means"] for run in done]
        table[name] = {key: statistics.median(each[key] for each in means) for key in means[0]}
    print("\n| | s a step | rollouts | training | answers/s | GiB | reward of the last quarter |")
    print("|---|---|---|---|---|---|---|")
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")
    if a.json:
        report = {"command": sys.argv, "median": table, "runs": runs}
        Path(a.json).write_text(json.dumps(report, indent=1))


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", help="model folder of Transformers; default: the demo model")
    p.add_argument("--prompts", type=int, default=8, help="number of prompts of a step")
    p.add_argument("--group", type=int, default=8, help="number of answers to a prompt")
    p.add_argument("--answer-tokens", type=int, default=TASK.answer_tokens)
    p.add_argument("--learning-rate", type=float, default=TASK.learning_rate)
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--skip", type=int, default=1, help="number of first steps that are not timed")
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument(
        "--trl-micro-batch", type=int, help="answers of a micro batch of TRL; default: all answers"
    )
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--only", nargs="+", choices=CONTENDERS, default=["tunesmith", "trl"])
    p.add_argument("--json", help="file for the report")
    p.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.contender:
        contend(a)
        return
    os.environ |= {"OMP_NUM_THREADS": str(a.threads)}
    if a.model is None:
        a.model = str(demo_model())
        sys.argv += ["--model", a.model]  # for the processes of the contenders
    contest(a)


if __name__ == "__main__":
    main()
