"""A deadline for the code of model types, which run here on configs that may be absurd."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import (
    register_module_forward_pre_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from tunesmith.errors import ModelError


class _OutOfTimeError(BaseException):
    """No Exception: what models raise is caught as a fault of theirs."""


@contextmanager
def deadline(seconds: float, what: str, *, why: str) -> Iterator[None]:
    """ModelError where the body, which builds and runs modules, takes more than `seconds`.

    Seconds of this thread's processor count, so that a model is not abandoned where other programs
    hold the machine up. It ends with the next module that is built or run.

    Args:
        what: of the error: "the small model of this mixtral".
        why: what it is built and run for.
    """
    thread = threading.get_ident()
    end = time.thread_time() + seconds

    # The hooks are those of all modules, in all threads.
    def check(_module: nn.Module, *_args: object) -> None:
        if threading.get_ident() == thread and time.thread_time() > end:
            raise _OutOfTimeError

    hooks = [
        register_module_forward_pre_hook(check),
        register_module_module_registration_hook(check),
        register_module_parameter_registration_hook(check),
    ]
    try:
        yield
    except _OutOfTimeError as error:
        raise ModelError(
            f"{what} takes more than {seconds:.0f} s of a processor core",
            why=why,
            fix="take config.json from the model's page again: tunesmith fetch MODEL; if it is "
            "the same, train a model of fewer or smaller layers",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
