"""The help pages of all verbs are those of golden/help.txt."""

from __future__ import annotations

import sys

import golden
import pytest
from same_bits import text_apart

from warm import run_warm


@pytest.mark.slow
def test_help_pages_change_only_in_a_diff(tmp_path):
    if sys.version_info[:2] != (3, 11):
        pytest.skip("argparse of another Python lays pages out in another way")
    done = run_warm(["help"], program=golden.__file__)
    assert done.returncode == 0, done.stderr
    now = tmp_path / "help.txt"
    now.write_text(done.stdout, encoding="utf-8")
    difference = "\n".join(text_apart(golden.HELP, now))
    assert not difference, (
        f"where it is meant: python benchmarks/parity/same_bits.py help --write\n{difference}"
    )
