"""Fixtures that several tests share."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from namespace import Namespace, join
from tutorial import write_tutorial

# How long one example takes depends on what else the machine does; pytest-timeout ends what hangs.
# Each run tries other examples. A test that needs more or fewer than others takes a multiple of the profile's number.
hypothesis.settings.register_profile("nfq-agent", deadline=None, max_examples=30)
# pytest --hypothesis-profile=thorough; tests/run without an option does so.
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=100)
hypothesis.settings.load_profile("nfq-agent")


@pytest.fixture
def netns() -> Iterator[Namespace]:
    """A namespace of the test's own."""
    if os.geteuid() != 0:
        pytest.fail("the kernel tests make network namespaces: run them as root")
    with Namespace() as namespace:
        yield namespace


@pytest.fixture
def pair() -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces joined by a veth pair: 10.203.0.1 and fd00:203::1 in the first, .2 and ::2 in the second."""
    if os.geteuid() != 0:
        pytest.fail("the kernel tests make network namespaces: run them as root")
    with Namespace() as first, Namespace() as second:
        join(first, second)
        yield first, second


@pytest.fixture
def tutorial(tmp_path: Path) -> Path:
    """The folder of a reader who has followed the tutorial of docs/elements.md."""
    write_tutorial(tmp_path)
    return tmp_path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """On one core: the booted tests of a release, since they share what was built and installed, and the tests of the house,
    which parse the package once. All others anywhere."""
    # Not --dist loadgroup: pytest-xdist 3.8 marks groups in a way that pytest 9.2 does not see.
    from xdist.scheduler import LoadScopeScheduling  # noqa: PLC0415  # xdist is there only when it is used

    class ByRelease(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no annotations
        def _split_scope(self, nodeid: str) -> str:
            booted = re.fullmatch(r"tests/booted/.*\[(?:.*-)?(bookworm|trixie)(?:-.*)?\]", nodeid)
            if nodeid.startswith("tests/test_house.py::"):
                return "house"
            return booted[1] if booted else nodeid

    return ByRelease(config, log)
