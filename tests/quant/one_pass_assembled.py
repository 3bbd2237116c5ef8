"""Run by test_one_pass.py: compiles the kernel for each chip, without one; of each: chip, rank, bytes of shared memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tunesmith.quant.one_pass import COLUMNS, ROWS, SPAN, gradient_kernel

ALIGNED = [["tt.divisibility", 16]]


def compiled(cache: Path) -> list[list[Any]]:
    os.environ["TRITON_CACHE_DIR"], lines = str(cache), []
    # Hopper and GB10, where the largest rank has the least room; each compile takes seconds.
    for chip, rank, padded in ((90, 8, 16), (121, 64, 64)):
        types = dict.fromkeys(("dy", "b", "xa"), "*bf16") | dict.fromkeys(("d_xa", "d_b"), "*fp32")
        fixed = {"RANK": rank, "PADDED_RANK": padded, "ROWS": ROWS, "COLUMNS": COLUMNS, "SPAN": SPAN}
        source = ASTSource(
            fn=gradient_kernel,
            signature=types | dict.fromkeys(("n", "m", "xa_step"), "i32") | dict.fromkeys(fixed, "constexpr"),
            constexprs=fixed,
            attrs={(i,): ALIGNED for i in (*range(5), 6)},  # every pointer, and m
        )
        made = triton.compile(source, target=GPUTarget("cuda", chip, 32), options={"num_warps": 4, "num_stages": 2})
        assert made.asm["cubin"]
        assert "ld.local" not in made.asm["ptx"]
        lines.append([chip, rank, made.metadata.shared])
    return lines
