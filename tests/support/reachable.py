"""The checkout at a place that every user can reach, for programs that are not root's."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from namespace import ROOT, Namespace

# The checkout may stand in a folder that only its owner may enter.
_PLACES = {str(ROOT / "agent"): "/run/agent", str(ROOT / "tests"): "/run/tests", sys.prefix: "/run/venv"}


def reachable(netns: Namespace) -> None:
    """Mount the package, the tests and the Python environment there, for this namespace alone."""
    for there, here in _PLACES.items():
        netns.shell(f"mkdir -p {here}; mount --bind {there} {here}")


def seen(path: str) -> str:
    """What a path of the checkout is called there. A path without an equivalent stays as it is."""
    for there, here in _PLACES.items():
        path = path.replace(there, here)
    return path


def python(*words: str) -> Sequence[str]:
    """The argv that runs Python there with the same modules as here."""
    return ("env", f"PYTHONPATH={':'.join(seen(each) for each in sys.path if each)}", seen(sys.executable), *words)
