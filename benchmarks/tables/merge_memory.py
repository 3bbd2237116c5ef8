"""Peak memory of `tunesmith merge`, its check included, by the size of the model.

    python benchmarks/tables/merge_memory.py --dir /tmp/merge-memory

Random models of the shapes of Llama 3.2 1B and 3B in bf16 with an adapter of rank 16 on all linear
layers are merged, each in a process of its own. It prints the peak (VmHWM), without what the files
leave in the page cache, the seconds, and ends with 1 where the peaks are further apart than LIMIT.
Needs some 20 GB on the disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.adapter.lora import attach_lora
from tunesmith.adapter.peft_files import adapter_files, write_adapter
from tunesmith.config.schema import Adapter

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from conftest import byte_tokenizer

LIMIT = 200  # MB
ROWS = {"vocab_size": 128256, "tie_word_embeddings": True, "head_dim": 64}
SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
MERGE = """
import json, sys, time
from tunesmith.export.merge import merge
start = time.monotonic()
merged = merge(sys.argv[1], sys.argv[2], device="cpu")
seconds = time.monotonic() - start
lines = open("/proc/self/status").read().splitlines()
peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
print(json.dumps({"seconds": seconds, "peak_mb": peak * 1024 / 1e6, "bytes": merged.bytes}))
"""


def write_model(folder: Path, sizes: dict[str, int]) -> None:
    """A random base in bf16, a byte tokenizer, and an adapter beside it."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(**{**ROWS, **sizes}, **ids, bos_token_id=None)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    base = folder / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapter = Adapter(rank=16, alpha=32)
    attach_lora(model, adapter, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter.data, std=0.01)
    (folder / "adapter").mkdir()
    write_adapter(folder / "adapter", *adapter_files(model, adapter, str(base), None))
    tokenizer.save_pretrained(folder / "adapter")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="where the models are written")
    options = parser.parse_args()
    results = {}
    for name, sizes in SHAPES.items():
        folder = options.dir / name
        if not folder.exists():
            write_model(folder, sizes)
        start = time.monotonic()
        paths = [str(folder / "adapter"), str(folder / "merged")]
        done = subprocess.run(
            [sys.executable, "-c", MERGE, *paths], check=True, capture_output=True
        )
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, results[name], f"{time.monotonic() - start:.0f} s in all", flush=True)
    difference = results["3B"]["peak_mb"] - results["1B"]["peak_mb"]
    print(json.dumps({**results, "difference_mb": round(difference)}))
    return int(abs(difference) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
