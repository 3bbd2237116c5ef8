"""`python -m tunesmith` is the command `tunesmith`."""

from tunesmith.cli.main import run_process

run_process()
