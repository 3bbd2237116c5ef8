"""Measurement of GRPO steps of a real shape with random weights, with and without fp8.

    python benchmarks/speed/grpo_steps.py --shape qwen3-4b --tokenizer DIR --data rows.json \\
        --json out.json [--steps 2] [key=value ...]

A model with random weights has almost uniform attention, which hides differences between the
sampler and the trainer. The weights of the norms of queries and keys are therefore multiplied by
SHARPNESS, so that the scores are multiplied by its square. `kl_sampler` in the report has the KL
divergence per token of each step. Training continues if it is above the limit of `train`.

The report also has the memory before the first step and after each step, and the number of graphs
that torch.compile has built so far. It is written after each case.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from step_reports import measure_cases
from torch._dynamo.utils import counters

from tunesmith.checkpoint.resume import Start
from tunesmith.host.signals import StopRequest
from tunesmith.metrics.sink import Sinks
from tunesmith.model.arch.shapes import find_shape
from tunesmith.runtime.host import bound_shape_caches
from tunesmith.start.build import build
from tunesmith.start.lines import choices_line
from tunesmith.start.request import Request
from tunesmith.tools.bench.measure import BenchPlan
from tunesmith.tools.bench.shape import shape_recipe, write_shape
from tunesmith.training.session import Session
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer

CASES = {"bf16": "none", "fp8": "fp8"}  # case -> model.quantize
SHARPNESS = 2.0


def allocated_gib(device: torch.device) -> float:
    """Return the memory of all tensors on a GPU, and 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    gc.collect()
    return torch.cuda.memory_allocated(device) / 2**30


def sharpen_attention(session: Session) -> int:
    """Multiply the weights of the norms of queries and keys. Return the number of norms."""
    norms = 0
    with torch.no_grad():
        for name, parameter in session.model.model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.mul_(SHARPNESS)
                norms += 1
    return norms


def measure_case(args: argparse.Namespace, quantize: str, folder: Path) -> dict[str, Any]:
    """Train `--steps` steps. Return the figures of each step."""
    torch.compiler.reset()
    counters.clear()
    (folder / "model").mkdir(parents=True)
    (folder / "run").mkdir()
    write_shape(folder / "model", find_shape(args.shape).config, args.tokenizer)
    keys = [f"model.quantize={quantize}", *args.overrides]
    run = shape_recipe(folder / "model", data=args.data, rows="alpaca", overrides=keys)
    run = BenchPlan(run, args.steps, 0, "random").measured_run(folder / "run")
    began = time.perf_counter()
    session = build(Request(run, purpose="measure", weights="random"))
    build_seconds = time.perf_counter() - began
    print(choices_line(session.plan), flush=True)
    norms = sharpen_attention(session)
    # Record a large divergence instead of ending the measurement.
    session.model.method.find_fault = lambda _: None  # type: ignore[method-assign]
    trainer = Trainer(session, Start(), Sinks([]), StopControl(StopRequest(), folder / "run"))
    session.model.train()
    memory, graphs = [allocated_gib(session.device)], []
    with trainer.batches() as batches:
        for _ in trainer.steps(batches):
            trainer.metrics.flush()
            memory.append(allocated_gib(session.device))
            graphs.append(int(counters["stats"]["unique_graphs"]))
    records = trainer.metrics.records
    return {
        "base": session.plan.base,
        "sharpened_norms": norms,
        "build_seconds": build_seconds,
        "kl_sampler": [record.extra["kl_sampler"] for record in records],
        "step_seconds": [record.step_seconds for record in records],
        "rollout_seconds": [record.extra["rollout_seconds"] for record in records],
        "answer_tokens": [record.supervised_tokens for record in records],
        "losses": [record.loss for record in records],
        "allocated_gib": memory,
        "peak_gib": records[-1].memory_gib,
        "planned_gib": session.plan.memory.total / 2**30,
        "graphs": graphs,
    }


def main() -> None:
    """Measure each case, and write the report after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    bound_shape_caches()
    with tempfile.TemporaryDirectory(prefix="tunesmith-grpo-") as name:
        cases = {
            case: partial(measure_case, args, CASES[case], Path(name) / case) for case in args.only
        }
        measure_cases(cases, args.json)


if __name__ == "__main__":
    main()
