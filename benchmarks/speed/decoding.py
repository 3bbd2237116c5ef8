"""Measurement of the time per token when a model of a real shape decodes with random weights.

    python benchmarks/speed/decoding.py --shape llama3-8b --tokenizer DIR --data rows.json \\
        --json out.json [key=value ...]

`seconds` in the report has the time of each token except the first. If a token takes much longer
than the median, a kernel was compiled or a plan was built during this token.

With `--slots 64 256 --group 16`, 64 and then 256 answers are sampled at once, 16 to each prompt, as
in a training with grpo. `answer_tokens_per_second` includes the time to compute the prompts.
With `--profile-slots 256`, PROFILED tokens of this case are profiled. The report then has the
number of kernel launches per token, the share of the time in which the GPU is idle, and the time of
batched matmuls by the number of keys, which shows whether odd numbers are slower.

The report is written after each case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from kernel_terms import GPU_WORK, product_dimensions
from step_reports import measure_cases

from tunesmith.answers.answers import answer_batch
from tunesmith.answers.decoding import Decoding
from tunesmith.answers.sampler import Prompt
from tunesmith.build_model import build_model
from tunesmith.hub.fetch import spec_of_folder
from tunesmith.hub.model_files import read_model_files
from tunesmith.metrics import hardware
from tunesmith.model.arch.shapes import find_shape
from tunesmith.planning.resolve import inference_plan, resolve_dtype
from tunesmith.runtime.device import chip_of, choose_device
from tunesmith.runtime.host import bound_shape_caches
from tunesmith.tools.bench.shape import shape_recipe, write_shape
from tunesmith.train_model import TrainModel

PROFILED = 3  # tokens
PROFILED_AFTER = 8  # tokens that are decoded before the profiled ones


def profile_figures(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of the profiled tokens. Without a GPU, operators replace kernels.

    Args:
        events: `traceEvents` of a torch trace that was recorded with `record_shapes=True`.
    """
    operators = {}
    for event in events:
        if event.get("cat") == "cpu_op":
            operators[event["args"].get("External id")] = event
    work = [event for event in events if event.get("cat") in GPU_WORK]
    by_keys = Counter[int]()
    for event in work or operators.values():
        operator = operators.get(event["args"].get("External id"))
        if operator is not None and operator["name"] == "aten::bmm":
            shapes = operator["args"].get("Input Dims", [])
            # The number of keys is the largest dimension: k of one matmul and n of the other.
            by_keys[max(product_dimensions("bmm", shapes), default=0)] += event["dur"]
    launches = sum(
        "Launch" in event["name"] for event in events if "runtime" in event.get("cat", "")
    )
    return {
        "launches_a_token": launches / PROFILED,
        "kernel_ms_a_token": sum(event["dur"] for event in work) / 1e3 / PROFILED,
        "bmm_us_by_keys": dict(sorted(by_keys.items())),
    }


def decode_case(
    root: TrainModel, tokenizer: Any, slots: int, args: argparse.Namespace, trace: Path | None
) -> dict[str, Any]:
    """Decode `slots` answers at once.

    Args:
        trace: file for the profiler's trace. None: no profile.
    """
    times: list[float] = []
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities, record_shapes=True)
    running = ExitStack()

    def note() -> bool:
        times.append(time.perf_counter())
        if trace and len(times) == PROFILED_AFTER:
            running.enter_context(profiler)
        if len(times) == PROFILED_AFTER + PROFILED:
            running.close()
        return False

    decoding = Decoding(max_new_tokens=args.tokens, temperature=1.0 if args.group > 1 else 0.0)
    count = slots // args.group
    prompts = [Prompt([5 + i] * args.prompt_tokens, i) for i in range(count)]
    began = time.perf_counter()
    with running:
        answer_batch(
            root, tokenizer, prompts, decoding, stops=(), answers=args.group, cancelled=note
        )
    total = time.perf_counter() - began
    seconds = [after - before for before, after in pairwise(times)]
    median_ms = 1e3 * statistics.median(seconds)
    report = {
        "seconds": seconds,
        "median_ms": median_ms,
        "longest_ms_after_five": 1e3 * max(seconds[5:], default=0.0),
        "answer_tokens_per_second": count * args.group * args.tokens / total,
        "memory_gib": hardware.memory_gib(root.model.device),
    }
    if trace:
        profiler.export_chrome_trace(str(trace))
        report |= profile_figures(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])
        if report["launches_a_token"]:
            # The profiler slows the host down, but not the kernels: compare with tokens without it.
            report["idle_share"] = 1 - report["kernel_ms_a_token"] / median_ms
            report["us_a_launch"] = 1e3 * median_ms / report["launches_a_token"]
    return report


def main() -> None:
    """Decode the answers of each case, and write the report after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--prompt-tokens", type=int, default=500)
    parser.add_argument("--slots", type=int, nargs="+", default=[1], help="answers at once")
    parser.add_argument("--group", type=int, default=1, help="answers to each prompt")
    parser.add_argument("--profile-slots", type=int, help="number of slots of the profiled case")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
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
        cases = {}
        for slots in args.slots:
            trace = Path(name) / "trace.json" if slots == args.profile_slots else None
            cases[f"{slots} slots"] = partial(
                decode_case, root, files.tokenizer, slots, args, trace
            )
        measure_cases(cases, args.json)


if __name__ == "__main__":
    main()
