"""Measurement of each GGUF type of a model: size, export time, memory, and difference to the model.

    python benchmarks/tables/gguf_files.py MODEL --dir /tmp/gguf-files --rows CONTRIBUTING.md

For each type, `tunesmith export` runs in a new process. Its peak memory is VmHWM, which includes
the imports. llama.cpp then loads the file and predicts the next token at POSITIONS positions of the
text of `--rows`. The predictions are compared with those of Transformers in fp32: perplexity of the
text's tokens, mean KL divergence, and fraction of positions with the same most likely token. The
first row is the model folder itself, computed in bf16 by Transformers.
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
POSITIONS = 60  # every fourth token


# The started process reads its own VmHWM, because the maximum that the parent process can query for
# its children includes the memory of the parent at the start.
COMMAND = """
import sys
from tunesmith.cli.main import main
code = main(sys.argv[1:])
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
sys.exit(code)
"""


def export(model: str, quant: str, folder: Path) -> tuple[Path, float, float]:
    """Export the model. Return the file, the seconds, and the peak memory in MB."""
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
    parser.add_argument("--dir", type=Path, required=True, help="folder for the GGUF files")
    parser.add_argument("--rows", type=Path, required=True, help="text file to predict")
    parser.add_argument("--json", type=Path, help="file for the results")
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
                    # The server rounds the log probabilities, so they are normalized again.
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
    """Compare log probabilities at positions of the text with those of the model in fp32.

    Args:
        pairs: a position and the log probabilities of the next token at this position.
        expected: the log probabilities in fp32 at all positions, [positions, vocabulary].
        ids: the tokens of the text.
    """
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
