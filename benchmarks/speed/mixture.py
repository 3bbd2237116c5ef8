"""LoRA of a mixture of experts beside Transformers with PEFT on a CPU, interleaved in one run.

    python benchmarks/speed/mixture.py --data rows.json --json docs/measurements/mixture-speed.json

A Qwen3 mixture of random weights: 209 M parameters, of which a token is multiplied with 34 M. LoRA
of rank 8 is on the experts and on attention. All contenders train on the same rows in the same
order, on every token. Each round starts one process per contender, in turn, so that a noisy machine
is noisy for all.

tunesmith runs as `tunesmith train` does, with all that a step takes. PEFT runs in the shortest loop
that there is: rows tokenized before, no recomputation, a fused AdamW. Its settings are the product of
Transformers' experts (`eager`, `grouped_mm`), rows padded to the longest of a batch or packed into one,
and the dtype of the adapter. `batched_mm` is left out: it copies an expert's weights for each row,
8 GiB a stack here. `--screen` runs all of them; without it run those that a screening found fastest.
`--before SRC` runs tunesmith of another checkout's src/ as well.

Reported are medians of the steps after the first ones: seconds, seconds of the cores (which other
processes disturb less), non-padding tokens/s, and the peak of resident memory. `floor`: the bare
products that a step cannot do without, with the rows of each expert equal, on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from against_trl import texts

VOCABULARY = 8192
LAYERS, EXPERTS, PER_TOKEN, WIDTH = 8, 32, 4, 512
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": WIDTH,
    "moe_intermediate_size": WIDTH, "num_hidden_layers": LAYERS, "num_experts": EXPERTS,
    "num_experts_per_tok": PER_TOKEN, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    "norm_topk_prob": True,
}  # fmt: skip
RANK, ALPHA, RATE = 8, 16, 1e-4
OURS = "tunesmith"
BEFORE = "tunesmith before"
# Of the experts, of rows, and of the adapter's dtype.
PEFT = {
    f"peft {experts} {rows} {adapter}": (experts, rows, adapter)
    for experts in ("eager", "grouped_mm")
    for rows in ("padded", "packed")
    for adapter in ("fp32", "as-base")
}
# As fast as with an adapter in bf16, and of tunesmith's precision; eager takes 1.6 times as long.
FASTEST = ("peft grouped_mm packed fp32",)


def write_model(folder: Path, rows: str) -> None:
    """A Transformers folder: random weights in fp32, and a byte-level BPE trained on the rows."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

    bpe = ByteLevelBPETokenizer()
    special = ["<pad>", "<end>"]
    bpe.train_from_iterator(
        texts(rows, 2000), VOCABULARY, special_tokens=special, show_progress=False
    )
    bpe.save(str(folder / "bpe.json"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "bpe.json"), pad_token="<pad>", eos_token="<end>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Large beside what layers add: a token's router sees mostly the token, and all experts have work,
    # as in a trained mixture. With embeddings of 0.02 a third of them had none.
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(folder)


class Clock:
    """Wall and core seconds between calls of `note`."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def note(self) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def steps(self, skip: int) -> dict[str, list[float]]:
        """Of each step behind the first `skip`."""
        pairs = list(zip(self.times, self.times[1:], strict=False))[skip:]
        return {
            "seconds": [after[0] - before[0] for before, after in pairs],
            "core_seconds": [after[1] - before[1] for before, after in pairs],
        }


def tunesmith_run(a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """tunesmith, through the same `train` that the command calls."""
    from tunesmith import train  # which prepares this process's threads before it loads torch
    from tunesmith.config.load import from_mapping

    rows = folder / "rows.jsonl"
    lines = [json.dumps({"text": text}) for text in texts(a.data, a.steps * a.batch)]
    rows.write_text("\n".join(lines) + "\n")
    recipe = {
        "model": {"name": a.model, "dtype": a.dtype},
        "adapter": {"kind": "lora", "rank": RANK, "alpha": ALPHA},
        "data": {"train": {"source": str(rows), "format": "text"}, "seq_len": a.seq, "train_on": "all", "shuffle": False},
        "train": {
            "duration": f"{a.steps} steps", "global_batch": f"{a.batch} examples", "learning_rate": RATE,
            "schedule": "constant", "warmup": "0 steps",
        },
        "checkpoint": {"every": None}, "log": {"tensorboard": False}, "output_dir": str(folder / "run"),
    }  # fmt: skip
    clock = Clock()
    result = train(
        from_mapping(recipe, where="benchmark", base=folder), on_record=lambda _: clock.note()
    )
    # The first record ends the first step.
    return clock.steps(a.skip - 1) | {
        "tokens": [record.tokens for record in result.records[a.skip :]],
        "loss": [record.loss for record in result.records],
        "expert_load_max": [record.extra["expert_load_max"] for record in result.records],
    }


def peft_run(a: argparse.Namespace, experts: str, rows: str, adapter: str) -> dict[str, Any]:
    """Transformers with PEFT, in a loop of its own."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[a.dtype]
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    base = AutoModelForCausalLM.from_pretrained(
        a.model, dtype=dtype, experts_implementation=experts, attn_implementation="sdpa"
    )
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=adapter == "fp32").train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    all_rows = texts(a.data, a.steps * a.batch, tokenizer.eos_token)
    ids = [row[: a.seq] for row in tokenizer(all_rows)["input_ids"]]
    clock = Clock()
    clock.note()
    tokens: list[int] = []
    losses: list[float] = []
    for first in range(0, len(ids), a.batch):
        batch = ids[first : first + a.batch]
        inputs = packed(batch) if rows == "packed" else padded(batch, tokenizer.pad_token_id)
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tokens.append(sum(len(row) for row in batch))
        clock.note()
    return clock.steps(a.skip) | {"tokens": tokens[a.skip :], "loss": losses}


def packed(batch: list[list[int]]) -> dict[str, Any]:
    """One row of all documents, which Transformers tells apart by their positions."""
    import torch

    ids = torch.tensor([list(chain.from_iterable(batch))])
    positions = torch.cat([torch.arange(len(row)) for row in batch]).unsqueeze(0)
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def padded(batch: list[list[int]], pad: int) -> dict[str, Any]:
    """A row for each document, padded to the longest."""
    import torch

    length = max(len(row) for row in batch)
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in batch])
    counts = torch.tensor([len(row) for row in batch])
    mask = torch.arange(length) < counts.unsqueeze(1)
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~mask, -100),
    }


def floor(a: argparse.Namespace) -> dict[str, float]:
    """Core seconds of a step's bare products on one thread.

    `frozen`: of the experts, forward and to the inputs. `rest`: attention's and the head's, likewise.
    Both sides need these; PEFT adds `stacks`, products to the gradients of stacks, and `folding`: the
    update added to each stack, and the gradients of A and B of that of the stack.
    """
    import torch

    torch.set_num_threads(1)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[a.dtype]
    tokens = a.tokens
    rows = max(1, tokens * PER_TOKEN // EXPERTS)

    def core_seconds(count: int, inside: int, outside: int) -> tuple[float, float]:
        """Of `count` rows through a weight and back, and of the gradient of the weight."""
        x = torch.randn(count, inside).to(dtype)
        dy = torch.randn(count, outside).to(dtype)
        # In turn, as a stack is read: one weight alone would stay in the cache.
        weights = [torch.randn(outside, inside).to(dtype) for _ in range(EXPERTS)]

        def both() -> None:
            for weight in weights:
                x @ weight.T
                dy @ weight

        def to_weight() -> None:
            for _ in weights:
                dy.T @ x

        return core_time(both) / EXPERTS, core_time(to_weight) / EXPERTS

    up = core_seconds(rows, WIDTH, 2 * WIDTH)
    down = core_seconds(rows, WIDTH, WIDTH)
    square = core_seconds(tokens, WIDTH, WIDTH)[0]
    narrow = core_seconds(tokens, WIDTH, 128)[0]
    head = core_seconds(tokens, WIDTH, VOCABULARY)[0]
    products = LAYERS * EXPERTS
    return {
        "frozen": products * (up[0] + down[0]),
        "rest": LAYERS * (2 * square + 2 * narrow) + head,
        "stacks": products * (up[1] + down[1]),
        "folding": LAYERS * (fold_seconds(2 * WIDTH, dtype) + fold_seconds(WIDTH, dtype)),
    }


def fold_seconds(outside: int, dtype: Any) -> float:
    """Core seconds of W + scaling * B A of a stack, and of its backward, as PEFT computes it."""
    import torch

    stack = torch.randn(EXPERTS, outside, WIDTH).to(dtype)
    gradient = torch.randn(EXPERTS, outside, WIDTH).to(dtype)
    lora_A = torch.randn(EXPERTS, RANK, WIDTH, requires_grad=True)
    lora_B = torch.randn(EXPERTS, outside, RANK, requires_grad=True)

    def both() -> None:
        factors = lora_B.to(dtype), lora_A.to(dtype)
        torch.baddbmm(stack, *factors, alpha=ALPHA / RANK).backward(gradient)

    return core_time(both)


def core_time(call: Callable[[], Any]) -> float:
    """Core seconds of a call, the least of three after a first one."""
    call()
    times = []
    for _ in range(3):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


def contend(a: argparse.Namespace) -> None:
    """Run one contender in this process; its report is the last line of stdout."""
    if a.contender == "floor":
        found: dict[str, Any] = floor(a)
    elif a.contender in {OURS, BEFORE}:
        with tempfile.TemporaryDirectory() as name:
            found = tunesmith_run(a, Path(name))
    else:
        found = peft_run(a, *PEFT[a.contender])
    found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("REPORT " + json.dumps(found))


def report_of(contender: str, a: argparse.Namespace, dtype: str, batch: int, **more: int) -> Any:
    """What a contender prints in a process of its own."""
    options = {"model": a.model, "data": a.data, "steps": a.steps, "skip": a.skip, "seq": a.seq}
    options |= {"contender": contender, "dtype": dtype, "batch": batch, **more}
    command = [sys.executable, __file__]
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if a.threads:
        env["OMP_NUM_THREADS"] = str(a.threads)
    if contender == BEFORE:
        env["PYTHONPATH"] = a.before
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    if done.returncode or not found:
        sys.exit(f"{contender} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(found[-1].removeprefix("REPORT "))


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of all timed steps of all rounds; batches differ, so per token of each."""
    figures = {"peak_gib": max(run["peak_gib"] for run in runs)}
    tokens = [count for run in runs for count in run["tokens"]]
    for key in ("seconds", "core_seconds"):
        spent = [value for run in runs for value in run[key]]
        by_token = [value / count for value, count in zip(spent, tokens, strict=True)]
        figures[key] = statistics.median(by_token) * statistics.mean(tokens)
    figures["tokens_per_second"] = statistics.mean(tokens) / figures["seconds"]
    return figures


def measure(a: argparse.Namespace, dtype: str, batch: int) -> dict[str, Any]:
    """All contenders in turn, with one dtype and rows a step."""
    contenders = [OURS, *(PEFT if a.screen else FASTEST)]
    if a.before:
        contenders.insert(1, BEFORE)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(a.rounds):
        for name, done in runs.items():
            done.append(report_of(name, a, dtype, batch))
    table: dict[str, dict[str, float]] = {name: summary(done) for name, done in runs.items()}
    ours = table[OURS]
    print(f"{dtype}, {batch} rows a step", flush=True)
    for name, row in table.items():
        row["times_slower"] = row["seconds"] / ours["seconds"]
        row["times_core_seconds"] = row["core_seconds"] / ours["core_seconds"]
        print(
            f"{name:34} {row['seconds']:7.3f} s  {row['core_seconds']:7.3f} core s "
            f"{row['tokens_per_second']:8.1f} tok/s  {row['peak_gib']:5.2f} GiB  tunesmith is "
            f"{row['times_slower']:.2f} x, by core {row['times_core_seconds']:.2f} x",
            flush=True,
        )
    tokens = [count for run in runs[OURS] for count in run["tokens"]]
    mean = round(statistics.mean(tokens))
    products = report_of("floor", a, dtype, batch, tokens=mean)
    print(f"{mean} tokens a step; products: {products}", flush=True)
    return {"tokens": mean, "floor": products, "median": table, "runs": runs}


def main() -> None:
    """Run all contenders, `--rounds` times for each dtype and number of rows, and print the table."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", required=True, help="alpaca-like rows, a JSON array")
    p.add_argument(
        "--model", help="the folder of an earlier run's model; made where it is not there"
    )
    p.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    p.add_argument("--batches", nargs="+", type=int, default=[2, 8, 16], help="rows of a step")
    p.add_argument("--seq", type=int, default=512)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--skip", type=int, default=3, help="first steps that are not timed")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, help="of each contender; without it as each chooses")
    p.add_argument("--screen", action="store_true", help="all settings of PEFT")
    p.add_argument("--before", metavar="SRC", help="src/ of another checkout")
    p.add_argument("--json", help="write the report here")
    p.add_argument("--contender", choices=[OURS, BEFORE, "floor", *PEFT], help=argparse.SUPPRESS)
    p.add_argument("--dtype", help=argparse.SUPPRESS)
    p.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    p.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.contender:
        contend(a)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(a.model or name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        a.model = str(folder)
        if not (folder / "config.json").exists():
            write_model(folder, a.data)
        command = "python benchmarks/speed/mixture.py " + " ".join(sys.argv[1:])
        report: dict[str, Any] = {"command": command, "results": {}}
        for dtype in a.dtypes:
            for batch in a.batches:
                report["results"][f"{dtype}, {batch} rows"] = measure(a, dtype, batch)
                # After each, as a whole run takes long.
                if a.json:
                    Path(a.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
