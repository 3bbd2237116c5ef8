"""Commands of tunesmith in the process of the test, without a new interpreter."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from tunesmith.cli.main import main


@dataclass(frozen=True)
class Output:
    """What a command returned and printed."""

    code: int
    out: str
    err: str


def invoke(*words: object) -> Output:
    """Run `tunesmith WORDS` here; `warm.run_warm` is for what needs a process of its own."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    return Output(code, out.getvalue(), err.getvalue())
