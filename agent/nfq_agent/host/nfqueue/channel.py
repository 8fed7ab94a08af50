"""The kernel's packet queues, by way of NetfilterQueue and of the netlink messages that it can't send.

The only importer of netfilterqueue. It holds no policy: which verdict a packet gets is the caller's business. Message formats
are those of linux/netfilter/nfnetlink_queue.h and net/netfilter/nfnetlink_queue.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from struct import Struct
from typing import Any, Final

import netfilterqueue

from nfq_agent.host.nfqueue.inbox import Inbox
from nfq_agent.packet import Packet
from nfq_agent.verdict import ACCEPT, Verdict

# NetfilterQueue reads into 4,096 bytes and allows 80 for the attributes; with all of them it is 160, and a message that was cut
# is no packet any more. Up to here its C loop is safe.
C_RANGE: Final = 3840
# An attribute's length has 16 bits and counts its own header of 4 bytes.
MAX_PAYLOAD: Final = 65531

COPY_MODES: Final = {"meta": 1, "packet": 2}
FAMILIES: Final = {"unspec": socket.AF_UNSPEC, "inet": socket.AF_INET, "inet6": socket.AF_INET6}

_MSG_PACKET: Final = 3 << 8
_MSG_VERDICT: Final = 3 << 8 | 1
_MSG_CONFIG: Final = 3 << 8 | 2
_MSG_VERDICT_BATCH: Final = 3 << 8 | 3
_NLMSG_ERROR: Final = 2
_REQUEST: Final = 1
_REQUEST_ACK: Final = 5
_SOL_NETLINK: Final = 270
_NETLINK_CAP_ACK: Final = 10
_SO_RCVBUFFORCE: Final = 33
_SO_MEMINFO: Final = 55
_NETLINK_NETFILTER: Final = 12
# What one send may carry: netlink refuses more than the send buffer (net/netlink/af_netlink.c), which is 212,992 by default.
_SEND_LIMIT: Final = 131072
# Packets that one batch answers: the kernel finds them with the queue locked, and who sends waits that long.
_SLICE: Final = 256
# Room for the attributes of a message, in bytes; 160 when all are there.
_ATTRIBUTES: Final = 384
_ACK_TIMEOUT: Final = 2.0
_ACK_AGAIN: Final = 0.25

_HEADER: Final = Struct("=IHHIIBBH")
_ERROR: Final = Struct("=IHHIIi")
_ATTRIBUTE: Final = Struct("=HH")
_VERDICT_HEADER: Final = Struct("!II")
_SINGLE: Final = Struct("=IHHIIBB2sHH8s")
_U32: Final = Struct("!I")
_PACKET_HEADER: Final = Struct("!IHB")
_TIMESTAMP: Final = Struct("!QQ")
_TIMEVAL: Final = Struct("ll")

# enum nfqnl_attr_type
_A_PACKET_HDR, _A_VERDICT_HDR, _A_MARK, _A_TIMESTAMP, _A_INDEV, _A_OUTDEV, _A_PHYSINDEV, _A_PHYSOUTDEV = range(1, 9)
_A_HWADDR, _A_PAYLOAD, _A_CAP_LEN, _A_SKB_INFO, _A_UID, _A_GID = 9, 10, 13, 14, 16, 17
_SKB_GSO: Final = 2

# What verdicts are known by: hook, interfaces, protocol, addresses and ports.
FlowKey = bytes
# Neighbours with the same verdict: id of the last, how many, verdict.
Run = tuple[int, int, Verdict]


class Flag(IntFlag):
    """The switches of a queue (NFQA_CFG_FLAGS)."""

    FAIL_OPEN = 1
    CONNTRACK = 2
    GSO = 4
    UID_GID = 8
    SECCTX = 16


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """One line of /proc/net/netfilter/nfnetlink_queue.

    number: of the queue. portid: of the netlink socket that bound it. waiting: packets without a verdict. copy_mode: 0 none,
    1 meta, 2 packet. copy_range: bytes. dropped: because the queue was full. user_dropped: because the socket's buffer was.
    id_sequence: the number given to the latest packet. Source: seq_show() in net/netfilter/nfnetlink_queue.c.
    """

    number: int
    portid: int
    waiting: int
    copy_mode: int
    copy_range: int
    dropped: int
    user_dropped: int
    id_sequence: int


def statistics(process: int | str = "self") -> dict[int, QueueStatistics]:
    """What the kernel counts for every queue of the network namespace that `process` lives in, by queue number.

    Only root may read it (PermissionError otherwise). Empty where the kernel's module has not been loaded.
    """
    try:
        lines = Path(f"/proc/{process}/net/netfilter/nfnetlink_queue").read_text().splitlines()
    except FileNotFoundError:
        return {}
    return {int(line.split()[0]): QueueStatistics(*map(int, line.split()[:8])) for line in lines}


class _Call:
    """A callable whose target can be changed: NetfilterQueue takes its callback once, at bind. Costs no frame of its own."""

    # The type's own slot of this name is what a call finds.
    __slots__ = ("__call__",)


class _Full(Exception):
    """Raised through NetfilterQueue's loop to leave it: the budget of the turn is used up."""


class _Replay:
    """What `run_socket` reads from: messages that came in while an answer of the kernel was awaited."""

    def __init__(self, messages: deque[bytes]) -> None:
        self._messages = messages

    def recv(self, _: int) -> bytes:
        if not self._messages:
            raise BlockingIOError(errno.EAGAIN, "nothing left")
        return self._messages.popleft()


class Channel:
    """One netlink socket and the queue that is bound on it.

    The kernel's queue lives as long as any descriptor of the socket: a child process inherits both and may read and answer;
    only the process that bound the queue unbinds it. Methods raise OSError with the kernel's errno.
    """

    def __init__(self, given: socket.socket | None = None, family: int = socket.AF_UNSPEC) -> None:
        self._queue = netfilterqueue.NetfilterQueue(af=family, sockfd=-1 if given is None else given.fileno())
        self._call = _Call()
        self._socket = socket.socket(fileno=os.dup(self._queue.get_fd()))
        # Without it the kernel sends each refused message back whole.
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._send = self._socket.send
        self._sequence = 0
        self._pending: deque[bytes] = deque()
        self._spin = 0.0
        self._number = 0
        self._number_bytes = b"\0\0"
        self._buffer = bytearray(65536 + 4096)
        self._view = memoryview(self._buffer)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._range = 0
        self._messages: Inbox | None = None
        # What the turn has taken so far, for whoever has to mend an interrupted one.
        self.taken: list[Packet] = []

    def fileno(self) -> int:
        """The descriptor to wait on for packets."""
        return self._socket.fileno()

    @property
    def pending(self) -> int:
        """Messages that were read while an acknowledgement was awaited, and still have to be looked at."""
        return len(self._pending)

    def forget_pending(self) -> None:
        """Leave those messages to a child process that was forked with them."""
        self._pending.clear()

    def bind(self, number: int, family: int, copy_mode: int, copy_range: int, max_len: int) -> None:
        """Make the queue and have this socket own it. OSError EBUSY: somebody has it."""
        self._discard()
        with warnings.catch_warnings():
            # It warns when it doesn't get the receive buffer it asks for; `receive_buffer` says what there is.
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                call: Any = self._call
                self._queue.bind(number, call, max_len=max_len, mode=copy_mode, range=min(copy_range, C_RANGE))
            except OSError as error:
                raise OSError(self._why_refused(number, family), str(error)) from error
        self._number = number
        self._number_bytes = number.to_bytes(2, "big")

    def _why_refused(self, number: int, family: int) -> int:
        # NetfilterQueue keeps the errno to itself. A queue that another socket owns answers EPERM, as does a missing
        # capability, but a command that touches no queue tells the two apart.
        self._number_bytes = number.to_bytes(2, "big")
        if (refusal := self._refusal(_config_command(4, family))) != 0:
            return refusal
        refusal = self._refusal(_config_command(1, family))
        if refusal == 0:
            self._refusal(_config_command(2, family))
            return errno.EAGAIN
        return errno.EBUSY if refusal == errno.EPERM else refusal

    def _refusal(self, attributes: bytes) -> int:
        try:
            self.request(attributes)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def set_receive_buffer(self, size: int) -> int:
        """Ask for a receive buffer of `size` bytes, past the system's limit if allowed; returns what is in force."""
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        # The kernel doubles it for its own bookkeeping (socket(7)).
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2

    def set_copy(self, copy_mode: int, copy_range: int) -> None:
        """Set copy mode and range (bytes), acknowledged."""
        # Until the kernel has said yes, either may come.
        self._make_room(max(self._range, copy_range))
        self.request(_attribute(2, _U32.pack(copy_range) + bytes((copy_mode,))))
        self._make_room(copy_range)

    def _make_room(self, copy_range: int) -> None:
        if copy_range != self._range:
            self._range = copy_range
            self._messages = None

    def set_max_len(self, max_len: int) -> None:
        """Set how many packets may wait, acknowledged."""
        self.request(_attribute(3, _U32.pack(max_len)))

    def set_flag(self, flag: Flag, on: bool) -> None:
        """Set or clear one flag, acknowledged. OSError EOPNOTSUPP or EINVAL: this kernel doesn't have it."""
        self.request(_attribute(4, _U32.pack(flag)) + _attribute(5, _U32.pack(flag if on else 0)))

    def confirm(self) -> None:
        """Raise PermissionError unless this process may answer packets: the kernel asks for CAP_NET_ADMIN each time."""
        with contextlib.suppress(FileNotFoundError):
            # The numbers begin at 1: the kernel finds no such packet, if it looks for it at all.
            self.request(_attribute(_A_VERDICT_HDR, _VERDICT_HEADER.pack(1, 0)), _MSG_VERDICT)

    def request(self, attributes: bytes, kind: int = _MSG_CONFIG) -> None:
        """Send one message and wait for the kernel's word on it; packets that come in between are kept for the next turn."""
        self._sequence = (self._sequence + 1) & 0x7FFFFFFF
        length = _HEADER.size + len(attributes)
        number = int.from_bytes(self._number_bytes, "little")
        message = _HEADER.pack(length, kind, _REQUEST_ACK, self._sequence, 0, 0, 0, number) + attributes
        deadline = time.monotonic() + _ACK_TIMEOUT
        while time.monotonic() < deadline:
            self._send(message)
            # The acknowledgement itself is lost when the buffer is full: what is read makes room, and the request is
            # one that can be repeated.
            again = time.monotonic() + _ACK_AGAIN
            while (left := again - time.monotonic()) > 0:
                if not self._poll.poll(left * 1000):
                    break
                refused = self._acknowledged()
                if refused == 0:
                    return
                if refused is not None:
                    raise OSError(refused, os.strerror(refused))
        raise TimeoutError(errno.ETIMEDOUT, "the kernel did not acknowledge")

    def _acknowledged(self) -> int | None:
        """Read one message; the errno that answers our request, or None if it was something else."""
        try:
            size = self._socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            return None
        kind = int.from_bytes(self._buffer[4:6], "little")
        if kind == _NLMSG_ERROR and size >= _ERROR.size:
            sequence: int
            code: int
            _, _, _, sequence, _, code = _ERROR.unpack_from(self._buffer)
            if sequence == self._sequence:
                return -code
        elif kind == _MSG_PACKET:
            self._pending.append(bytes(self._view[:size]))
        return None

    # Reading. Each of these takes at most `budget` packets and returns when there are none left.

    def skim(self, budget: int) -> tuple[int, int, int]:
        """Take packets without looking at them: how many, the id of the first and of the last."""
        return self._inbox().skim(budget, self._pending)

    def skim_each(self, budget: int, verdict: Verdict, together: int) -> tuple[int, int, int]:
        """Wait for packets, and answer them as they come; return when none has come for a while (see `be_patient`).

        One that comes alone costs two system calls so, instead of four. verdict: a plain one, or with a mark. together: how
        many may be answered at once, which answers all that wait up to the last of them.
        """
        return self._inbox().skim_each(budget, self._pending, self._single(0, verdict), together, self._spin)

    def read(self, budget: int) -> list[Packet]:
        """Take packets by NetfilterQueue's C loop."""
        self.taken = batch = list[Packet]()
        append = batch.append

        def take(raw: Any) -> None:
            append(_from_c(raw))
            if len(batch) >= budget:
                raise _Full

        self._loop(take)
        return batch

    def sort(
        self,
        budget: int,
        known: dict[FlowKey, Verdict],
        decide: Callable[[Packet, FlowKey | None], Verdict],
        together: int = 0,
    ) -> tuple[int, int, list[Run]]:
        """Take packets and look their verdicts up by five-tuple, hook and interfaces.

        together: if it is not 0, wait and answer as `skim_each` does, accepted packets up to so many at once.

        One that is not in `known` is put to `decide`, with the key under which its verdict may be kept, or None where there
        is no such key. Returns how many packets, the id of the first, and the runs.
        """

        def ask(message: bytes, key: FlowKey | None) -> Verdict:
            packet = _from_bytes(message, memoryview(message), len(message))
            # The inbox has seen that it is one.
            assert packet is not None
            return decide(packet, key)

        if not together:
            return self._inbox().sort(budget, self._pending, known, ask)
        accept = self._single(0, ACCEPT)
        return self._inbox().sort_each(budget, self._pending, known, ask, accept, ACCEPT, self.answer, together, self._spin)

    def _inbox(self) -> Inbox:
        if self._messages is None:
            self._messages = Inbox(self._socket.fileno(), self._range + _ATTRIBUTES)
        return self._messages

    def be_patient(self, seconds: float, spin: float = 0.0) -> None:
        """How long the methods that wait wait for a packet, in seconds: asleep; or looking for it all the time, if `spin`."""
        self._spin = spin
        whole = int(seconds)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(whole, int((seconds - whole) * 1e6)))

    def _loop(self, take: Callable[[Any], None]) -> None:
        setattr(self._call, "__call__", take)  # noqa: B010  # mypy takes the slot for a method that can't be assigned
        try:
            if self._pending:
                self._queue.run_socket(_Replay(self._pending))  # type: ignore[arg-type]  # it only calls recv
            self._queue.run(block=False)
        except _Full:
            pass

    def read_whole(self, budget: int) -> list[Packet]:
        """Take packets of up to 64 KB, with the attributes that NetfilterQueue does not show."""
        self.taken = batch = list[Packet]()
        while self._pending and len(batch) < budget:
            message = self._pending.popleft()
            self._buffer[: len(message)] = message
            if (packet := _from_bytes(self._buffer, self._view, len(message))) is not None:
                batch.append(packet)
        receive = self._socket.recv_into
        buffer, view = self._buffer, self._view
        while len(batch) < budget:
            try:
                size = receive(buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                # A packet did not fit into the buffer. The others did.
                if error.errno != errno.ENOBUFS:
                    raise
                continue
            packet = _from_bytes(buffer, view, size)
            if packet is not None:
                batch.append(packet)
        return batch

    def drops(self) -> int:
        """Messages that did not fit into the receive buffer since the socket was made (SO_MEMINFO, linux/sock_diag.h)."""
        data = self._socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36)
        return int.from_bytes(data[32:36], "little")

    # Answering.

    def answer(self, identity: int, verdict: Verdict) -> None:
        """Send one packet's verdict."""
        self._send(self._single(identity, verdict))

    def answer_up_to(self, identity: int, verdict: Verdict) -> None:
        """Send one verdict for every packet up to `identity` that still waits."""
        self._send(self._batch(identity, verdict))

    def answer_each(self, answers: Iterable[tuple[int, Verdict]]) -> None:
        """Send many verdicts, each in a message of its own, in as few system calls as they fit into."""
        self._send_all([self._single(identity, verdict) for identity, verdict in answers])

    def answer_runs(self, runs: Iterable[Run]) -> None:
        """Send the verdicts of runs of neighbours. None that is older may still wait."""
        messages: list[bytes] = []
        for last, count, verdict in runs:
            messages += [self._batch(part, verdict) for part in _slices(last, count)]
            messages.append(self._single(last, verdict) if count == 1 else self._batch(last, verdict))
        self._send_all(messages)

    def _send_all(self, messages: list[bytes]) -> None:
        data = b"".join(messages)
        if len(data) <= _SEND_LIMIT:
            if data:
                self._send(data)
            return
        part: list[bytes] = []
        size = 0
        for message in messages:
            if part and size + len(message) > _SEND_LIMIT:
                self._send(b"".join(part))
                part, size = [], 0
            part.append(message)
            size += len(message)
        self._send(b"".join(part))

    def _single(self, identity: int, verdict: Verdict) -> bytes:
        body = _VERDICT_HEADER.pack(verdict.code, identity)
        if verdict.mark is None and verdict.payload is None:
            return _SINGLE.pack(32, _MSG_VERDICT, _REQUEST, 0, 0, 0, 0, self._number_bytes, 12, _A_VERDICT_HDR, body)
        attributes = b""
        if verdict.mark is not None:
            attributes = _attribute(_A_MARK, _U32.pack(verdict.mark))
        if verdict.payload is not None:
            attributes += _attribute(_A_PAYLOAD, verdict.payload)
        length = 32 + len(attributes)
        return _SINGLE.pack(length, _MSG_VERDICT, _REQUEST, 0, 0, 0, 0, self._number_bytes, 12, _A_VERDICT_HDR, body) + attributes

    def _batch(self, identity: int, verdict: Verdict) -> bytes:
        body = _VERDICT_HEADER.pack(verdict.code, identity)
        number = self._number_bytes
        if verdict.mark is None:
            return _SINGLE.pack(32, _MSG_VERDICT_BATCH, _REQUEST, 0, 0, 0, 0, number, 12, _A_VERDICT_HDR, body)
        mark = _attribute(_A_MARK, _U32.pack(verdict.mark))
        return _SINGLE.pack(40, _MSG_VERDICT_BATCH, _REQUEST, 0, 0, 0, 0, number, 12, _A_VERDICT_HDR, body) + mark

    # Ending.

    def unbind(self) -> None:
        """Take the queue away from the kernel. Packets that still wait die."""
        self._discard()
        self._queue.unbind()

    def _discard(self) -> None:
        # NetfilterQueue takes the first error that it finds in the socket for the answer to its own request.
        self.read_whole(1 << 30)

    def close(self) -> None:
        """Close the descriptors; the queue goes with the last of them."""
        self._view.release()
        self._socket.close()
        del self._queue

    def keep(self) -> None:
        """In a child process: let nothing that happens to this object unbind the queue, which is the parent's."""
        # NetfilterQueue unbinds when it is collected; an object with one reference too many never is.
        with contextlib.suppress(AttributeError):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._queue))


def _slices(last: int, count: int) -> list[int]:
    """Up to which numbers batches are sent before the one up to `last`, for some `_SLICE` packets each. Numbers have 32 bits, and
    gaps where a packet did not fit into the socket."""
    return [part & 0xFFFFFFFF for part in range(last - count + _SLICE, last, _SLICE)]


def _attribute(kind: int, data: bytes) -> bytes:
    length = 4 + len(data)
    return _ATTRIBUTE.pack(length, kind) + data + b"\0" * (-length & 3)


def _config_command(command: int, family: int) -> bytes:
    # 1 bind, 2 unbind, 4 unbind a protocol family: the last has been without effect since Linux 3.8.
    return _attribute(1, bytes((command, 0)) + family.to_bytes(2, "big"))


def _from_c(raw: Any) -> Packet:
    """A packet from NetfilterQueue's. What few read is left until it is asked for."""
    packet = Packet.__new__(Packet)
    packet.id = raw.id
    packet.hook = raw.hook
    packet.mark = raw.mark
    packet._headers = None
    packet._queue = None
    try:
        packet.payload = raw.get_payload()
    except RuntimeError:
        # Copy mode meta.
        packet.payload = b""
    packet._raw = raw
    packet._fill = _fill_from_c
    return packet


def _fill_from_c(packet: Packet) -> None:
    raw = packet._raw
    packet.indev = raw.indev
    packet.outdev = raw.outdev
    packet.physindev = raw.physindev
    packet.physoutdev = raw.physoutdev
    packet.hw_protocol = raw.hw_protocol
    address = raw.get_hw()
    # It gives the kernel's field of 8 bytes whole; Ethernet fills 6.
    packet.hw_address = None if address is None else address[:6]
    # Most packets of this host's own are not stamped.
    packet.time = raw.get_timestamp() or time.time()
    packet.uid = packet.gid = packet.gso = None
    packet.length = _stated_length(packet.payload)


def _stated_length(payload: bytes) -> int:
    """The length that the IP header states, where it is more than what is there."""
    stated = 0
    if len(payload) >= 20:
        if payload[0] >> 4 == 4:
            stated = int.from_bytes(payload[2:4], "big")
        elif payload[0] >> 4 == 6 and len(payload) >= 40:
            stated = 40 + int.from_bytes(payload[4:6], "big")
    return max(stated, len(payload))


def _attributes(data: bytes | bytearray, offset: int, end: int) -> dict[int, tuple[int, int]]:
    """Where each attribute's data begins and ends, by its number."""
    found: dict[int, tuple[int, int]] = {}
    unpack = _ATTRIBUTE.unpack_from
    while offset + 4 <= end:
        length, kind = unpack(data, offset)
        if length < 4 or offset + length > end:
            break
        found[kind & 0x3FFF] = offset + 4, offset + length
        offset += (length + 3) & ~3
    return found


def _from_bytes(data: bytes | bytearray, view: memoryview, size: int) -> Packet | None:
    """A packet from a netlink message; None if the message is none."""
    if size < 32 or data[4] | data[5] << 8 != _MSG_PACKET:
        return None
    found = _attributes(data, _HEADER.size, size)
    place = found.get(_A_PACKET_HDR)
    if place is None:
        return None
    packet = Packet.__new__(Packet)
    packet.id, packet.hw_protocol, packet.hook = _PACKET_HEADER.unpack_from(data, place[0])
    packet._headers = None
    packet._queue = None
    place = found.get(_A_PAYLOAD)
    if place is None:
        packet.payload = b""
        packet._raw = bytes(view[:size])
    else:
        packet.payload = bytes(view[place[0] : place[1]])
        packet._raw = bytes(view[: place[0] - 4])
    place = found.get(_A_CAP_LEN)
    packet.length = len(packet.payload) if place is None else _U32.unpack_from(data, place[0])[0]
    place = found.get(_A_SKB_INFO)
    packet.gso = place is not None and bool(_U32.unpack_from(data, place[0])[0] & _SKB_GSO)
    place = found.get(_A_MARK)
    packet.mark = 0 if place is None else _U32.unpack_from(data, place[0])[0]
    packet._fill = _fill_from_bytes
    return packet


def _fill_from_bytes(packet: Packet) -> None:
    data = packet._raw
    found = _attributes(data, _HEADER.size, len(data))

    def number(kind: int) -> int | None:
        place = found.get(kind)
        return None if place is None else int.from_bytes(data[place[0] : place[1]], "big")

    packet.indev = number(_A_INDEV) or 0
    packet.outdev = number(_A_OUTDEV) or 0
    packet.physindev = number(_A_PHYSINDEV) or 0
    packet.physoutdev = number(_A_PHYSOUTDEV) or 0
    packet.uid = number(_A_UID)
    packet.gid = number(_A_GID)
    packet.hw_address = None
    if (place := found.get(_A_HWADDR)) is not None:
        length = int.from_bytes(data[place[0] : place[0] + 2], "big")
        packet.hw_address = bytes(data[place[0] + 4 : place[0] + 4 + min(length, 8)])
    if (place := found.get(_A_TIMESTAMP)) is None:
        packet.time = time.time()
    else:
        seconds, microseconds = _TIMESTAMP.unpack_from(data, place[0])
        packet.time = seconds + microseconds / 1e6


def open_socket() -> socket.socket:
    """A netlink socket as a queue needs it; made in one network namespace it serves the queues there from any other."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
