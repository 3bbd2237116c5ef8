"""The same rows through TRL's SFTTrainer, in a process of its own: `python -m tunesmith.bench.peer request.json`.

TRL gets the very token ids and loss masks that ours trained on, in the same order, as many rows a step, and otherwise
its own defaults. Tokens are counted as ours are: the non-padding ones of the timed steps.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.bench.measure import Measured
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, RunError, UsageError
from tunesmith.metrics import hardware
from tunesmith.model import load
from tunesmith.training.build import choose_device

PER_DEVICE = 8  # TRL's default; larger steps accumulate, as its users do
REPORT = "REPORT "


@dataclass(frozen=True)
class Request:
    """What the other process is to do.

    Attributes:
        model: folder with config and tokenizer, and weights unless `random`.
        random: draw the weights on the device in place of reading them.
        input_ids, masks: rows in order, token ids and 1 for a trained token.
        rows: of one optimizer step. steps, skip: in all, and those before the timed ones.
        rank, alpha, dropout, target: of the LoRA adapter; rank 0 trains every weight.
    """

    model: str
    random: bool
    dtype: str
    seq_len: int
    learning_rate: float
    seed: int
    pad_id: int
    input_ids: list[list[int]]
    masks: list[list[int]]
    rows: int
    steps: int
    skip: int
    rank: int
    alpha: float
    dropout: float
    target: str | list[str]


def check(run: Run) -> None:
    """Refuse before anything runs what TRL's side cannot do here.

    Raises:
        MachineError: TRL is not installed.
        UsageError: the base is quantised: random weights of that form cannot be given to TRL.
    """
    missing = [name for name in ("trl", "peft", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MachineError(
            f"--against trl needs the package {missing[0]}", where="--against", fix=f"pip install {' '.join(missing)}"
        )
    if run.model.quantize != "none":
        raise UsageError(
            f"--against trl compares unquantised bases, and this one is {run.model.quantize}",
            where="--against",
            why="TRL's side is built in model.dtype, which would be another model",
            fix="model.quantize=none, or leave --against away",
        )


def request(run: Run, measured: Measured, *, random: bool) -> Request:
    """What TRL is to train, from what ours trained."""
    found, adapter = measured.figures, run.adapter
    steps = found.steps + found.warmup_steps
    # TRL counts rows where a packed recipe may count tokens: as many rows a step as ours had on average.
    rows = max(1, len(measured.examples) // steps)
    rows = rows // PER_DEVICE * PER_DEVICE or rows  # whole passes
    chosen = measured.examples[: rows * steps]
    return Request(
        model=str(measured.folder), random=random, dtype=run.model.dtype, seq_len=run.data.seq_len,
        learning_rate=run.train.learning_rate, seed=run.train.seed, pad_id=measured.pad_id,
        input_ids=[ids for ids, _ in chosen], masks=[mask for _, mask in chosen],
        rows=rows, steps=steps, skip=found.warmup_steps,
        rank=adapter.rank if adapter.kind == "lora" else 0, alpha=adapter.alpha, dropout=adapter.dropout,
        target=adapter.target if isinstance(adapter.target, str) else list(adapter.target),
    )  # fmt: skip


def race(asked: Request, folder: Path) -> dict[str, Any]:
    """Run TRL in a process of its own; what it reports.

    Raises:
        RunError: it failed; with the last line that it said.
    """
    file = folder / "trl.json"
    file.write_text(json.dumps(asdict(asked)), encoding="utf-8")
    command = [sys.executable, "-m", "tunesmith.bench.peer", str(file)]
    env = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith(REPORT)]
    if done.returncode or not found:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
        with tempfile.NamedTemporaryFile("w", prefix="tunesmith-trl-", suffix=".log", delete=False) as log:
            log.write(done.stdout + done.stderr)
        raise RunError("TRL's run failed", where=log.name, why=said[-1], fix="mend that, or leave --against away")
    report: dict[str, Any] = json.loads(found[-1].removeprefix(REPORT))
    return report


def train_with_trl(
    model: Any, tokenizer: Any, data: Any, lora: Any, *, steps: int, skip: int, accumulate: int = 1, **options: Any
) -> dict[str, Any]:
    """TRL's SFTTrainer as its documentation sets it up, over `data` in its order.

    Args:
        model, tokenizer, data, lora: what SFTTrainer takes; lora None trains every weight.
        steps, skip: optimizer steps in all, and those before the timed ones.
        accumulate: passes of one step.
        options: of SFTConfig.

    Returns:
        tokens: non-padding ones of the timed steps; seconds: of these; loss: of every step; peak_gib.
    """
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    seen: list[Any] = []
    clock: dict[int, float] = {}

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any, *rest: Any, **kw: Any) -> Any:
            seen.append(inputs["attention_mask"].sum())  # read at the end: nothing here waits for the device
            return super().training_step(model, inputs, *rest, **kw)

    class Clock(TrainerCallback):
        def _note(self, step: int) -> None:
            if step in (skip, steps):
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                clock[step] = time.perf_counter()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._note(0)

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            self._note(state.global_step)

    config = SFTConfig(
        max_steps=steps, gradient_accumulation_steps=accumulate, save_strategy="no", report_to="none",
        logging_steps=1, disable_tqdm=True, use_cpu=not torch.cuda.is_available(), **options,
    )  # fmt: skip
    trainer = InOrder(
        model=model, processing_class=tokenizer, train_dataset=data, args=config, peft_config=lora, callbacks=[Clock()]
    )
    trainer.train()
    tokens, seconds = sum(int(count) for count in seen[skip * accumulate :]), clock[steps] - clock[skip]
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_gib": hardware.memory_gib(choose_device()),
        "loss": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }


def _answer(asked: Request, folder: Path) -> dict[str, Any]:
    """Build the model in this process and train it with TRL."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    dtype = load.DTYPES[asked.dtype]
    torch.manual_seed(asked.seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        if asked.random:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(asked.model), dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    tokenizer.pad_token_id = asked.pad_id
    lora = None
    if asked.rank:
        lora = LoraConfig(
            r=asked.rank, lora_alpha=asked.alpha, lora_dropout=asked.dropout, target_modules=asked.target,
            task_type="CAUSAL_LM",
        )  # fmt: skip
    per_device = min(PER_DEVICE, asked.rows)
    accumulate = asked.rows // per_device
    settings = {
        "per_device_train_batch_size": per_device,
        "max_length": asked.seq_len,
        "learning_rate": asked.learning_rate,
        "bf16": asked.dtype == "bf16",
        "fp16": asked.dtype == "fp16",
        "seed": asked.seed,
    }
    report = train_with_trl(
        model, tokenizer, Dataset.from_dict({"input_ids": asked.input_ids, "assistant_masks": asked.masks}), lora,
        steps=asked.steps, skip=asked.skip, accumulate=accumulate, output_dir=str(folder / "trl"), **settings,
    )  # fmt: skip
    about = {"trl": importlib.metadata.version("trl"), "rows": per_device * accumulate}
    return report | about | {"settings": settings | {"gradient_accumulation_steps": accumulate}}


def main(words: Sequence[str]) -> None:
    """Answer the request in a file; the report is the last line of stdout that begins with REPORT."""
    file = Path(words[0])
    print(
        REPORT + json.dumps(_answer(Request(**json.loads(file.read_text(encoding="utf-8"))), file.parent)), flush=True
    )


if __name__ == "__main__":
    main(sys.argv[1:])
