"""Measurement of training steps with frozen layers that are streamed from the host.

    python benchmarks/speed/streamed.py --output out.json [--only link,8b,70b,planned,experts] \\
        [--steps 5] [--small]

--only takes groups, or single cases such as "8b staged". All models have random weights. The groups
are:

    link      the bandwidth of copies from the host to the device
    8b        Llama 3.1 8B with all layers on the device ("resident"), with all layers streamed,
              with half of the layers streamed, and with all layers streamed while only two blocks
              of host memory can be page-locked ("staged"); the losses must be equal bit for bit
    70b       48 layers of Llama 3.3 70B in bf16, which do not fit into 80 GB; the host needs 90 GB
    planned   the same model, with the number of streamed layers that the planner chooses
    experts   Qwen3-30B-A3B in bf16, resident and streamed

The output is written after each case. --small uses tiny shapes, to test the script on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import string
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunesmith.checkpoint.resume import Start
from tunesmith.host.signals import StopRequest
from tunesmith.metrics.sink import Sinks
from tunesmith.model.arch.shapes import SHAPES
from tunesmith.planning.memory import MemoryEstimator
from tunesmith.runtime import stream
from tunesmith.runtime.determinism import CHOICES, WORKSPACE, deterministic_algorithms
from tunesmith.runtime.device import choose_device, free_device_memory
from tunesmith.start import plan as plan_stage
from tunesmith.start.build import build
from tunesmith.start.lines import choices_line
from tunesmith.start.request import Request
from tunesmith.tools.bench.measure import BenchPlan
from tunesmith.tools.bench.shape import shape_recipe, write_shape
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer
from tunesmith.units import Size

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "vocab_size": 512}
SMALL |= {"num_key_value_heads": 4, "head_dim": 8, "num_hidden_layers": 6}
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


def write_inputs(folder: Path, row_tokens: int) -> tuple[Path, Path]:
    """Write a byte tokenizer, and rows with about `row_tokens` tokens each. Return both paths."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, "<|end|>"])}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>")
    tokenizer.pad_token = "<|end|>"
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = folder / "rows.jsonl"
    letters = string.ascii_lowercase
    with rows.open("w", encoding="utf-8") as file:
        for number in range(96):
            text = "".join(letters[(number * 7 + i * i) % 26] for i in range(row_tokens - 40))
            row = {"prompt": f"Row {number}: ", "completion": text}
            file.write(json.dumps(row) + "\n")
    return folder / "tokenizer", rows


def trace_figures(file: Path) -> dict[str, float]:
    """Read the trace of a profiled step.

    Return the seconds of copies from the host, the seconds of these copies during which no kernel
    ran, the seconds of kernels, and the number of times that the host waited for the device.
    """
    events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    copies, kernels, waits = [], [], 0
    for event in events:
        category, name = event.get("cat", ""), event.get("name", "")
        span = (event.get("ts", 0), event.get("ts", 0) + event.get("dur", 0))
        if category == "gpu_memcpy" and "HtoD" in name:
            copies.append(span)
        elif category == "kernel":
            kernels.append(span)
        elif name in WAITS:
            waits += 1
    exposed = sum(end - begin for begin, end in copies)
    total = exposed
    kernels.sort()
    busy: list[list[float]] = []
    for begin, end in kernels:
        if busy and begin <= busy[-1][1]:
            busy[-1][1] = max(busy[-1][1], end)
        else:
            busy.append([begin, end])
    for begin, end in copies:
        exposed -= sum(max(0, min(end, last) - max(begin, first)) for first, last in busy)
    return {
        "copy_seconds": total / 1e6,
        "exposed_copy_seconds": exposed / 1e6,
        "kernel_seconds": sum(last - first for first, last in busy) / 1e6,
        "host_waits": waits,
    }


def profiled(steps: Any, file: Path) -> dict[str, float]:
    """Profile the next step. Return the figures of its trace."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        next(steps)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(file))
    return trace_figures(file)


@contextmanager
def locking(blocks: int | None) -> Iterator[None]:
    """Let page-locking fail in this context after `blocks` blocks. None changes nothing."""
    page_lock = stream.page_lock
    asked = 0

    def lock(block: torch.Tensor, device: torch.device) -> int:
        nonlocal asked
        asked += 1
        return 2 if asked - 1 == blocks else page_lock(block, device)

    stream.page_lock = lock
    try:
        yield
    finally:
        stream.page_lock = page_lock


@contextmanager
def with_streamed(count: int | None) -> Iterator[None]:
    """Stream `count` layers in this context, even if more layers fit. None uses the plan."""
    choose_plan = plan_stage.choose_plan
    count_streamed = MemoryEstimator.count_streamed

    def planned(*args: Any) -> Any:  # needed on a CPU, whose plan has no streamed layers
        model, trained, plan = choose_plan(*args)
        return model, trained, replace(plan, streamed_layers=count)

    if count is not None:
        plan_stage.choose_plan = planned
        MemoryEstimator.count_streamed = lambda self, room: count  # type: ignore[method-assign]
    try:
        yield
    finally:
        plan_stage.choose_plan = choose_plan
        MemoryEstimator.count_streamed = count_streamed  # type: ignore[method-assign]


def measure(
    config: Mapping[str, Any],
    micro_batches: list[int],
    streamed: int | None,
    steps: int,
    inputs: tuple[Path, Path],
    overrides: list[str],
) -> list[dict[str, Any]]:
    """Train `steps` steps of a shape for each size of the micro batch. Return the results.

    Args:
        config: the config of the model.
        micro_batches: sizes of the micro batch in tokens.
        streamed: number of streamed layers. None uses the plan.
        inputs: the tokenizer and the rows of `write_inputs`.
        overrides: keys of the recipe.
    """
    tokenizer, rows = inputs
    device = choose_device()
    results = []
    with tempfile.TemporaryDirectory(prefix="tunesmith-streamed-") as name:
        folder = Path(name)
        (folder / "model").mkdir()
        (folder / "run").mkdir()
        write_shape(folder / "model", config, str(tokenizer))
        keys = [
            f"train.global_batch={max(micro_batches)} tokens",
            f"train.micro_batch={micro_batches[0]} tokens",
            *overrides,
        ]
        if streamed is not None:
            keys.append("train.recompute=full")
        if streamed != 0:
            keys.append("train.cpu_offload=[parameters]")
        run = shape_recipe(
            folder / "model", data=str(rows), rows="prompt-completion", overrides=keys
        )
        run = BenchPlan(run, steps + 1, 0, "random").measured_run(folder / "run")
        with deterministic_algorithms(run.train.deterministic):
            began = time.perf_counter()
            with with_streamed(streamed):
                session = build(Request(run, purpose="measure", weights="random"))
            build_seconds = time.perf_counter() - began
            print(choices_line(session.plan), flush=True)
            layers: Any = session.model.layers
            host = layers[0].stream if isinstance(layers[0], stream.StreamedLayer) else None
            for tokens in micro_batches:
                # Without a reset, the second size would compile a graph with dynamic shapes.
                torch.compiler.reset()
                layout = replace(session.plan.layout, micro_batch=Size(tokens, "tokens"))
                if layout.row_length is not None:
                    layout = replace(layout, row_length=tokens)
                session.plan = replace(session.plan, layout=layout)
                stop = StopControl(StopRequest(), folder / "run")
                trainer = Trainer(session, Start(), Sinks([]), stop)
                session.model.train()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                copies = []
                with session.loader(0) as loader:
                    generator = trainer.steps(loader)
                    for _ in range(steps):
                        before = host.copies if host else 0
                        next(generator)
                        copies.append(host.copies - before if host else 0)
                    trainer.metrics.flush()
                    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
                    profile = profiled(generator, folder / "trace.json")
                    generator.close()
                records = trainer.metrics.records[:steps]
                seconds = [record.step_seconds for record in records]
                results.append(
                    {
                        "layers": session.plan.layers,
                        "streamed": len(host.streamed) if host else 0,
                        "recomputed": session.plan.recomputed_layers,
                        "micro_batch": tokens,
                        "tokens": [record.tokens for record in records],
                        "build_seconds": build_seconds,
                        "step_seconds": seconds,
                        "tokens_per_second": records[-1].tokens / min(seconds[1:] or seconds),
                        "losses": [record.loss for record in records],
                        "peak_gib": peak / 2**30,
                        "planned_gib": session.plan.memory.total / 2**30,
                        "host_gib": host.host_bytes / 2**30 if host else 0.0,
                        "copies_a_step": copies,
                        **profile,
                    }
                )
                print(json.dumps(results[-1]), flush=True)
    return results


def main() -> None:
    """Measure all selected cases, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default="link,8b,70b,planned,experts")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault(WORKSPACE, CHOICES[0])  # cuBLAS reads it at the first use of CUDA
    device = choose_device()
    found: dict[str, Any] = {"torch": torch.__version__, "device": str(device), "errors": {}}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    small, huge = dict(SHAPES["llama3-8b"].config), dict(SHAPES["llama3-70b"].config)
    experts = dict(SHAPES["qwen3-30b-a3b"].config)
    huge["num_hidden_layers"] = 48
    sizes = [16384, 2048], [16384, 8192]
    row_tokens, overrides = 2048, ["data.seq_len=2048", "model.dtype=bf16"]
    if args.small:
        small, huge, experts = small | SMALL, huge | SMALL, experts | SMALL
        experts |= {"moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2}
        sizes = [256, 128], [256, 128]
        row_tokens, overrides = 128, ["data.seq_len=128", "model.dtype=fp32"]
    depth = small["num_hidden_layers"]
    cases = {
        "8b resident": (small, sizes[0], 0, args.steps),
        "8b streamed": (small, sizes[0], depth, args.steps),
        "8b half": (small, sizes[0][:1], depth // 2, args.steps),
        "8b staged": (small, sizes[0][:1], depth, args.steps),
        "70b streamed": (huge, sizes[1], huge["num_hidden_layers"], max(2, args.steps - 1)),
        # The memory trial runs, and the layers that fit after it stay on the device.
        "planned": (huge, sizes[1][:1], None, 3),
        "experts resident": (experts, sizes[0][:1], 0, args.steps),
        "experts streamed": (experts, sizes[0][:1], experts["num_hidden_layers"], args.steps),
    }
    only = args.only.split(",")
    if "link" in only and device.type == "cuda":
        found["link"] = {"pinned": stream.host_link(device)}
        print(json.dumps(found["link"]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_inputs(Path(folder), row_tokens)
        for case, (config, micro_batches, streamed, steps) in cases.items():
            name, *_ = case.split()
            if not {name, case} & {*only}:
                continue
            # Without this key, the backward of attention sums in any order, so losses could differ.
            keys = [*overrides, "train.deterministic=true"] if name == "8b" else overrides
            print(f"-- {case}", flush=True)
            try:
                with locking(stream.SLOTS if case == "8b staged" else None):
                    found[case] = measure(config, micro_batches, streamed, steps, inputs, keys)
            except Exception as error:  # the next cases are measured anyway
                traceback.print_exc()
                found["errors"][case] = repr(error)[:2000]
            gc.collect()
            free_device_memory()
            args.output.write_text(json.dumps(found, indent=1), encoding="utf-8")
    for case in ("8b streamed", "8b half", "8b staged", "experts streamed"):
        resident = found.get(f"{case.split()[0]} resident", [])
        for a, b in zip(resident, found.get(case, []), strict=False):
            found[f"{case}, {a['micro_batch']}: equal losses"] = a["losses"] == b["losses"]
            slower = min(b["step_seconds"][1:]) / min(a["step_seconds"][1:])
            found[f"{case}, {a['micro_batch']}: step of resident"] = slower
    args.output.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(json.dumps({key: value for key, value in found.items() if "," in key or key == "errors"}))


if __name__ == "__main__":
    main()
