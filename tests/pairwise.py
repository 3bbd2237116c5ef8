"""Combinations that tests cover: every pair of values once, and all combinations of tier 1.

A test file keeps its combinations in constants named COVERED_...; `python tests/pairwise.py` prints
them all.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

Combination = dict[str, Any]


def pairwise(
    values: Mapping[str, Sequence[Any]],
    *,
    tier_1: Mapping[str, Sequence[Any]] | None = None,
    allows: Callable[[Combination], bool] | None = None,
) -> list[Combination]:
    """Return few combinations that have each pair of values, and all combinations of `tier_1`.

    Args:
        values: the values of each name.
        tier_1: for each name, the values whose combinations all count; a subset of `values`.
        allows: a function that returns whether a combination can exist; all can if left out. A pair
            that is in no possible combination is left out.
    """
    possible = [dict(zip(values, row, strict=True)) for row in product(*values.values())]
    possible = [combination for combination in possible if allows is None or allows(combination)]

    def pairs(combination: Combination) -> set[Any]:
        places = [(name, values[name].index(value)) for name, value in combination.items()]
        return set(combinations(places, 2))

    chosen = [row for row in possible if tier_1 and all(row[k] in tier_1[k] for k in row)]
    missing = set().union(*map(pairs, possible)).difference(*map(pairs, chosen))
    while missing:
        best = max(possible, key=lambda combination: len(missing & pairs(combination)))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def name_of(combination: Mapping[str, Any] | Sequence[Any]) -> str:
    """Return the name of a combination, for `ids` of pytest."""
    if isinstance(combination, str):
        return combination
    values = combination.values() if isinstance(combination, Mapping) else combination
    return "-".join(str(value) for value in values)


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
            covered = getattr(importlib.import_module(".".join(parts)), name)
            print(f"{file.relative_to(root.parent)}: {name}, {len(covered)} combinations")
            for combination in covered:
                print(f"  {name_of(combination)}")


if __name__ == "__main__":
    main()
