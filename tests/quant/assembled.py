"""Run by test_triton_matmul.py: compiles the kernel for each chip, without one. What came of it for each, as
a list: compute capability, dtype, instructions of the matmul in the PTX, bytes of shared memory.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tunesmith.quant.triton_matmul import GROUP, LEAST_RANK, TILES, scaled_kernel

MATMUL = r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*?\.(s8\.s8|e4m3\.e4m3|kind::i8|kind::f8f6f4)"
ALIGNED = [["tt.divisibility", 16]]
# Hopper, data-center Blackwell and GB10; consumer Blackwell, 120, has GB10's instructions. Each compile takes seconds.
CHIPS = {90: ("i8", "fp8e4nv"), 100: ("fp8e4nv",), 121: ("i8",)}


def compiled(cache: Path) -> list[list[Any]]:
    os.environ["TRITON_CACHE_DIR"], lines = str(cache), []
    rows, columns, depth, stages, warps = TILES[0]
    for chip, dtypes in CHIPS.items():
        for dtype in dtypes:
            types = dict.fromkeys(("a", "b"), f"*{dtype}") | dict.fromkeys(("a_scale", "b_scale"), "*fp32")
            types |= dict.fromkeys(("xa", "update", "y"), "*bf16")
            numbers = ("n", "m", "k", "b_row", "a_step", "b_step", "xa_step", "update_step", "update_rank_step")
            fixed = {"INT8": dtype == "i8", "RANK": 8, "PADDED_RANK": LEAST_RANK, "ADD": True, "GROUP": GROUP}
            fixed |= {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth}
            source = ASTSource(
                fn=scaled_kernel.fn,
                signature=types | dict.fromkeys(numbers, "i32") | dict.fromkeys(fixed, "constexpr"),
                constexprs=fixed,
                attrs={(i,): ALIGNED for i in (*range(7), 8, 9, 10)},  # every pointer, m, k and b_row
            )
            made = triton.compile(
                source, target=GPUTarget("cuda", chip, 32), options={"num_warps": warps, "num_stages": stages}
            )
            found = re.search(MATMUL, made.asm["ptx"])
            assert made.asm["cubin"]
            lines.append([chip, dtype, found[1] if found else "none", made.metadata.shared])
    return lines
