"""Combinations that tests cover: every pair of values once, and all combinations of tier 1.

A test file keeps its combinations in constants named COVERED_...; `python tests/pairwise.py` prints
them all.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from allpairspy import AllPairs

Combination = dict[str, Any]


def pairwise(
    values: Mapping[str, Sequence[Any]],
    *,
    tier_1: Mapping[str, Sequence[Any]] | None = None,
    allows: Any = None,
) -> list[Combination]:
    """Return few combinations that have each pair of values, and all combinations of `tier_1`.

    Args:
        values: the values of each name.
        tier_1: for each name, the values whose combinations all count; a subset of `values`.
        allows: a function of a combination, partial or complete, that returns whether it can exist.
    """
    names = list(values)

    def is_allowed(row: Sequence[Any]) -> bool:
        return allows is None or bool(allows(dict(zip(names, row, strict=False))))

    whole = product(*tier_1.values()) if tier_1 else []
    first = [dict(zip(tier_1 or (), row, strict=True)) for row in whole]
    rows = [row for row in first if is_allowed([row[name] for name in names])]
    rows += [
        combination
        for row in AllPairs(list(values.values()), filter_func=is_allowed)
        if (combination := dict(zip(names, row, strict=True))) not in rows
    ]
    return rows


def name_of(combination: Mapping[str, Any]) -> str:
    """Return the name of a combination, for `ids` of pytest."""
    return "-".join(str(value) for value in combination.values())


def main() -> None:
    """Print the combinations of all constants COVERED_... of the tests."""
    root = Path(__file__).parent
    sys.path[:0] = [str(root), str(root / "tools")]
    for file in sorted(root.rglob("test_*.py")):
        for name in re.findall(r"^(COVERED_\w+)", file.read_text(), re.MULTILINE):
            parts = file.relative_to(root).with_suffix("").parts
            if not (file.parent / "__init__.py").is_file():
                sys.path.insert(0, str(file.parent))
                parts = parts[-1:]
            combinations = getattr(importlib.import_module(".".join(parts)), name)
            print(f"{file.relative_to(root.parent)}: {name}, {len(combinations)} combinations")
            for combination in combinations:
                print(f"  {name_of(combination)}")


if __name__ == "__main__":
    main()
