"""Speed of DPO beside TRL on a CPU: the same model, pairs and batch, interleaved in one run.

    python benchmarks/speed/preferences_against_trl.py --model DIR --data pairs.json --json out.json

As `against_trl.py`, on pairs as LLaMA-Factory has them: the first ones whose two sequences fit
`--seq`, so that nobody cuts. The model is bf16, and a tune beside the default loads it so in TRL
too, whose default is fp32 under autocast. Reported beside the wall time: tokens a second of core
time, which says more where other work shares the cores.

`--adapter none` trains the whole model. All then compute the reference before the first step, on
the rows of these steps, and that time counts: no step is skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from against_trl import LINEARS, contend, contest, options_of, parse

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
ONE_BY_ONE = "trl one pair at a time"
# Beside its default, what may be faster on a CPU: no recomputation, and no padding beside others.
# `padding_free` is switched off in TRL 1.16, and `precompute_ref_log_probs` takes in one epoch as
# long as it saves.
CONTENDERS: dict[str, dict[str, Any]] = {
    "tunesmith": {},
    "trl default": {},
    "trl no recomputation": {"gradient_checkpointing": False},
    ONE_BY_ONE: {"gradient_checkpointing": False},
}


class Marks:
    """Wall and core seconds at the start and after each step."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.core: list[float] = []

    def mark(self, *_: Any, **__: Any) -> None:
        self.wall.append(time.perf_counter())
        self.core.append(time.process_time())

    def report(self, tokens: list[int], skip: int) -> dict[str, Any]:
        """Of the steps after the first `skip`, whose tokens are given.

        There is a mark before the first step, or else none and the first step is skipped.
        """
        first = len(self.wall) - 1 - (len(tokens) - skip)
        core = self.core[-1] - self.core[first]
        timed = sum(tokens[skip:])
        return {
            "tokens": timed,
            "seconds": self.wall[-1] - self.wall[first],
            "core_seconds": core,
            "tokens_per_core_second": timed / core,
        }


@contextmanager
def marked(owner: Any, name: str, mark: Callable[[], None], *, before: bool) -> Iterator[None]:
    """Call `mark` before or after each call of a method."""
    method = getattr(owner, name)

    @wraps(method)
    def marking(*args: Any, **kw: Any) -> Any:
        if before:
            mark()
        result = method(*args, **kw)
        if not before:
            mark()
        return result

    setattr(owner, name, marking)
    try:
        yield
    finally:
        setattr(owner, name, method)


def fitting_pairs(a: argparse.Namespace) -> list[dict[str, Any]]:
    """The first pairs whose sequences fit, as many as the steps take."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(a.model)
    fitting: list[dict[str, Any]] = []
    for row in json.loads(Path(a.data).read_text()):
        prompt = [{"role": ROLES[m["from"]], "content": m["value"]} for m in row["conversations"]]
        pair: dict[str, Any] = {"prompt": prompt}
        lengths = []
        for name in ("chosen", "rejected"):
            pair[name] = [{"role": "assistant", "content": row[name]["value"]}]
            lengths.append(len(tokenizer.apply_chat_template(prompt + pair[name])["input_ids"]))
        if max(lengths) <= a.seq:
            fitting.append(pair)
        if len(fitting) == a.steps * a.batch:
            return fitting
    sys.exit(f"{a.data} has {len(fitting)} pairs of at most {a.seq} tokens a sequence")


def recipe_of(a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    adapter = {"kind": "lora", "rank": 8, "alpha": 16} if a.adapter == "lora" else {"kind": "none"}
    return {
        "model": {"name": a.model, "dtype": a.dtype},
        "adapter": adapter,
        "method": "dpo",
        "data": {
            "train": {"source": str(folder / "rows.jsonl"), "format": "preference"},
            "seq_len": a.seq,
            "shuffle": False,
        },
        "train": {
            "duration": f"{a.steps} steps", "global_batch": f"{a.batch} examples", "learning_rate": 1e-6,
            "schedule": "linear", "warmup": "0 steps", "compile": a.compile,
        },
        "checkpoint": {"every": None},
        "log": {"tensorboard": False, "samples": 0},
        "output_dir": str(folder / "run"),
    }  # fmt: skip


def tunesmith_run(a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """tunesmith, through the same `train` that the command calls."""
    # The reference's numbers of an earlier round would be found there.
    os.environ["TUNESMITH_CACHE"] = str(folder / "cache")
    from tunesmith import train  # which prepares this process's threads before it loads torch
    from tunesmith.config.load import from_mapping
    from tunesmith.optim.optimizer import Optimizer
    from tunesmith.training.reference import BaseReference

    pairs = fitting_pairs(a)
    (folder / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    marks = Marks()
    with (
        marked(BaseReference, "measure", marks.mark, before=True),
        marked(Optimizer, "step", marks.mark, before=False),
    ):
        result = train(from_mapping(recipe_of(a, folder), where="benchmark", base=folder))
    out = marks.report([r.tokens for r in result.records], a.skip)
    return out | {"loss": [r.loss for r in result.records]}


def trl_run(a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """TRL's DPOTrainer, as its documentation sets it up, with the contender's settings on top."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    is_full = a.adapter == "none"
    marks = Marks()
    seen: list[int] = []

    class Recorded(DPOTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

        def _precompute_ref_logps(self, *args: Any, **kw: Any) -> Any:
            marks.mark()
            return super()._precompute_ref_logps(*args, **kw)

        def training_step(self, model: Any, inputs: Any, *rest: Any, **kw: Any) -> Any:
            seen.append(int(inputs["attention_mask"].sum()))
            return super().training_step(model, inputs, *rest, **kw)

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.mark()

    # Passed as a path TRL loads it in fp32.
    model: Any = a.model
    if a.contender != "trl default":
        model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.bfloat16)
    micro = 1 if a.contender == ONE_BY_ONE else a.batch
    config = DPOConfig(
        max_steps=a.steps, per_device_train_batch_size=micro, gradient_accumulation_steps=a.batch // micro,
        max_length=a.seq, learning_rate=1e-6, lr_scheduler_type="linear", bf16=a.dtype == "bf16", save_strategy="no",
        report_to="none", logging_steps=1, disable_tqdm=True, use_cpu=True, output_dir=str(folder / "run"),
        precompute_ref_log_probs=is_full, **CONTENDERS[a.contender],
    )  # fmt: skip
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM")
    trainer = Recorded(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(a.model),
        train_dataset=Dataset.from_list(fitting_pairs(a)),
        args=config,
        peft_config=None if is_full else adapter,
        callbacks=[Clock()],
    )
    trainer.train()
    parts = a.batch // micro
    tokens = [sum(seen[first : first + parts]) for first in range(0, len(seen), parts)]
    logs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return marks.report(tokens, a.skip) | {"loss": logs}


def main() -> None:
    p = options_of(__doc__, "pairs as LLaMA-Factory has them, a JSON array", CONTENDERS)
    p.add_argument("--adapter", default="lora", choices=["lora", "none"])
    p.set_defaults(batch=4)
    a = parse(p)
    if a.adapter == "none":
        a.skip = 0
    if not a.contender:
        contest(a)
    elif a.contender == "tunesmith":
        contend(a, tunesmith_run)
    else:
        contend(a, trl_run)


if __name__ == "__main__":
    main()
