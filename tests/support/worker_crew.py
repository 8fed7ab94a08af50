"""A bound queue and, one after the other, the workers that serve it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from namespace import UNPRIVILEGED
from queued import NUMBER

from nfq_agent import ACCEPT, DROP, RETAIN, Needs, Packet, PacketElement, Verdict
from nfq_agent.counters import Counters
from nfq_agent.element_chain import ElementChain
from nfq_agent.flow import Flow
from nfq_agent.host.users import CAP_NET_ADMIN, User, become
from nfq_agent.queue.turns import WorkerQueue
from nfq_agent.service.order import Order
from nfq_agent.service.packet_judge import WorkerSettings
from nfq_agent.service.packet_loop import WorkerLoop
from nfq_agent.verdict import Action


class Crew:
    """A bound queue and, one after the other, the workers that serve it; the test is the supervisor."""

    def __init__(self, *elements: type[PacketElement], default: Verdict = ACCEPT, **options: Any) -> None:
        self.elements: Sequence[type[PacketElement]] = elements
        self.default = default
        self.on_error = options.pop("on_error", ACCEPT)
        self.monitor = options.pop("monitor", False)
        self.keep = options.pop("keep", (CAP_NET_ADMIN,))
        self.busy_poll = options.pop("busy_poll", 0.0)
        self.queue = WorkerQueue(NUMBER, on_unanswered=self.on_error, **{"copy_range": 128, **options}).open().bind()
        self.counters = Counters()
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK)
        self.pid = 0
        # Seconds of the processor that the last worker used, once it has ended.
        self.used = 0.0

    def start(self, lost_below: int | None = None) -> None:
        """Fork the next and wait until it serves."""
        self.control, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self.control.close()
            code = 1
            try:
                become(User(UNPRIVILEGED, UNPRIVILEGED), self.keep)
                chain = ElementChain([element(element.__name__, None, self.emit) for element in self.elements], self.default)
                settings = WorkerSettings(
                    NUMBER,
                    self.default,
                    self.on_error,
                    self.monitor,
                    busy_poll=self.busy_poll,
                    lost=Order(lost_below, False),
                    drop_lines=frozenset(),
                )
                WorkerLoop(self.queue, chain, settings, self.counters, theirs, self.emit).run()
                code = 0
            except BaseException as error:
                self.emit(repr(error))
            os._exit(code)
        theirs.close()
        self.queue.leave_to_child()
        self.control.settimeout(60)
        self.ready = self.control.recv(100)

    def emit(self, message: str, level: str = "info", **fields: Any) -> None:
        os.write(self.writer, message.encode() + b"\n")

    @property
    def lines(self) -> list[str]:
        """What was said since it was last asked."""
        try:
            return os.read(self.reader, 1 << 16).decode().splitlines()
        except BlockingIOError:
            return []

    def stop(self) -> int:
        """Tell it to stop; its exit code."""
        with contextlib.suppress(BrokenPipeError):
            self.control.send(b"stop\n")
        return self.wait()

    def wait(self) -> int:
        _, status, usage = os.wait4(self.pid, 0)
        self.used = usage.ru_utime + usage.ru_stime
        self.control.close()
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> int:
        """Kill it; the kernel's id sequence after that."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL
        return self.queue.statistics().id_sequence

    def end(self) -> None:
        self.queue.close()
        os.close(self.reader)
        os.close(self.writer)


@contextmanager
def crew(*elements: type[PacketElement], **options: Any) -> Iterator[Crew]:
    """A crew whose worker serves and is stopped at the end."""
    made = Crew(*elements, **options)
    made.start()
    assert made.ready == b"ready\n"
    try:
        yield made
        assert made.stop() == 0
    finally:
        made.end()


class ByText(PacketElement):
    """What the datagram says."""

    needs = Needs.PAYLOAD

    def decide(self, packet: Packet, flow: Flow | None) -> Verdict | None:
        if packet.data.startswith(b"drop"):
            return DROP
        if packet.data.startswith(b"raise"):
            raise LookupError("on purpose")
        if packet.data.startswith(b"nonsense"):
            return "accept"  # type: ignore[return-value]  # that is the mistake
        if packet.data.startswith(b"retain"):
            return RETAIN
        if packet.data.startswith(b"mark"):
            return Verdict(Action.ACCEPT, mark=9)
        return None


def counted(counters: Counters, **wanted: int) -> bool:
    snapshot = counters.snapshot()
    return all(snapshot[name] == value for name, value in wanted.items())
