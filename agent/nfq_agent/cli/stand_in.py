"""Modules of Python's library that others import and rarely use: loaded once something of them is used. Imports nothing large."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any


def load_when_used(name: str, *functions: str) -> None:
    """Put a module into place that becomes the one of that name once it is asked for what that has (PEP 562).

    functions: those that others import by their names (`from NAME import ...`): the module is loaded when one is called.
    LazyLoader of importlib does not do: `import` itself asks a module for an attribute (Python 3.11).
    """
    if name in sys.modules:
        return
    stand_in = types.ModuleType(name)

    def real() -> types.ModuleType:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
        found = importlib.import_module(name)
        vars(stand_in).update(vars(found))
        return found

    def load(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(f"module {name!r} has no attribute {attribute!r} yet")
        return getattr(real(), attribute)

    def calling(function: str) -> Any:
        return lambda *arguments, **options: getattr(real(), function)(*arguments, **options)

    vars(stand_in).update({"__getattr__": load, **{each: calling(each) for each in functions}})
    sys.modules[name] = stand_in
    package, _, own = name.rpartition(".")
    if package:
        setattr(importlib.import_module(package), own, stand_in)
