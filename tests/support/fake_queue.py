"""The kernel's side of NFQUEUE in this process: real sockets, the agent's own channel and reader, and no rule and no root.

The same functions (queue_contract.py) run against the real kernel in tests/kernel/test_queue_contract.py.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable
from struct import Struct
from types import SimpleNamespace

import pytest
from queue_messages import message
from queued import NUMBER, PORT

from nfq_agent.checksum import is_wrong
from nfq_agent.host.attributes import attribute
from nfq_agent.host.nfqueue import channel
from nfq_agent.host.nfqueue.messages import MSG_CONFIG, MSG_VERDICT, MSG_VERDICT_BATCH, NLMSG_ERROR
from nfq_agent.packet import Packet, decode
from nfq_agent.testing import udp
from nfq_agent.verdict import Action

_BIND, _UNBIND = 1, 2
_COMMAND, _PARAMETERS, _MAX_LEN, _MASK, _FLAGS = range(1, 6)
_FAIL_OPEN = 1


class Bound:
    """One queue: its settings, and the packets that wait by number."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.max_len = 1024
        self.copy_range = 65535
        self.flags = 0
        self.latest = 0
        self.waiting: dict[int, tuple[bytes, int]] = {}


class FakeKernel:
    """Queues by number. refused: the errno that a setting is refused with, by its attribute."""

    def __init__(self) -> None:
        self.queues: dict[int, Bound] = {}
        self.refused: dict[int, int] = {}
        self.passed: list[bytes] = []
        self._ends: list[socket.socket] = []
        self._changed = threading.Condition(threading.RLock())
        self._over = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll = select.epoll()
        self._poll.register(self._over, select.EPOLLIN)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, and close the kernel's ends."""
        os.eventfd_write(self._over, 1)
        self._thread.join(60)
        for end in self._ends:
            end.close()
        self._poll.close()
        os.close(self._over)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let every channel of this process end here."""
        monkeypatch.setattr(channel, "netfilterqueue", SimpleNamespace(NetfilterQueue=lambda **given: _Library(self, **given)))
        # An option that a socket of this kind takes, too.
        monkeypatch.setattr(channel, "_SOL_NETLINK", socket.SOL_SOCKET)
        monkeypatch.setattr(channel, "_NETLINK_CAP_ACK", socket.SO_KEEPALIVE)

    def new_socket(self) -> tuple[socket.socket, socket.socket]:
        """The program's end of a new netlink socket, and the kernel's."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with self._changed:
            self._ends.append(ours)
            self._poll.register(ours, select.EPOLLIN)
        return theirs, ours

    def bind(self, number: int, end: socket.socket, max_len: int, copy_range: int) -> None:
        """Raises OSError where another socket has the queue."""
        with self._changed:
            if (there := self.queues.get(number)) is not None and there.end is not end:
                raise OSError("Failed to create queue")
            queue = self.queues[number] = Bound(end)
            queue.max_len, queue.copy_range = max_len, copy_range

    def unbind(self, number: int) -> None:
        """What waits is lost."""
        with self._changed:
            self.queues.pop(number, None)

    def send(self, payload: bytes, number: int = NUMBER, mark: int = 0) -> None:
        """A packet meets the rule of this queue."""
        with self._changed:
            queue = self.queues.get(number)
            if queue is None:
                return
            if len(queue.waiting) >= queue.max_len:
                if queue.flags & _FAIL_OPEN:
                    self._pass(payload)
                return
            queue.latest += 1
            queue.waiting[queue.latest] = payload, mark
            more = attribute(3, mark.to_bytes(4, "big")) if mark else b""
            if len(payload) > queue.copy_range:
                more += attribute(13, len(payload).to_bytes(4, "big"))
            queue.end.send(message(payload[: queue.copy_range], queue.latest, more=more))

    def _pass(self, payload: bytes) -> None:
        # A receiver discards what does not fit its checksum.
        if not is_wrong(Packet(payload)):
            self.passed.append(payload)
            self._changed.notify_all()

    def settled(self) -> None:
        """Return when everything that was sent to the kernel is processed."""
        deadline = time.monotonic() + 60
        while True:
            with self._changed:
                if not any(select.select([end], [], [], 0)[0] for end in self._ends):
                    return
            assert time.monotonic() < deadline, "the fake kernel does not read"
            time.sleep(0.001)

    def take(self, count: int) -> list[bytes]:
        """The next packets that passed; fails if they do not come."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.passed) >= count, 60), f"{len(self.passed)} of {count} came"
            taken, self.passed = self.passed[:count], self.passed[count:]
        return taken

    # The thread.

    def _serve(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == self._over:
                    return
                with self._changed:
                    end = next(each for each in self._ends if each.fileno() == descriptor)
                    try:
                        data = end.recv(1 << 18, socket.MSG_DONTWAIT)
                    except BlockingIOError:
                        continue
                    if not data:
                        self._forget(end)
                        continue
                    self._messages(end, data)

    def _forget(self, end: socket.socket) -> None:
        """The last descriptor of a program's end is closed: its queues go with it."""
        self.queues = {number: queue for number, queue in self.queues.items() if queue.end is not end}
        self._poll.unregister(end)
        self._ends.remove(end)
        end.close()

    def _messages(self, end: socket.socket, data: bytes) -> None:
        while data:
            length, kind, flags, sequence = Struct("=IHHI").unpack_from(data)
            number = int.from_bytes(data[18:20], "big")
            refused = self._request(end, kind, number, _attributes(data[20:length]))
            if flags & 4:
                end.send(Struct("=IHHIIi").pack(36, NLMSG_ERROR, 0, sequence, 0, -refused) + data[:16])
            data = data[(length + 3) & ~3 :]

    def _request(self, end: socket.socket, kind: int, number: int, found: dict[int, bytes]) -> int:
        queue = self.queues.get(number)
        if kind == MSG_CONFIG:
            return self._configure(end, queue, number, found)
        assert kind in (MSG_VERDICT, MSG_VERDICT_BATCH)
        code, identity = Struct("!II").unpack(found[2])
        if queue is None or queue.end is not end:
            return errno.EPERM
        up_to = [each for each in queue.waiting if ((identity - each) & 0xFFFFFFFF) < 1 << 31]
        chosen = up_to if kind == MSG_VERDICT_BATCH else [each for each in queue.waiting if each == identity]
        for each in chosen:
            payload, mark = queue.waiting.pop(each)
            self._verdict(code, found.get(10, payload), int.from_bytes(found[3], "big") if 3 in found else mark, number)
        return 0 if chosen else errno.ENOENT

    def _verdict(self, code: int, payload: bytes, mark: int, number: int) -> None:
        match Action(code & 0xFF):
            case Action.ACCEPT:
                self._pass(payload)
            case Action.REPEAT:
                self.send(payload, number, mark)
            case Action.QUEUE:
                self.send(payload, code >> 16, mark)

    def _configure(self, end: socket.socket, queue: Bound | None, number: int, found: dict[int, bytes]) -> int:
        if (refusal := next((self.refused[kind] for kind in found if kind in self.refused), 0)) != 0:
            return refusal
        if _COMMAND in found:
            command = found[_COMMAND][0]
            if queue is not None and queue.end is not end and command in (_BIND, _UNBIND):
                return errno.EPERM
            if command == _UNBIND:
                self.unbind(number)
            return 0
        assert queue is not None
        if _PARAMETERS in found:
            queue.copy_range = int.from_bytes(found[_PARAMETERS][:4], "big")
        if _MAX_LEN in found:
            queue.max_len = int.from_bytes(found[_MAX_LEN], "big")
        if _MASK in found:
            mask, flags = (int.from_bytes(found[kind], "big") for kind in (_MASK, _FLAGS))
            queue.flags = (queue.flags & ~mask) | flags
        return 0


class _Library:
    """NetfilterQueue: it opens, binds and owns the queue."""

    def __init__(self, kernel: FakeKernel, af: int = socket.AF_UNSPEC, sockfd: int = -1) -> None:  # its arguments
        self._kernel = kernel
        self._socket, self._end = kernel.new_socket()
        self._number: int | None = None
        # Not __del__: in a cycle of garbage the socket may be collected first, with a warning.
        weakref.finalize(self, self._socket.close)

    def get_fd(self) -> int:
        return self._socket.fileno()

    def bind(self, number: int, _callback: Callable[..., None], max_len: int, mode: int, range: int) -> None:
        self._kernel.bind(number, self._end, max_len, range)
        self._number = number

    def unbind(self) -> None:
        if self._number is not None:
            # The real kernel has taken the verdicts that were sent before: at once.
            self._kernel.settled()
            self._kernel.unbind(self._number)
            self._number = None


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while len(data) >= 4:
        length, kind = Struct("=HH").unpack_from(data)
        found[kind] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found


class FakeWire:
    """Datagrams through the queue NUMBER of a fake kernel; see queued.Wire."""

    def __init__(self, kernel: FakeKernel) -> None:
        self.kernel = kernel

    def send(self, *messages: bytes) -> None:
        for each in messages:
            self.kernel.send(udp("127.0.0.1:40000", f"127.0.0.1:{PORT}", each).payload)

    def arrived(self, count: int) -> list[bytes]:
        return [payload[decode(payload).data :] for payload in self.kernel.take(count)]

    def nothing_more(self) -> bool:
        self.kernel.settled()
        return not self.kernel.passed

    def waiting(self) -> int:
        self.kernel.settled()
        return len(self.kernel.queues[NUMBER].waiting)
