"""A comparison of modules of Transformers: by their code, not by a list of names.

Families copy each other's modules: in the decoders of Transformers 5.23 LlamaMLP occurs under 77
names, and LlamaRMSNorm under 78. What is copied compiles to the same bytecode, so that a module
with a faster forward serves its copies too, in releases to come as well; a copy that changes is
none any more.
"""

import inspect
from collections.abc import Hashable
from types import FunctionType
from typing import TypeGuard

from torch import nn

STARS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


def forward_code(module_class: type[nn.Module]) -> Hashable | None:
    """Read what the class's `forward` does, names of functions, classes and local variables apart.

    Two classes run the same code where these are equal: the bytecode of `forward`, the names of its
    arguments and of the attributes that it reads, and the same of every function and method it
    calls by name. What `__init__` puts into the attributes is left to the module.

    A decorator that names what it wraps (Transformers 5.24 lets attentions take the cache by its
    old name) counts by its own bytecode and the texts and numbers that it was given.

    None where that cannot be read: another decorator, or a forward not written in Python.
    """
    forward = module_class.forward
    decorators: list[Hashable] = []
    while isinstance(forward, FunctionType) and hasattr(forward, "__wrapped__"):
        arguments = [cell.cell_contents for cell in forward.__closure__ or ()]
        if any(isinstance(v, FunctionType) and v is not forward.__wrapped__ for v in arguments):
            return None  # what it calls beside the forward would have to be read too
        settings = [value for value in arguments if isinstance(value, str | int | None)]
        decorators.append((forward.__code__.co_code, repr(settings)))
        forward = forward.__wrapped__
    if not _is_plain(forward):
        return None
    return (*decorators, _function_code(forward, module_class, callers=()))


def _is_plain(value: object) -> TypeGuard[FunctionType]:
    """Tell whether this is a function whose bytecode says all: what a closure holds may differ."""
    return isinstance(value, FunctionType) and value.__closure__ is None


def _function_code(
    function: FunctionType, owner: type[nn.Module], callers: tuple[FunctionType, ...]
) -> Hashable:
    """`owner` is the class whose methods are meant; `callers` are read already."""
    code = function.__code__
    callers = (*callers, function)
    references = []
    for name in code.co_names:
        # A name may be both: `self.scaling` and a function `scaling`.
        reference: list[Hashable] = []
        if name in function.__globals__:
            reference.append(_value_code(function.__globals__[name], owner, callers))
        method = inspect.getattr_static(owner, name, None)
        if method is not None and not hasattr(nn.Module, name):
            reference.append(_value_code(method, owner, callers))
        references.append(tuple(reference) or name)
    # Places count, as the bytecode refers to them; 1, 1.0 and True are equal, their texts are not.
    constants = []
    for constant in code.co_consts:
        constants.append("" if constant == function.__doc__ else repr(constant))
    count = code.co_argcount + code.co_kwonlyargcount
    return (
        code.co_code,
        code.co_varnames[:count],
        (code.co_argcount, code.co_posonlyargcount, code.co_flags & STARS),
        repr((function.__defaults__, function.__kwdefaults__)),
        tuple(constants),
        tuple(references),
    )


def _value_code(
    value: object, owner: type[nn.Module], callers: tuple[FunctionType, ...]
) -> Hashable:
    """The code of a function; anything else (a library, a table of functions) is itself alone."""
    if any(value is caller for caller in callers):
        return "caller"
    if _is_plain(value):
        return _function_code(value, owner, callers)
    return id(value)
