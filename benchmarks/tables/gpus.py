"""The table of GPUs in docs/plan.md: what `tunesmith plan --on` knows, from `host/chips.json`.

    python benchmarks/tables/gpus.py --write docs/plan.md
    python benchmarks/tables/gpus.py --check docs/plan.md      # exit status 1 if the page differs

Sources are in that file.
"""

from __future__ import annotations

import sys

from generated import table, write_or_check

from tunesmith.host.chips import CHIPS, Chip


def cells(name: str, chip: Chip) -> tuple[str, ...]:
    """One line of the table."""
    quantize = "nf4, fp8" if chip.fp8 else "nf4"
    return (
        f"`{name}`",
        f"{chip.gib:.0f}",
        f"{chip.tflops:.0f}",
        f"{chip.bandwidth:,.0f}",
        f"{chip.link:g}" if chip.link else "",
        f"{chip.network:g}" if chip.network else "",
        quantize if chip.bf16 else f"{quantize}; no bf16",
    )


def page() -> str:
    """The table in Markdown."""
    head = (
        "name",
        "GiB",
        "TFLOP/s in whole steps",
        "memory, GB/s",
        "link, GB/s",
        "network, GB/s",
        "`model.quantize`",
    )
    return table(head, [cells(name, chip) for name, chip in CHIPS.items()])


if __name__ == "__main__":
    sys.exit(write_or_check(__doc__, "benchmarks/tables/gpus.py", page))
