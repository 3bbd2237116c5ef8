"""Bases that ship in FP8 and NVFP4, on several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_data_parallel import LORA, assert_those_of_one_process

from shipped_bases import write_fp8, write_nvfp4
from tunesmith.config.schema import Model
from tunesmith.formats.form import ROW

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("form", ["fp8", "fp8 of compressed-tensors", "nvfp4"])
def test_numbers_are_those_of_one_process(form: str, tiny: Path, tmp_path: Path) -> None:
    """Shards of codes, whose rows are no whole blocks; a tensor group reads its parts of dense
    weights.
    """
    assert Model(name="x").quantize == "auto"
    base = tmp_path / "base"
    if form == "nvfp4":
        write_nvfp4(tiny, base)
    elif form == "fp8":
        write_fp8(tiny, base, (48, 40))
    else:
        write_fp8(tiny, base, ROW, tool="compressed-tensors")
    cases = {"as shipped, shards": (LORA, {"shard": 2})}
    if form != "fp8 of compressed-tensors":  # whose dense weights are read as those of fp8
        cases["dense, tensor"] = ({"model": {"quantize": "none"}}, {"tensor": 2})
    assert_those_of_one_process(2, cases, base, tmp_path)
