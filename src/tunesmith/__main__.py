"""Entry point of the command `tunesmith`, also as `python -m tunesmith`."""

import signal


def run() -> None:
    """Run the command `tunesmith`. A ctrl-C during the imports ends it without a traceback."""
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from tunesmith.cli.main import run_process

    if is_usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run_process()


if __name__ == "__main__":
    run()
