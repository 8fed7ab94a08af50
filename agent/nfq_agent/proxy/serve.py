"""The processes of one proxy: the first one starts the others, and each runs a loop of its own on the same listeners."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Final

from nfq_agent.counters import PROXY_COUNTERS, Slots
from nfq_agent.element import Emit
from nfq_agent.host.child import STOP
from nfq_agent.host.own_process import OwnProcess
from nfq_agent.proxy.loop import Proxy
from nfq_agent.proxy.processes import Sibling
from nfq_agent.proxy.settings import ProxySettings
from nfq_agent.stream import StreamChain

# How long the start waits for the other processes, and how long they may take to end after this one.
_READY: Final = 8.0
_TOGETHER: Final = 1.0


def serve(
    listeners: list[socket.socket],
    chain_of: Callable[[], StreamChain],
    settings: ProxySettings,
    counters: Slots,
    control: socket.socket,
    emit: Emit,
    process: OwnProcess = OwnProcess(),  # noqa: B008  # frozen
) -> None:
    """Run a proxy until it is told to end. It says `ready` on `control` when it accepts.

    process: each process beats, and confines itself. `drain` on `control`: accept nothing new, close the listeners, let what
    runs end for `settings.drain` seconds, then reset the rest, and return; `leave`: the same without a limit in time. `stop`:
    reset everything and return. The end of `control` is `drain` with `settings.lingers`, else `stop`.
    """
    siblings: list[Sibling] = []

    def alone(control: socket.socket, counters: Slots) -> None:
        chain = chain_of()
        chain.start()
        proxy = Proxy(listeners, chain, settings, counters, control, emit, siblings, process)
        try:
            proxy.run()
        finally:
            proxy.close()
            chain.stop()

    def sibling(control: socket.socket, counters: Slots) -> None:
        siblings.clear()
        alone(control, counters)

    try:
        for _ in range(settings.processes - 1):
            siblings.append(Sibling(sibling, tuple(PROXY_COUNTERS), [control, *(each.control for each in siblings)]))
        for each in siblings:
            each.wait_ready(_READY)
        alone(control, counters)
    except BaseException:
        for each in siblings:
            each.tell(STOP)
        raise
    finally:
        # They got the same control word as this process, and the same time for it.
        deadline = time.monotonic() + _TOGETHER
        for each in siblings:
            each.end(deadline)
