"""Programs of packaging/, which have no suffix, as modules."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path
from types import ModuleType

TOP = Path(__file__).resolve().parent.parent.parent


def program(name: str) -> ModuleType:
    """A program of packaging/, as a module."""
    loader = importlib.machinery.SourceFileLoader(name, str(TOP / "packaging" / name))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
