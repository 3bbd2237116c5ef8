"""Comparison of Transformers' modules by their code instead of their names.

Model families copy each other's modules. In the decoders of Transformers 5.23, LlamaMLP occurs
under 77 names and LlamaRMSNorm under 78. Copies compile to the same bytecode, so that a faster
forward for one module can also replace its copies, including those of future releases. If a copy
changes, it is no longer recognized.
"""

import inspect
from collections.abc import Hashable
from types import FunctionType
from typing import TypeGuard

from torch import nn

STARS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


def forward_code(module_class: type[nn.Module]) -> Hashable | None:
    """Return a value that is equal for two classes whose `forward` runs the same code.

    The value contains the bytecode of `forward`, the names of its arguments and of the attributes
    that it reads, and the same for every function and method that it calls by name. Names of
    functions, classes and local variables are not part of it, and neither are the values that
    `__init__` assigns. A decorator with `__wrapped__` is represented by its bytecode and its
    strings and numbers. (Transformers 5.24 uses such a decorator to accept an old argument name for
    the cache.)

    Return None if the code cannot be compared, because it has another decorator or because
    `forward` is not written in Python.
    """
    forward = module_class.forward
    decorators = []
    while isinstance(forward, FunctionType) and hasattr(forward, "__wrapped__"):
        wrapped = forward.__wrapped__
        settings = []
        for cell in forward.__closure__ or ():
            value = cell.cell_contents
            if isinstance(value, str | int | None):
                settings.append(value)
            elif isinstance(value, FunctionType) and value is not wrapped:
                return None  # the decorator calls other functions
        decorators.append((forward.__code__.co_code, repr(settings)))
        forward = wrapped
    if not _is_plain(forward):
        return None
    return (*decorators, _function_code(forward, module_class, callers=()))


def _is_plain(value: object) -> TypeGuard[FunctionType]:
    """Return whether the value is a function without a closure.

    A closure's variables could differ between two functions with the same code.
    """
    return isinstance(value, FunctionType) and value.__closure__ is None


def _function_code(
    function: FunctionType, owner: type[nn.Module], callers: tuple[FunctionType, ...]
) -> Hashable:
    """Return the comparable code of a function.

    Args:
        owner: the class in which method names are looked up.
        callers: functions that are already being read, to stop at recursion.
    """
    code = function.__code__
    callers = (*callers, function)
    references = []
    for name in code.co_names:
        # One name may refer to two things: the attribute `self.scaling` and a global function
        # `scaling`.
        reference = []
        if name in function.__globals__:
            reference.append(_value_code(function.__globals__[name], owner, callers))
        method = inspect.getattr_static(owner, name, None)
        if method is not None and not hasattr(nn.Module, name):
            reference.append(_value_code(method, owner, callers))
        references.append(tuple(reference) or name)
    # Keep the order, because the bytecode refers to constants by index. Compare the `repr`, because
    # 1, 1.0 and True are equal in Python.
    constants = []
    for constant in code.co_consts:
        if constant == function.__doc__:
            constants.append("")
        else:
            constants.append(repr(constant))
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
    """Return the comparable code of `value` if it is a function.

    Any other value (a library, a table) is compared by identity.
    """
    if any(value is caller for caller in callers):
        return "caller"
    if _is_plain(value):
        return _function_code(value, owner, callers)
    return id(value)
