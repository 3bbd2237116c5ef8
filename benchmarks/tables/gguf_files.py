"""The kinds of GGUF file of a model: size, seconds, memory, and how near they are to the model.

    python benchmarks/tables/gguf_files.py MODEL --dir /tmp/gguf-files --rows rows.txt

Each kind is exported by the command in a process of its own (peak: VmHWM, imports among it), opened
in llama.cpp, and asked for the next token at POSITIONS places over the text of `--rows`. Compared
with Transformers in fp32: perplexity of the tokens that stand there, mean KL divergence, share of
equal likeliest tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.cli.export import GGUF_QUANTS
from tunesmith.export.gguf.llama_cpp import LlamaCpp

TOKENS = 240
POSITIONS = 60  # every fourth


def export(model: str, quant: str, folder: Path) -> tuple[Path, float, float]:
    """The file, seconds and peak memory in MB."""
    file = folder / f"{quant}.gguf"
    words = ["export", model, "--to", "gguf", "--quant", quant, "--no-check", "--force"]
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", *words, "--output", file], stdout=subprocess.DEVNULL
    )
    _, status, usage = _wait(process)
    assert status == 0
    return file, time.monotonic() - start, usage.ru_maxrss * 1024 / 1e6


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, int, resource.struct_rusage]:
    import os

    return os.wait4(process.pid, 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="a run or a model folder")
    parser.add_argument("--dir", type=Path, required=True, help="where the files are written")
    parser.add_argument("--rows", type=Path, required=True, help="a text")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.rows.read_text(encoding="utf-8"))["input_ids"][: TOKENS + 1]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        expected = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    places = range(TOKENS // POSITIONS - 1, TOKENS, TOKENS // POSITIONS)
    rows = []
    for quant in GGUF_QUANTS:
        file, seconds, peak = export(options.model, quant, options.dir)
        loss = own_loss = kl = equal = count = 0.0
        with LlamaCpp(file, threads=2, context=TOKENS + 16) as server:
            for place in places:
                served = server.log_probabilities(ids[: place + 1], expected.shape[1])
                if served is None:
                    continue
                # The server rounds what it reports
                served = served.double().log_softmax(-1)
                own = expected[place]
                loss -= float(served[ids[place + 1]])
                own_loss -= float(own[ids[place + 1]])
                kl += float((own.exp() * (own - served)).sum())
                equal += float(own.argmax() == served.argmax())
                count += 1
        row = {
            "quant": quant,
            "mb": round(file.stat().st_size / 1e6, 1),
            "seconds": round(seconds, 1),
            "peak_mb": round(peak),
            "perplexity": round(math.exp(loss / count), 2),
            "perplexity_fp32": round(math.exp(own_loss / count), 2),
            "mean_kl": float(f"{kl / count:.2g}"),
            "same_top": round(equal / count, 3),
            "positions": int(count),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
