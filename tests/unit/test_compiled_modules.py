"""Compiled modules have nothing that only pickle and introspection would use: `cython-directives` in pyproject.toml."""

from __future__ import annotations

import importlib
import pickle
import types
from pathlib import Path

import pytest

import nfq_agent
from nfq_agent.flow_table import FlowTable
from nfq_agent.steps import Step

FOLDER = Path(nfq_agent.__file__).parent
NAMES = sorted(".".join(file.relative_to(FOLDER.parent).with_suffix("").parts) for file in FOLDER.rglob("*.pyx"))


@pytest.mark.parametrize("name", NAMES)
def test_a_module_is_built_by_the_directives(name: str) -> None:
    own = [value for value in vars(importlib.import_module(name)).values() if getattr(value, "__module__", None) == name]
    assert own
    for value in own:
        # A function of Cython's own kind has the attributes of one in Python.
        assert isinstance(value, type | types.BuiltinFunctionType)
        assert not hasattr(value, "__reduce_cython__")


@pytest.mark.parametrize("made", [FlowTable, Step])
def test_an_object_of_compiled_code_is_not_pickled(made: type) -> None:
    with pytest.raises(TypeError):
        pickle.dumps(made())
