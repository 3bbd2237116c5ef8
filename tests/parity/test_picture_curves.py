"""Loss curves with pictures beside Transformers' own processor and model, under PEFT; twenty steps
of all families: `benchmarks/parity/picture_curves.py`.

Nothing of the plain side is ours: text, placeholders, pixels, positions, masks and labels are
Transformers'. In fp32 sums are taken in another order: 2e-7 was seen over twenty steps. Positions
of a text at the pictures of GLM-4V move the first loss by 3e-4, and rows for columns by 2e-4.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from picture_curves import compare_family

pytestmark = pytest.mark.slow


# M-RoPE with features for several layers; pictures that see both ways; tiles, of a picture alone.
@pytest.mark.parametrize(
    ("family", "kind", "steps", "projector"),
    [
        ("qwen3_vl", "lora", 20, False),
        ("gemma3", "lora", 5, True),
        ("llava_onevision", "lora", 5, False),
        ("qwen3_vl", "none", 5, True),
    ],
)
def test_losses_and_weights_are_transformers_and_peft_s(
    family: str, kind: str, steps: int, projector: bool, tmp_path: Path
) -> None:
    result = compare_family(family, tmp_path, kind, steps, projector=projector)
    assert len(result["ours"]) == len(result["plain"]) == steps
    assert result["difference"]["first"] <= 1e-6
    assert result["difference"]["all"] <= 1e-5
    assert result["weights"] <= 1e-5
    # What the figures are worth: pictures count, and much is learnt.
    assert result["pictures"] > 1e-3
    assert result["plain"][-1] < result["plain"][0] - 0.1
