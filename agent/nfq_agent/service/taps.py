"""The worker of one `[tap.NAME]`: a socket for each interface, opened here and passed to its process."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterable
from typing import Final, Self

from nfq_agent.capture import handing
from nfq_agent.capture.following import Followed
from nfq_agent.capture.ring_size import LEAST, ring_size
from nfq_agent.capture.selection import classic_filter
from nfq_agent.capture.tap import TapSource
from nfq_agent.config.models import Config
from nfq_agent.counters import TAP_COUNTERS
from nfq_agent.element_chain import ElementChain
from nfq_agent.host import packet_socket
from nfq_agent.host.jail.calls import ProcessNeeds
from nfq_agent.host.own_process import OwnProcess
from nfq_agent.host.users import User
from nfq_agent.log import Log
from nfq_agent.service.element_log import ElementLog
from nfq_agent.service.flow_watch import FlowWatch
from nfq_agent.service.interface_worker import InterfaceWorker
from nfq_agent.service.packet_judge import WorkerSettings
from nfq_agent.service.packet_loop import WorkerLoop
from nfq_agent.service.worker import WorkerError
from nfq_agent.verdict import ACCEPT

# The Ethernet header and up to two tags precede a packet.
_LINK_HEADER: Final = 22
# Its sockets come later, and nothing is sent on them; what a ring has lost is asked of them (PACKET_STATISTICS of packet(7)).
_NEEDS: Final = ProcessNeeds(gets=((263, 6),), receives=True)


class TapWorker(InterfaceWorker):
    """The process of one tap. It reads what it is given and answers nothing, so that it needs no capability."""

    kind = "tap"
    columns = tuple(TAP_COUNTERS)
    copies = True
    capabilities: tuple[int, ...] = ()

    def __init__(self, name: str, config: Config, user: User, log: Log, close: Callable[[], Iterable[int]]) -> None:
        self.settings = config.tap[name]
        super().__init__(name, self.settings, config, user, log, close)
        self.snap = config.least_copied(self.settings) if self.settings.snap == "auto" else self.settings.snap
        self._filter = classic_filter(self.selection, self.snap + _LINK_HEADER)
        # Bytes of the ring of each interface, by its index.
        self._rings: dict[int, int] = {}

    def open(self) -> None:
        """Listen for interfaces. Raises WorkerError where no packet socket can be opened."""
        if (what := packet_socket.missing()) is not None:
            raise WorkerError(f"{self.title}: it needs {what}")
        super().open()

    def differs(self, other: Self) -> bool:
        """By settings, or by an element's class or options."""
        return (
            self.settings != other.settings
            or self.specs != other.specs
            or self.snap != other.snap
            or self.names != other.names
            or self.confinement != other.confinement
        )

    def start(self) -> None:
        """Fork, and pass all chosen interfaces to the worker."""
        self._rings.clear()
        super().start()

    def enter(self, followed: Followed) -> None:
        """Open a socket on the interface and pass it to the worker."""
        link = followed.link
        size = ring_size(self._rings.values()) if self.settings.ring == "auto" else self.settings.ring
        try:
            opened = packet_socket.open_tap(link.index, self._filter, size)
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.ENOBUFS) or self.settings.ring != "auto" or size == LEAST:
                raise
            # The host is short of memory now.
            size = LEAST
            opened = packet_socket.open_tap(link.index, self._filter, size)
        self._rings[link.index] = size
        with opened:
            self._tell(f"add {link.index} {followed.row} {link.mtu} {size}", [opened.fileno()])

    def left(self, followed: Followed) -> None:
        """Its ring goes with the socket, which the worker closes."""
        self._rings.pop(followed.link.index, None)

    def body(self, control: socket.socket) -> None:
        """Show packets to the elements until told to stop."""
        emit = self.prepare()
        tap = TapSource(self.selection, self.table)
        handed = handing.Handed(control, self.words(tap, "add", 1))
        log = ElementLog(emit, self.counters.suppress)
        elements = [spec.cls(spec.name, spec.options, log.of(spec)) for spec in self.specs]
        chain = ElementChain(elements, ACCEPT, monitor=True, context=self.lent)
        settings = WorkerSettings(number=-1, default=ACCEPT, on_error=ACCEPT, monitor=True, drop_lines=self.drop_lines)
        shut = self.confinement.with_needs(_NEEDS).close
        process, watch = OwnProcess(self.pulse.beat, shut), FlowWatch(self.ring, chain, {"tap": self.name})
        loop = WorkerLoop(
            tap, chain, settings, self.counters, handed, emit, process=process, by_flow=tap, watch=watch, moment=tap.moment
        )
        loop.run()
