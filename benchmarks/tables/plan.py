"""The table of docs/plan.md: what `tunesmith plan` forecasts for the recipes that ship, on the
machines that they are for.

    python benchmarks/tables/plan.py --write docs/plan.md
    python benchmarks/tables/plan.py --check docs/plan.md      # exit status 1 if the page differs from the forecast

Shapes are those of `tunesmith bench --shape`; every example fills `data.seq_len`.
"""

from __future__ import annotations

import shlex
import sys
from typing import NamedTuple

from generated import table, write_or_check

from tunesmith.config.load import load_recipe
from tunesmith.model.shapes import SHAPES
from tunesmith.model.spec import read_spec
from tunesmith.planning.forecast import measure_work, plan_on_paper
from tunesmith.planning.machines import read_cluster
from tunesmith.planning.resolve import checkpoint_bytes


class Row(NamedTuple):
    """A run in words, its recipe with other keys, the shape of its model, machines."""

    words: str
    recipe: str
    shape: str
    on: str


FULL, LORA = "llama3.3-70b-full", "llama3.3-70b-lora"
# A guide's 4 and 16 rows for each of 2 shards of 8 ranks are 8,192 and 32,768 tokens a step.
ROWS = [
    Row("70B full, 4 rows a data rank", FULL, "llama3-70b", "2x8xh100"),
    Row(
        "70B full, 16 rows a data rank",
        f"{FULL} train.global_batch='32768 tokens'",
        "llama3-70b",
        "2x8xh100",
    ),
    Row("70B LoRA", LORA, "llama3-70b", "2x8xh100"),
    Row("70B LoRA", "llama3.1-70b-lora", "llama3-70b", "2x-dgx-spark"),
    Row("70B QLoRA", "llama3.1-70b-qlora", "llama3-70b", "dgx-spark"),
    Row("8B LoRA", "llama3.1-8b-lora", "llama3-8b", "dgx-spark"),
    Row("8B LoRA", "llama3.1-8b-lora", "llama3-8b", "2x-dgx-spark"),
    Row("3B full", "llama3.2-3b-full", "llama3-3b", "dgx-spark"),
    Row("3B full", "llama3.2-3b-full", "llama3-3b", "2x-dgx-spark"),
]


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table: the mesh that `plan` puts first."""
    name, *keys = shlex.split(row.recipe)
    run, spec = load_recipe(name, keys), read_spec(SHAPES[row.shape].config, where=row.shape)
    planner = plan_on_paper(run, spec, read_cluster(row.on), measure_work(run, spec, None))
    found, (size, _) = planner.ranked()[0], checkpoint_bytes(planner.run, planner.trained, None)
    return (
        row.words,
        f"`{row.recipe}`",
        row.on,
        found.plan.mesh.sizes(),
        f"{found.plan.memory.tokens:,}",
        f"{found.plan.recomputed_layers} of {spec.depth}",
        f"{' / '.join(f'{bytes_ / 2**30:.0f}' for bytes_ in found.phases.values())} of {found.room / 2**30:.0f}",
        " / ".join(f"{bytes_ / 1e9:,.1f}" for bytes_ in found.sent.values()),
        f"{found.step_seconds:.1f}" if found.fits else "does not fit",
        f"{found.idle_share:.0%}",
        f"{found.tokens_per_second:,.0f}",
        f"{size / 1e9:,.1f}",
    )


def page() -> str:
    """The table in Markdown."""
    head = (
        "run", "recipe", "on", "replicate x shard x tensor", "micro batch", "recompute", "GiB a rank: load / step / save",
        "GB that a rank sends a step: node / network", "step, s", "idle", "tokens/s", "GB a checkpoint",
    )  # fmt: skip
    return table(head, map(cells, ROWS))


if __name__ == "__main__":
    sys.exit(write_or_check(__doc__, "benchmarks/tables/plan.py", page))
