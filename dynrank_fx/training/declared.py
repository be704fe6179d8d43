"""A value as it was declared: the same words in every process, which an address in memory is not."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType, MethodType


def said(value: object) -> str:
    """The ``repr`` of a frozen value and of what it is made of, where functions are told by their qualified names, and
    other objects without a ``repr`` of their own by their class.
    """
    if isinstance(value, FunctionType):
        return f"<function {value.__qualname__}>"
    if isinstance(value, MethodType):
        return f"<bound method {value.__func__.__qualname__} of {said(value.__self__)}>"
    if isinstance(value, partial):
        arguments = [*map(said, (value.func, *value.args)), *(f"{k}={said(v)}" for k, v in value.keywords.items())]
        return f"functools.partial({', '.join(arguments)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(said, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(said, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{said(k)}: {said(v)}' for k, v in value.items())}}}"
    if is_dataclass(value) and not isinstance(value, type):
        parts = [f"{each.name}={said(getattr(value, each.name))}" for each in fields(value) if each.repr]
        return f"{type(value).__qualname__}({', '.join(parts)})"
    if type(value).__repr__ is object.__repr__:
        return f"<{type(value).__module__}.{type(value).__qualname__} object>"
    return repr(value)
