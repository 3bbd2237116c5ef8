"""The table of docs/plan.md: what `tunesmith plan` forecasts for some models and machines.

    python benchmarks/plan.py --write docs/plan.md
    python benchmarks/plan.py --check docs/plan.md      # exit status 1 if the page differs from the forecast

Shapes are those of `tunesmith bench --shape`; every example fills 2,048 tokens.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tunesmith.config.load import from_mapping
from tunesmith.model.shapes import SHAPES
from tunesmith.model.spec import read_spec
from tunesmith.plan.forecast import Planner, measure_work
from tunesmith.plan.hardware import read_cluster

BEGIN = "<!-- Written by: python benchmarks/plan.py --write docs/plan.md -->\n"
END = "<!-- The end of what it writes. -->\n"
LORA = {"adapter": {"rank": 16, "alpha": 32}}
FULL = {"adapter": {"kind": "none"}}
STOCHASTIC = {"master_weights": "stochastic"}


class Row(NamedTuple):
    """A run: model, method in words, machines, recipe, keys of `train`, and of `parallel` where one mesh is meant."""

    shape: str
    method: str
    on: str
    recipe: dict
    train: dict
    parallel: dict


ROWS = [
    Row("llama3-70b", "full, 4 examples a step", "2x8xh100", FULL, {"global_batch": "4 examples"}, {}),
    Row("llama3-70b", "the same", "2x8xh100", FULL, {"global_batch": "4 examples"}, {"shard": 2, "tensor": 8}),
    Row("llama3-70b", "full, 16 examples a step", "2x8xh100", FULL, {"global_batch": "16 examples"}, {}),
    Row("llama3-70b", "full, 16, stochastic rounding", "2x8xh100", FULL, {"global_batch": "16 examples", **STOCHASTIC}, {}),
    Row("llama3-70b", "LoRA r 16, 32 a step", "2x8xh100", LORA, {"global_batch": "32 examples"}, {}),
    Row("llama3-70b", "LoRA r 16, 32 a step", "2x-dgx-spark", LORA, {"global_batch": "32 examples"}, {}),
    Row("llama3-70b", "QLoRA r 16 (nf4), 32 a step", "dgx-spark", LORA | {"model": {"quantize": "nf4"}}, {"global_batch": "32 examples"}, {}),
    Row("llama3-8b", "LoRA r 16, 32 a step", "dgx-spark", LORA, {"global_batch": "32 examples"}, {}),
    Row("llama3-8b", "LoRA r 16, 32 a step", "2x-dgx-spark", LORA, {"global_batch": "32 examples"}, {}),
    Row("llama3-3b", "full, 32 a step", "dgx-spark", FULL, {"global_batch": "32 examples"}, {}),
    Row("llama3-3b", "full, 32 a step", "2x-dgx-spark", FULL, {"global_batch": "32 examples"}, {}),
]  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table: the mesh that `plan` puts first."""
    values = {"data": {"train": {"source": "rows.jsonl"}}, "output_dir": "runs/none", **row.recipe, "train": row.train}
    values["model"] = {"name": "none", **row.recipe.get("model", {})}
    run = from_mapping(values, where="plan.py", base=Path.cwd())
    run = replace(run, parallel=replace(run.parallel, **row.parallel))
    spec = read_spec(SHAPES[row.shape].config, where=row.shape)
    found = Planner(run, spec, read_cluster(row.on), measure_work(run, spec, None, None)).ranked()[0]
    return (
        SHAPES[row.shape].source.partition("/")[2],
        row.method,
        row.on,
        " x ".join(map(str, found.plan.mesh)),
        f"{found.plan.memory.tokens:,}",
        f"{found.plan.recomputed_layers} of {spec.layers}",
        f"{found.phases['step'] / 2**30:.0f} of {found.room / 2**30:.0f}",
        f"{found.step_seconds:.1f}",
        f"{found.hidden_seconds:.1f}",
        f"{found.idle_share:.0%}",
        f"{found.tokens_per_second:,.0f}",
    )


def table() -> str:
    """The table in Markdown."""
    head = (
        "model", "method", "on", "replicate x shard x tensor", "micro batch", "recompute", "GiB a rank", "step, s",
        "hidden communication, s", "idle", "tokens/s",
    )  # fmt: skip
    lines = [head, ("---",) * len(head), *map(cells, ROWS)]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def main() -> int:
    """`--write FILE` or `--check FILE`."""
    if len(sys.argv) != 3 or sys.argv[1] not in ("--write", "--check"):
        print(__doc__, file=sys.stderr)
        return 2
    page = Path(sys.argv[2])
    old = page.read_text(encoding="utf-8")
    before, _, rest = old.partition(BEGIN)
    new = before + BEGIN + table() + END + rest.partition(END)[2]
    if sys.argv[1] == "--write":
        page.write_text(new, encoding="utf-8")
    elif new != old:
        print(f"{page} differs from the forecast; run: python benchmarks/plan.py --write {page}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
