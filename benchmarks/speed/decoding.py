"""Measurement of the time per token when a model of a real shape decodes with random weights.

    python benchmarks/speed/decoding.py --shape llama3-8b --tokenizer DIR --data rows.json \\
        --json out.json [key=value ...]

`seconds` in the report has the time of each token except the first. If a token takes much longer
than the median, a kernel was compiled or a plan was built during this token.

With `--prompts 16 --group 16`, 256 answers are sampled at once, 16 to each prompt, as in a training
with grpo. `answer_tokens_per_second` includes the time to compute the prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from tunesmith.build_model import build_model
from tunesmith.hub.fetch import spec_of_folder
from tunesmith.hub.model_files import read_model_files
from tunesmith.inference.answers import answer_batch
from tunesmith.inference.decoding import Decoding
from tunesmith.inference.sampler import Prompt
from tunesmith.metrics import hardware
from tunesmith.model.shapes import find_shape
from tunesmith.planning.resolve import inference_plan, resolve_dtype
from tunesmith.runtime.device import chip_of, choose_device
from tunesmith.runtime.host import bound_shape_caches
from tunesmith.tools.bench.shape import shape_recipe, write_shape


def main() -> None:
    """Decode the answers and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--prompt-tokens", type=int, default=500)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--group", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    bound_shape_caches()
    with tempfile.TemporaryDirectory(prefix="tunesmith-decoding-") as name:
        folder = Path(name) / "model"
        folder.mkdir()
        write_shape(folder, find_shape(args.shape).config, args.tokenizer)
        run = shape_recipe(folder, data=args.data, rows="alpaca", overrides=args.overrides)
        device = choose_device()
        # The folder has no weights, so the sizes are computed from its config.json.
        sizes = spec_of_folder(folder, run.model)
        dtype, _ = resolve_dtype(run.model, run.train, chip_of(device), sizes)
        model = replace(run.model, dtype=dtype)
        run = replace(run, model=model)
        files = read_model_files(folder, run.model)
        plan = inference_plan(run, files, device)
        root, _ = build_model(run, files, plan, weights="random")
    root.eval()
    times: list[float] = []

    def note() -> bool:
        times.append(time.perf_counter())
        return False

    decoding = Decoding(max_new_tokens=args.tokens, temperature=1.0 if args.group > 1 else 0.0)
    prompts = [Prompt([5 + i] * args.prompt_tokens, i) for i in range(args.prompts)]
    began = time.perf_counter()
    answer_batch(
        root, files.tokenizer, prompts, decoding, stops=(), answers=args.group, cancelled=note
    )
    total = time.perf_counter() - began
    seconds = [after - before for before, after in pairwise(times)]
    report = {
        "seconds": seconds,
        "median_ms": 1e3 * statistics.median(seconds),
        "longest_ms_after_five": 1e3 * max(seconds[5:], default=0.0),
        "answer_tokens_per_second": args.prompts * args.group * args.tokens / total,
        "memory_gib": hardware.memory_gib(device),
    }
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        f"median {report['median_ms']:.1f} ms per token, maximum after the first five "
        f"{report['longest_ms_after_five']:.1f} ms; {report['answer_tokens_per_second']:.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
