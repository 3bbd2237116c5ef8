"""Losses of a recipe on several ranks beside those of one process: a table of what is trained x how it is shared.

    python benchmarks/ranks.py --model DIR --data rows.json --worlds 2 4 --json out.json

Each row is `tunesmith train` under torchrun on this machine, with gloo on a CPU, in fp32 unless --dtype says otherwise.
Printed: the largest relative difference of the loss and of the gradient norm in the first step, and in all steps. Rows
are alpaca-like JSON. The model's sizes must be divisible by the tensor sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TRAINED = {
    "full": ["adapter.kind=none"],
    "lora": ["adapter.kind=lora"],
    "lora, dropout 0.1": ["adapter.kind=lora", "adapter.dropout=0.1"],
    "lora on nf4": ["adapter.kind=lora", "model.quantize=nf4"],
}


def meshes(world: int, tensor: bool) -> list[tuple[int, int, int]]:
    """(replicate, shard, tensor) of `world` ranks; without tensor parallelism unless asked."""
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    return [
        (r, s, world // r // s) for r in sizes for s in sizes if world % (r * s) == 0 and (tensor or r * s == world)
    ]


def records(folder: Path, words: list[str], world: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of a run on `world` ranks."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    command = [sys.executable, *start, "-m", "tunesmith", "train", *words, f"output_dir={folder}"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(record["loss"], record["grad_norm"]) for record in map(json.loads, lines)]


def differences(one: list[tuple[float, float]], many: list[tuple[float, float]]) -> dict[str, float]:
    """Largest relative differences of loss and gradient norm, in the first step and in all."""
    pairs = list(zip(one, many, strict=True))
    of = {"loss": [abs(b[0] / a[0] - 1) for a, b in pairs], "grad_norm": [abs(b[1] / a[1] - 1) for a, b in pairs]}
    return {
        f"{name}_{when}": max(values[:last])
        for name, values in of.items()
        for when, last in (("first", 1), ("all", None))
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="a Transformers folder or a .gguf file")
    p.add_argument("--data", required=True, help="alpaca-like rows, a JSON array")
    p.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    p.add_argument("--trained", nargs="+", default=list(TRAINED), choices=list(TRAINED))
    p.add_argument("--tensor", action="store_true", help="meshes with tensor parallelism too")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--seq", type=int, default=128)
    p.add_argument("--batch", type=int, default=8, help="examples of a step")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    p.add_argument("--compile", default="off", choices=["on", "off"])
    p.add_argument("--json", help="write the table here")
    a = p.parse_args()
    recipe = {
        "model": {"name": a.model, "dtype": a.dtype},
        "data": {"train": {"source": str(Path(a.data).resolve()), "format": "alpaca"}, "seq_len": a.seq},
        "train": {
            "duration": f"{a.steps} steps", "global_batch": f"{a.batch} examples", "micro_batch": f"{2 * a.seq} tokens",
            "learning_rate": 1e-4, "warmup": "2 steps", "clip_norm": 0.5, "compile": a.compile,
        },
        "checkpoint": {"every": None}, "log": {"tensorboard": False},
    }  # fmt: skip
    table = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(json.dumps(recipe | {"output_dir": str(folder / "run")}))
        for what in a.trained:
            words = [str(folder / "recipe.yaml"), *TRAINED[what]]
            one = records(folder / what, words, 1)
            for world in a.worlds:
                for mesh in meshes(world, a.tensor):
                    sizes = dict(zip(("replicate", "shard", "tensor"), mesh, strict=True))
                    keys = [f"parallel.{dimension}={size}" for dimension, size in sizes.items()]
                    many = records(folder / f"{what} {mesh}", [*words, *keys], world)
                    table.append({"trained": what, "ranks": world, **sizes, **differences(one, many)})
                    row = table[-1]
                    print(f"{what:<18} {mesh!s:<10}", *(f"{key} {row[key]:.1e}" for key in list(row)[5:]), flush=True)
    if a.json:
        Path(a.json).write_text(json.dumps({"command": sys.argv, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
