"""The contract of a queue on the real kernel; tests/unit/test_queue_contract.py runs it on the fake one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from namespace import Namespace
from queue_contract import CONTRACT
from queue_program import AnyWire
from queued import Wire, queue_rule

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("promise", CONTRACT)
def test_the_real_kernel(netns: Namespace, promise: Callable[[AnyWire], None]) -> None:
    queue_rule(netns)
    netns.call(lambda: promise(Wire()))
