"""What is in packaging/: programs, which have no suffix, as modules; the manifest for Kubernetes."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
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


def manifest(with_names: bool = False) -> str:
    """The manifest for Kubernetes. with_names: as it is after the command in its head, which switches the names of pods on."""
    text = (TOP / "packaging/kubernetes/nfq-agent.yaml").read_text()
    if not with_names:
        return text
    (before,) = re.findall(r"sed -i 's/\^\\\( \*\\\)(# names: )/\\1/' nfq-agent\.yaml$", text, re.MULTILINE)
    return re.sub(rf"^( *){before}", r"\1", text, flags=re.MULTILINE)
