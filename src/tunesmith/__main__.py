"""`python -m tunesmith` is the command `tunesmith`."""

import signal


def run() -> None:
    """The program `tunesmith`; a ctrl-C while it is imported ends it without a traceback."""
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tunesmith.cli.main import run_process

    if is_usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run_process()


if __name__ == "__main__":
    run()
