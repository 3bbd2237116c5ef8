"""Check of the ranks of this machine: a tiny model trains on them and in one process."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tunesmith.errors import RunError
from tunesmith.host.child_output import reason_in
from tunesmith.launch.jobs import agent_words
from tunesmith.metrics.record import StepRecord, read_records
from tunesmith.run_dir import METRICS
from tunesmith.tools.doctor.findings import Finding, finding

# Heads, key-value heads and widths are divisible by 8, so that 8 tensor ranks can share a layer.
MODEL = {
    "vocab_size": 272,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
STEPS = 4
# Relative difference of a loss or gradient norm that rounding can cause. In fp32, sums have another
# order on each mesh: differences up to 1e-4 are expected on CPUs and up to 1e-3 on GPUs, as in
# benchmarks/parity/selfcheck.py. Wrong gradients cause larger differences.
TOLERANCE = 1e-3


def check_ranks(ranks: int) -> list[Finding]:
    """Train in one process and with each kind of mesh of all ranks, and compare the records."""
    kinds = ["replicate", "shard"] + ["tensor"] * (8 % ranks == 0)
    with tempfile.TemporaryDirectory(prefix="tunesmith-doctor-") as name:
        folder = Path(name)
        write_tiny_run(folder, examples=8 * ranks)
        expected = train_on_ranks(folder, 1, "replicate")
        return [check_kind(folder, ranks, kind, expected) for kind in kinds]


def write_tiny_run(folder: Path, examples: int) -> None:
    """Write a random model, a tokenizer with one token per byte, rows and a recipe."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL, eos_token_id=256))
    model.config.save_pretrained(folder)
    weights = {key: parameter.detach() for key, parameter in model.named_parameters()}
    save_file(weights, folder / "model.safetensors")
    rows = [
        json.dumps({"text": f"{i} and {i + 1} " * (2 + i % 9)}) for i in range(examples * STEPS)
    ]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    recipe = {
        "model": {"name": str(folder), "dtype": "fp32"},
        "adapter": {"kind": "none"},
        "data": {"train": {"source": "rows.jsonl", "format": "text"}, "seq_len": 256},
        "train": {
            "duration": f"{STEPS} steps",
            "global_batch": f"{examples} examples",
            "learning_rate": 4e-3,
            "compile": "off",
        },
        "checkpoint": {"every": None},
        "log": {"tensorboard": False, "samples": 0},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")


def train_on_ranks(folder: Path, ranks: int, kind: str) -> list[StepRecord]:
    """Train the recipe of the folder, and return its records. Raise RunError if the run fails."""
    out = folder / f"{kind}-{ranks}"
    words = agent_words(folder / "recipe.yaml", ranks=ranks)
    words += [f"parallel.{kind}={ranks}", f"output_dir={out}"]
    run = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RunError("a tiny model cannot train on this machine", why=reason_in(run.stderr))
    return read_records(out / METRICS)


def check_kind(folder: Path, ranks: int, kind: str, expected: list[StepRecord]) -> Finding:
    """Train on all ranks, and compare the records with those of one process."""
    try:
        found = train_on_ranks(folder, ranks, kind)
    except RunError as error:
        return finding("ranks/fail", ranks=ranks, kind=kind, message=error.why)
    for one, several in zip(expected, found, strict=True):
        for name in ("loss", "grad_norm"):
            before, after = vars(one)[name], vars(several)[name]
            if abs(after - before) > TOLERANCE * abs(before):
                return finding(
                    "ranks/other",
                    ranks=ranks,
                    kind=kind,
                    step=one.step,
                    name=name,
                    expected=before,
                    found=after,
                )
    return finding("ranks/ok", ranks=ranks, kind=kind)
