"""The real crew: real queues and processes pass the contract of the fake that the supervisor is tested with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from crew_contract import CONTRACT, World
from crew_world import RealWorld
from namespace import Namespace

from nfq_agent.host.users import User

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("promise", CONTRACT)
def test_the_real_crew(netns: Namespace, promise: Callable[[World], None]) -> None:
    def inside() -> None:
        world = RealWorld(User(65534, 65534))
        try:
            promise(world)
        finally:
            world.close()

    netns.call(inside)
