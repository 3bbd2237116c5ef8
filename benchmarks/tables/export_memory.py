"""Peak memory of `tunesmith merge` and `export --to gguf`, checks included, by the size of the model.

    python benchmarks/tables/export_memory.py --dir /tmp/export-memory --json docs/measurements/export-memory.json

Random models of the shapes of Llama 3.2 1B and 3B in bf16 with an adapter of rank 16 on all linear
layers are merged, and written in q4_k_m, each in a process of its own. Printed are its peak (VmHWM),
without what the files leave in the page cache, and the seconds; of an export also the peak of
llama.cpp's process, which maps the file, so that its pages count and can be dropped. It ends with 1
where the peaks of a command are further apart than LIMIT. Of a file that exists the other command's
results stay. Needs some 20 GB on the disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.adapter.lora import attach_lora
from tunesmith.adapter.peft_files import adapter_files, write_adapter
from tunesmith.config.schema import Adapter

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from export.tiny_gguf import chat_tokenizer

LIMIT = 200  # MB
ROWS = {"vocab_size": 128256, "tie_word_embeddings": True, "head_dim": 64}
SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
BEGIN = """
import json, resource, sys, time
start = time.monotonic()
"""
COMMANDS = {
    "merge": """
from tunesmith.export.merge import merge
done = merge(sys.argv[1], sys.argv[2], device="cpu")
kl = done.merge_check.merged.mean_kl
""",
    "export": """
from tunesmith.export.gguf.export import export_gguf
done = export_gguf(sys.argv[1], sys.argv[2] + ".gguf", quant="q4_k_m", device="cpu")
kl = done.check.tuned.mean_kl
""",
}
END = """
seconds = time.monotonic() - start
lines = open("/proc/self/status").read().splitlines()
peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
report = {"seconds": round(seconds), "peak_mb": round(peak * 1024 / 1e6), "bytes": done.bytes, "kl": kl}
child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
if sys.argv[2].endswith("-export"):
    report["llama_cpp_peak_mb"] = round(child)
print(json.dumps(report))
"""


def write_model(folder: Path, sizes: dict[str, int]) -> None:
    """A random base in bf16, a small tokenizer, and an adapter beside it."""
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
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
    parser.add_argument("--json", type=Path, help="where the result is written")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    options = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {name: {} for name in options.commands}
    for size, sizes in SHAPES.items():
        folder = options.dir / size
        if not folder.exists():
            write_model(folder, sizes)
        for name in options.commands:
            command = COMMANDS[name]
            output = folder / f"done-{name}"
            script = BEGIN + command + END
            words = [sys.executable, "-c", script, str(folder / "adapter"), str(output)]
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE)
            results[name][size] = json.loads(done.stdout.splitlines()[-1])
            print(name, size, results[name][size], flush=True)
            shutil.rmtree(output, ignore_errors=True)
            output.with_name(f"{output.name}.gguf").unlink(missing_ok=True)
    differences = {}
    for name, by_size in results.items():
        differences[name] = by_size["3B"]["peak_mb"] - by_size["1B"]["peak_mb"]
    print("difference in MB:", differences)
    if options.json:
        words = "python benchmarks/tables/export_memory.py --dir /tmp/export-memory"
        report: dict[str, Any] = {"command": words, "difference_mb": {}}
        if options.json.exists():
            report |= json.loads(options.json.read_text())
        report |= results
        report["difference_mb"] |= differences
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(max(map(abs, differences.values())) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
