"""The numbers of a run that learns from preferences do not depend on how it is laid out: packed or
not, in any micro batch, with layers that recompute or are compiled.

Ranks: tests/parallel/test_preferences_on_ranks.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tunesmith
from recipes import make_run, merge, write_feedback, write_pairs

pytestmark = pytest.mark.slow

FULL = {"adapter": {"kind": "none"}}
METHODS: dict[str, dict[str, Any]] = {
    "dpo and cross-entropy": {"method": {"name": "dpo", "sft_weight": 0.5}},
    "dpo in full": {"method": "dpo", **FULL},
    "orpo": {"method": "orpo"},
    "simpo in full": {"method": "simpo", **FULL},
    "kto": {"method": "kto"},
    "kto in full": {"method": "kto", **FULL},
}
# Each layout changes what the others leave: one by which the numbers change shows it, whatever else
# is changed beside it.
SMALL: dict[str, Any] = {"train": {"micro_batch": "1 examples", "recompute": "full"}}
UNPACKED: dict[str, Any] = {"data": {"pack": False}, "train": {"micro_batch": "3 examples"}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one example at a time, recomputed": SMALL,
    "unpacked, three examples": UNPACKED,
}
# Of one method: layers and their loss are the same code in all. Traced, not compiled: that the
# compiler itself answers alike is shown in runtime/test_compilation.py. Few graphs: by documents,
# each layer is cut in two.
COMPILED = {"train": {"compile": "on"}, "model": {"attention": "eager"}}


def numbers(tiny: Path, folder: Path, name: str, changes: dict[str, Any]) -> list[dict[str, float]]:
    """Loss, gradient norm and the method's metrics of each of two steps, and of held-out rows."""
    is_kto = changes["method"] == "kto"
    write, form = (write_feedback, "feedback") if is_kto else (write_pairs, "preference")
    sources = {}
    for split, first in (("train", 0), ("validation", 40)):
        file = write(folder / f"{split}-{form}.jsonl", 12, first)
        sources[split] = {"source": str(file), "format": form}
    base = {
        "data": {**sources, "seq_len": 96},
        "train": {
            "duration": "2 steps",
            "global_batch": "8 examples",
            "micro_batch": "192 tokens",
            "warmup": "0 steps",
        },
        "validate": {"every": "2 steps"},
        "checkpoint": {"every": None},
        "output_dir": str(folder / name),
    }
    found = []
    for record in tunesmith.train(make_run(tiny, folder, **merge(base, changes))).records:
        values = {"loss": record.loss, "grad_norm": record.grad_norm}
        # Before the first update margins are 0 but for rounding, and their signs mean nothing.
        extra = {name: value for name, value in record.extra.items() if name != "reward_accuracy"}
        found.append({**values, "val_loss": record.val_loss or 0.0, **extra})
    return found


def differences(one: list[dict[str, float]], other: list[dict[str, float]]) -> list[float]:
    """Of each number, relative to it; of one next to 0, in ten of these."""
    found = []
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            found.append(abs(right[name] - value) / max(abs(value), 0.1))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_layout_changes_nothing(
    method: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """1e-4: fp32 sums in another order."""
    layouts = dict(LAYOUTS)
    if method == "dpo and cross-entropy":
        request.getfixturevalue("eager_compiler")
        layouts["compiled"] = COMPILED
    found = {}
    for name, changes in {"packed": {}, **layouts}.items():
        # The base scores its answers in the layout of each run, not in one of other code before.
        monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / f"cache, {name}"))
        found[name] = numbers(tiny, tmp_path, name, merge(METHODS[method], changes))
    largest = {name: max(differences(found["packed"], found[name])) for name in layouts}
    print(method, {name: f"{value:.1e}" for name, value in largest.items()})
    assert max(largest.values()) < 1e-4, largest
