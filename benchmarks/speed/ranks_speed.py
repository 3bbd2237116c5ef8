"""What sharding and a second process cost on a CPU: the same steps in turns, tokens/s beside one
plain process.

    python benchmarks/speed/ranks_speed.py --model DIR --data rows.json --dtype fp32 --rounds 3 --json out.json

`plain`, `one copy` and `one shard` are one process with all threads. `one copy` sums its gradients
as copies do, over a group of one rank, and `one shard` takes every layer through `fully_shard` on a
mesh of one rank. `train` does neither there: it is what copies and shards cost by themselves, also
in tokens of a second of CPU time, which other programs disturb less. `copies` and `shards` are two
processes with half of the threads each, under torchrun with gloo. Rows are alpaca-like JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from against_trl import report_of

CONTENDERS = {
    "plain": ["1"],
    "one copy": ["1"],
    "one shard": ["1"],
    "copies": ["2", "replicate"],
    "shards": ["2", "shard"],
}


def make_group_of_one() -> None:
    """Make this process a group of one rank."""
    import torch.distributed as dist

    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)


def shard_over_one_rank() -> None:
    """Let every model of this process go through `fully_shard`, over a mesh of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    from tunesmith import build_model
    from tunesmith.parallel.shard import shard_model

    make_group_of_one()
    mesh: Any = SimpleNamespace(
        shape=SimpleNamespace(world=2, shard=2),
        sharding=init_device_mesh("cpu", (1, 1), mesh_dim_names=("r", "s")),
    )
    build_model.shard_model = lambda root, _, *rest, **options: shard_model(
        root, mesh, *rest, **options
    )


def sum_over_one_rank(session: Any) -> Any:
    """The sum of gradients of a model trained in full over a group of this process alone."""
    import torch.distributed as dist

    from tunesmith.parallel.copies import GradientSum

    return GradientSum(session.optimizer.parts.values(), dist.group.WORLD, beside_backward=True)


def contend(a: argparse.Namespace) -> None:
    """Train in this process, or as one of two; the last line of rank 0's stdout is its report."""
    from tunesmith.checkpoint.resume import Start
    from tunesmith.config.load import from_mapping
    from tunesmith.distributed.ranks import join_ranks
    from tunesmith.host.signals import StopRequest
    from tunesmith.metrics.sink import Sinks
    from tunesmith.training.build import build
    from tunesmith.training.stop_control import StopControl
    from tunesmith.training.trainer import Trainer

    ranks, *dimension = CONTENDERS[a.contender]
    if a.contender == "one shard":
        shard_over_one_rank()
    with tempfile.TemporaryDirectory() as folder, join_ranks() as joined:
        recipe = {
            "model": {"name": a.model, "dtype": a.dtype},
            "adapter": {"kind": a.trained},
            "data": {"train": {"source": str(Path(a.data).resolve()), "format": "alpaca"}, "seq_len": a.seq},
            "train": {"duration": f"{a.steps} steps", "global_batch": f"{a.batch} examples", "compile": "off"},
            "parallel": dict.fromkeys(dimension, int(ranks)),
            "log": {"tensorboard": False}, "output_dir": folder,
        }  # fmt: skip
        run = from_mapping(recipe, where="benchmark", base=Path(folder))
        session = build(run, Start(), measured=True, ranks=joined)
        trainer = Trainer(
            session, Start(), Sinks([]), StopControl(StopRequest(), Path(folder), joined)
        )
        if a.contender == "one copy":
            make_group_of_one()
            trainer.gradient_sum = sum_over_one_rank(session)
        session.model.train()
        began_cpu = 0.0
        with session.loader(0) as loader:
            for step in trainer.steps(loader):
                if step == a.skip:
                    began_cpu = time.process_time()
        cpu_seconds = time.process_time() - began_cpu
        trainer.metrics.flush()
        timed = trainer.metrics.records[a.skip :]
        if joined.is_main_process:
            rate = sum(r.tokens for r in timed) / sum(r.step_seconds for r in timed)
            cpu_rate = sum(r.tokens for r in timed) / cpu_seconds / joined.world
            report = {
                "tokens_per_second": rate,
                "tokens_per_cpu_second": cpu_rate,
                "loss": [r.loss for r in trainer.metrics.records],
            }
            print("REPORT " + json.dumps(report), flush=True)


def measure(contender: str) -> dict[str, Any]:
    """Run one contender in new processes."""
    ranks = int(CONTENDERS[contender][0])
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else []
    )
    return report_of(
        contender, launch, OMP_NUM_THREADS=str(max(1, len(os.sched_getaffinity(0)) // ranks))
    )


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="a Transformers folder")
    p.add_argument("--data", required=True, help="alpaca-like rows, a JSON array")
    p.add_argument(
        "--trained",
        default="none",
        choices=["none", "lora"],
        help="adapter.kind; none is full fine-tuning",
    )
    p.add_argument(
        "--dtype", default="bf16", choices=["bf16", "fp32"], help="fp32 where a CPU emulates bf16"
    )
    p.add_argument("--batch", type=int, default=8, help="examples of a step")
    p.add_argument("--seq", type=int, default=256)
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--skip", type=int, default=1, help="first steps that are not timed")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--json", help="write the report here")
    p.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.contender:
        contend(a)
        return
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for round_ in range(a.rounds):
        for name, done in runs.items():
            done.append(measure(name))
            print(
                f"round {round_ + 1}  {name:10} {done[-1]['tokens_per_second']:8.1f} tok/s",
                flush=True,
            )
    table = {}
    for name, done in runs.items():
        row = {}
        for figure, share in (
            ("tokens_per_second", "of_plain"),
            ("tokens_per_cpu_second", "of_plain_cpu"),
        ):
            row[figure] = statistics.median(r[figure] for r in done)
            shares = [
                r[figure] / plain[figure] for r, plain in zip(done, runs["plain"], strict=True)
            ]
            row[share] = statistics.median(shares)
        table[name] = row
        print(
            f"{name:10} {row['tokens_per_second']:8.1f} tok/s  {row['of_plain']:.1%} of plain",
            end="",
        )
        print(
            f"; {row['tokens_per_cpu_second']:.1f} a second of CPU time, {row['of_plain_cpu']:.1%} of plain"
        )
    if a.json:
        Path(a.json).write_text(
            json.dumps({"command": sys.argv, "median": table, "runs": runs}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
