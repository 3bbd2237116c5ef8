"""Where the difference of a GGUF file in llama.cpp from Transformers comes from.

    python benchmarks/parity/gguf_rounding.py MODEL --dir /tmp/rounding --rows CONTRIBUTING.md

Each kind of file answers with the next token at POSITIONS places, with attention in fp16, as llama.cpp
computes it (its flash attention, keys and values in fp16), and in fp32. It is compared with MODEL in
fp32, and with the file's own weights in fp32, which have the rounding of weights too: what is left
then is llama.cpp's arithmetic. The figures are the largest difference of log-probabilities among the ten likeliest tokens, and the mean
KL divergence.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.export.gguf.llama_cpp import LlamaCpp

TOKENS = 48
POSITIONS = 6
TOP = 10
QUANTS = ("f32", "f16", "q8_0")


def log_probabilities(folder: Path, ids: list[int], file: str | None = None) -> torch.Tensor:
    """Of every position, in fp32 arithmetic: [tokens, vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def compare(expected: torch.Tensor, served: dict[int, torch.Tensor]) -> dict[str, float]:
    largest = kl = 0.0
    for place, other in served.items():
        own = expected[place]
        top = own.topk(TOP).indices
        largest = max(largest, float((own - other)[top].abs().max()))
        kl += float((own.exp() * (own - other)).sum()) / len(served)
    return {"largest_of_top_10": float(f"{largest:.2g}"), "mean_kl": float(f"{kl:.2g}")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("--dir", type=Path, required=True, help="where the files are written")
    parser.add_argument("--rows", type=Path, required=True, help="a text")
    parser.add_argument("--json", type=Path, help="where the result is written")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.rows.read_text(encoding="utf-8"))["input_ids"][:TOKENS]
    model = log_probabilities(options.model, ids)
    places = range(TOKENS // POSITIONS - 1, TOKENS, TOKENS // POSITIONS)
    rows = []
    for quant in QUANTS:
        file = options.dir / f"{quant}.gguf"
        words = ("export", options.model, "--to", "gguf", "--quant", quant, "--no-check", "--force")
        command = [sys.executable, "-m", "tunesmith", *map(str, words), "--output", str(file)]
        subprocess.run(command, check=True, stdout=subprocess.PIPE)
        own = log_probabilities(options.dir, ids, file.name)
        for attention in ("fp16", "fp32"):
            served = {}
            fp32 = attention == "fp32"
            with LlamaCpp(file, threads=1, context=TOKENS + 16, fp32_attention=fp32) as server:
                for place in places:
                    values = server.log_probabilities(ids[: place + 1], model.shape[1])
                    if values is not None:
                        # The server rounds what it reports
                        served[place] = values.double().log_softmax(-1)
            for name, expected in (("the model", model), ("the file's weights", own)):
                row = {"quant": quant, "attention": attention, "against": name}
                rows.append({**row, **compare(expected, served)})
                print(json.dumps(rows[-1]), flush=True)
    if options.json:
        program = "python benchmarks/parity/gguf_rounding.py"
        run = f"{program} SMOLLM2_BF16 --dir DIR --rows {options.rows}"
        lines = ",\n".join(json.dumps(row) for row in rows)
        options.json.write_text(f'{{"command": "{run}",\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
