"""The kinds of GGUF file of a model: size, seconds, memory, and how near they are to the model.

    python benchmarks/tables/gguf_files.py MODEL --dir /tmp/gguf-files --rows CONTRIBUTING.md

Each kind is exported by the command in a process of its own (peak: VmHWM, imports among it), opened
in llama.cpp, and asked for the next token at POSITIONS places over the text of `--rows`. Compared
with Transformers in fp32: perplexity of the tokens that stand there, mean KL divergence, share of
equal likeliest tokens. The first row is the folder itself, computed in bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.tools.export.gguf.llama_cpp import LlamaCpp
from tunesmith.tools.export.gguf.types import GGUF_QUANT_TYPES

TOKENS = 240
POSITIONS = 60  # every fourth


# A process that is started counts the memory of the one that starts it, so that it is asked itself.
COMMAND = """
import sys
from tunesmith.cli.main import main
code = main(sys.argv[1:])
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
sys.exit(code)
"""


def export(model: str, quant: str, folder: Path) -> tuple[Path, float, float]:
    """The file, seconds and peak memory in MB."""
    file = folder / f"{quant}.gguf"
    words = ["export", model, "--to", "gguf", "--quant", quant, "--no-check", "--force"]
    start = time.monotonic()
    command = [sys.executable, "-c", COMMAND, *words, "--output", str(file)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    seconds = time.monotonic() - start
    return file, seconds, int(done.stdout.splitlines()[-1]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="a run or a model folder")
    parser.add_argument("--dir", type=Path, required=True, help="where the files are written")
    parser.add_argument("--rows", type=Path, required=True, help="a text")
    parser.add_argument("--json", type=Path, help="where the result is written")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.rows.read_text(encoding="utf-8"))["input_ids"][: TOKENS + 1]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        expected = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    places = range(TOKENS // POSITIONS - 1, TOKENS, TOKENS // POSITIONS)
    with torch.no_grad():
        rounded = model.bfloat16()(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    weights = sum(file.stat().st_size for file in Path(options.model).glob("*.safetensors"))
    pairs = [(place, rounded[place]) for place in places]
    rows = [
        {"quant": "the folder, bf16", "mb": megabytes(weights), **compare(pairs, expected, ids)}
    ]
    print(json.dumps(rows[0]), flush=True)
    del model
    for quant in GGUF_QUANT_TYPES:
        file, seconds, peak = export(options.model, quant, options.dir)
        pairs = []
        with LlamaCpp(file, threads=1, context=TOKENS + 16) as server:
            for place in places:
                served = server.log_probabilities(ids[: place + 1], expected.shape[1])
                if served is not None:
                    # The server rounds what it reports
                    pairs.append((place, served.double().log_softmax(-1)))
        row = {
            "quant": quant,
            "mb": megabytes(file.stat().st_size),
            "seconds": round(seconds, 1),
            "peak_mb": round(peak),
            **compare(pairs, expected, ids),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.json:
        command = (
            f"python benchmarks/tables/gguf_files.py SMOLLM2_BF16 --dir DIR --rows {options.rows}"
        )
        lines = ",\n".join(json.dumps(row) for row in rows)
        options.json.write_text(f'{{"command": "{command}",\n"rows": [\n{lines}\n]}}\n')


def megabytes(size: int) -> float:
    return round(size / 1e6, 1)


def compare(
    pairs: list[tuple[int, torch.Tensor]], expected: torch.Tensor, ids: list[int]
) -> dict[str, Any]:
    """Log probabilities at places of the text beside those of fp32."""
    loss = own_loss = kl = equal = 0.0
    for place, other in pairs:
        own = expected[place]
        loss -= float(other[ids[place + 1]])
        own_loss -= float(own[ids[place + 1]])
        kl += float((own.exp() * (own - other)).sum())
        equal += float(own.argmax() == other.argmax())
    count = len(pairs)
    return {
        "perplexity": round(math.exp(loss / count), 2),
        "perplexity_fp32": round(math.exp(own_loss / count), 2),
        "mean_kl": float(f"{kl / count:.2g}"),
        "same_top": round(equal / count, 3),
        "positions": count,
    }


if __name__ == "__main__":
    main()
