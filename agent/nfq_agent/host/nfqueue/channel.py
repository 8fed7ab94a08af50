"""The socket of a packet queue: NetfilterQueue opens, binds and owns the queue, the compiled inbox reads every packet of it.

The only importer of netfilterqueue. It holds no policy: its caller decides which verdict a packet gets.
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
from struct import Struct
from typing import Final

import netfilterqueue

from nfq_agent.answering import Answering
from nfq_agent.host.nfqueue import messages
from nfq_agent.host.nfqueue.flow_inbox import FlowInbox
from nfq_agent.host.nfqueue.inbox import rare_fields
from nfq_agent.host.nfqueue.messages import Flag, FlowKey, FlowTurn, Run, VerdictMessages
from nfq_agent.host.nfqueue.outbox import Cutter, Outbox
from nfq_agent.packet import Packet
from nfq_agent.verdict import ACCEPT, Verdict

# The largest range that NetfilterQueue accepts at bind; `set_copy` sets the one that is wanted after that.
_BIND_RANGE: Final = 3840
_SOL_NETLINK: Final = 270
_NETLINK_CAP_ACK: Final = 10
_SO_RCVBUFFORCE: Final = 33
_SO_MEMINFO: Final = 55
_NETLINK_NETFILTER: Final = 12
_ACK_TIMEOUT: Final = 2.0
_ACK_AGAIN: Final = 0.25
_TIMEVAL: Final = Struct("ll")


class Channel:
    """One netlink socket and the queue that is bound on it.

    The kernel's queue lives as long as any descriptor of the socket: a child process inherits both and may read and answer;
    only the process that bound the queue unbinds it. Methods raise OSError with the kernel's errno.
    """

    def __init__(
        self, given: socket.socket | None = None, family: int = socket.AF_UNSPEC, bound: tuple[int, int] | None = None
    ) -> None:
        """bound: descriptor and number of a queue that another process has bound; this object takes the descriptor over."""
        self._queue: netfilterqueue.NetfilterQueue | None = None
        if bound is None:
            self._queue = netfilterqueue.NetfilterQueue(af=family, sockfd=-1 if given is None else given.fileno())
            # Otherwise it would stay open in every program that this process runs, and in this one when it starts again.
            os.set_inheritable(self._queue.get_fd(), False)
            self._socket = socket.socket(fileno=os.dup(self._queue.get_fd()))
        else:
            self._socket = socket.socket(fileno=bound[0])
        # Without it the kernel returns each refused message whole.
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._send: Callable[[bytes], object] = self._socket.send
        # The socket may hold acknowledgements for an earlier process.
        self._sequence = 0 if bound is None else time.monotonic_ns() & 0x7FFFFFFF
        self._pending: deque[bytes] = deque()
        self._spin = 0.0
        # Verdicts go out in fixed shapes.
        self._fixed = False
        self._number = 0
        self._verdicts = VerdictMessages(0)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._inbox = FlowInbox(self._socket.fileno(), messages.LONGEST_MESSAGE, make_packet)
        if bound is not None:
            self._use_number(bound[1])
        self.passed_over = 0
        """The number of the latest packet that NetfilterQueue took out of the socket while it bound the queue; 0 for none."""

    def fileno(self) -> int:
        """The descriptor to wait on for packets."""
        return self._socket.fileno()

    @property
    def descriptors(self) -> set[int]:
        """All descriptors of the socket."""
        return {self._socket.fileno()} | (set() if self._queue is None else {self._queue.get_fd()})

    @property
    def pending(self) -> int:
        """Packets that were received while an acknowledgement was awaited, and are not read yet."""
        return len(self._pending)

    def forget_pending(self) -> None:
        """Leave those packets to a child process that inherited them."""
        self._pending.clear()

    # Binding and settings.

    def bind(self, number: int, family: int, copy_mode: int, copy_range: int, max_len: int) -> None:
        """Make the queue; this socket owns it. OSError EBUSY: another socket owns it."""
        assert self._queue is not None
        self._discard()
        self.passed_over = 0
        with warnings.catch_warnings():
            # It warns when it does not get the receive buffer it asks for; `set_receive_buffer` returns the real size.
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                self._queue.bind(number, self._pass_over, max_len=max_len, mode=copy_mode, range=min(copy_range, _BIND_RANGE))
            except OSError as error:
                raise OSError(self._why_refused(number, family), str(error)) from error
        self._use_number(number)

    def _use_number(self, number: int) -> None:
        self._number = number
        self._verdicts = VerdictMessages(number)
        self._inbox.forget_messages()

    def _pass_over(self, packet: netfilterqueue.Packet) -> None:
        # It reads while it waits for the kernel's answers in `bind`: a packet that came in between.
        self.passed_over = packet.id

    def _why_refused(self, number: int, family: int) -> int:
        # NetfilterQueue's exception has no errno. A queue that another socket owns answers EPERM, as does a missing
        # capability, but a command that touches no queue tells the two apart.
        self._use_number(number)
        if (refusal := self._refusal(messages.bind_command(4, family))) != 0:
            return refusal
        refusal = self._refusal(messages.bind_command(1, family))
        if refusal == 0:
            self._refusal(messages.bind_command(2, family))
            return errno.EAGAIN
        return errno.EBUSY if refusal == errno.EPERM else refusal

    def _refusal(self, attributes: bytes) -> int:
        try:
            self._request(attributes)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def set_receive_buffer(self, size: int) -> int:
        """Ask for a receive buffer of `size` bytes, past the system's limit if allowed. Returns the size in force."""
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        # The kernel doubles it for its own bookkeeping (socket(7)).
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2

    def set_copy(self, copy_mode: int, copy_range: int) -> None:
        """Set copy mode and range (bytes), acknowledged."""
        self._request(messages.copy_setting(copy_mode, copy_range))

    def set_max_len(self, max_len: int) -> None:
        """Set how many packets may wait, acknowledged."""
        self._request(messages.max_len_setting(max_len))

    def set_flag(self, flag: Flag, on: bool) -> None:
        """Set or clear one flag, acknowledged. OSError EOPNOTSUPP or EINVAL: this kernel does not have it."""
        self._request(messages.flag_setting(flag, on))

    def confirm(self) -> None:
        """Raise PermissionError unless this process may answer packets: the kernel checks CAP_NET_ADMIN each time.

        Nothing is asked any more after `fix`: a worker that waited for its turn was confined before it.
        """
        if self._fixed:
            return
        with contextlib.suppress(FileNotFoundError):
            self._request(messages.no_packets_verdict(), messages.MSG_VERDICT)

    def _request(self, attributes: bytes, kind: int = messages.MSG_CONFIG) -> None:
        """Send one message and wait for its acknowledgement; packets that come in between are kept for the next turn."""
        self._sequence = (self._sequence + 1) & 0x7FFFFFFF
        data = messages.message(kind, self._sequence, self._number, attributes)
        deadline = time.monotonic() + _ACK_TIMEOUT
        while time.monotonic() < deadline:
            self._send(data)
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
        """Receive one message. Returns the errno that answers our request, None if the message is another one."""
        try:
            data = self._socket.recv(messages.LONGEST_MESSAGE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            return None
        answer = messages.acknowledgement(data)
        if answer is None:
            self._pending.append(data)
        elif answer[0] == self._sequence:
            return answer[1]
        return None

    # Reading. Each of these takes at most `budget` packets and returns when there are none left.

    @property
    def taken(self) -> int | None:
        """The number of the latest packet that the latest turn took, also if an exception ended it; None if it took none."""
        return self._inbox.latest if self._inbox.count else None

    @property
    def first_took(self) -> float:
        """Seconds from when the latest turn that waits took its first packet until that was answered; 0 if it answered none."""
        return self._inbox.first_took / 1e9

    @property
    def polled(self) -> tuple[int, int, float]:
        """How often the turns that wait have polled so far, how often a packet came of it, and the seconds of all."""
        return self._inbox.polls, self._inbox.found, self._inbox.polled / 1e9

    def read(self, budget: int) -> list[Packet]:
        """Take packets: whole, or as much of each as the copy range allows."""
        return self._inbox.read(budget, self._pending)

    def skim(self, budget: int) -> tuple[int, int, int]:
        """Take packets without looking at them. Returns how many, and the numbers of the first and the last."""
        return self._inbox.skim(budget, self._pending)

    def skim_each(self, budget: int, verdict: Verdict, together: int) -> tuple[int, int, int]:
        """Wait for packets, and answer them as they come; return when none has come for a while (see `be_patient`).

        A packet that comes alone costs two system calls, instead of four. verdict: a plain one, or with a mark. together: how
        many may be answered at once, which answers all that wait up to the last of them.
        """
        return self._inbox.skim_each(budget, self._pending, self._verdicts.single(0, verdict), together, self._spin)

    def sort(
        self,
        budget: int,
        known: dict[FlowKey, Verdict],
        decide: Callable[[Packet, FlowKey | None], Verdict],
        together: int = 0,
    ) -> tuple[int, int, list[Run]]:
        """Take packets and look their verdicts up by five-tuple, hook and interfaces.

        together: if it is not 0, wait and answer as `skim_each` does, accepted packets up to this many at once. `decide` is asked
        about a packet that is not in `known`, with the key under which its verdict may be kept, or None where there is no
        such key. Returns how many packets, the number of the first, and the runs.
        """
        if not together:
            return self._inbox.sort(budget, self._pending, known, decide)
        accept = self._verdicts.single(0, ACCEPT)
        return self._inbox.sort_each(budget, self._pending, known, decide, accept, ACCEPT, self.answer, together, self._spin)

    def judge(self, budget: int, table: Answering, time: float, ask: Callable[[Packet], Verdict], together: int = 0) -> FlowTurn:
        """Take packets and look their verdicts up by their flows.

        time: seconds, for the ages of flows. ask: is asked about a packet that has to be looked at, and settles its flow.
        together: as for `sort`. Returns how many packets, the number of the first, the runs, and a packet with the verdict
        that it still has to be given, or None: the last one, and in no run.
        """
        if not together:
            return self._inbox.judge(budget, self._pending, table, time, ask)
        return self._inbox.judge_each(budget, self._pending, table, time, ask, self._verdicts.single, together, self._spin)

    def note_flows(self, table: Answering | None, now: float) -> None:
        """Count packets in this flow table that are judged without it; None to count none. now: monotonic seconds."""
        self._inbox.note_flows(table, now)

    def poll_for(self, seconds: float) -> None:
        """Set how long `skim_each` and `sort` poll before they sleep. No system call: a confined worker may change it."""
        self._spin = seconds

    def be_patient(self, seconds: float) -> None:
        """Set how long `skim_each` and `sort` wait for the next packet, in seconds."""
        whole = int(seconds)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(whole, int((seconds - whole) * 1e6)))

    def drops(self) -> int:
        """Messages that did not fit into the receive buffer since the socket was made (SO_MEMINFO, linux/sock_diag.h)."""
        data = self._socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36)
        return int.from_bytes(data[32:36], "little")

    # Answering.

    def answer(self, identity: int, verdict: Verdict) -> None:
        """Send one packet's verdict."""
        self._send(self._verdicts.single(identity, verdict))

    def answer_up_to(self, identity: int, verdict: Verdict) -> None:
        """Send one verdict for every packet up to `identity` that still waits."""
        self._send(self._verdicts.batch(identity, verdict))

    def answer_each(self, answers: Iterable[tuple[int, Verdict]]) -> None:
        """Send many verdicts, each in a message of its own, in as few system calls as they fit into."""
        single = self._verdicts.single
        for data in messages.sends([single(identity, verdict) for identity, verdict in answers]):
            self._send(data)

    def answer_runs(self, runs: Iterable[Run]) -> None:
        """Send the verdicts of runs of neighbours. No older packet may still wait."""
        for data in messages.sends(self._verdicts.runs(runs, self._fixed)):
            self._send(data)

    def fix(self) -> tuple[tuple[int, int, int], frozenset[int]]:
        """From now on send verdicts in fixed shapes alone: where their headers are, and the descriptors of the queue's socket.

        For a process that then lets nothing else be sent on that socket (host/jail). Settings cannot be changed any more.
        """
        outbox = Outbox(self._socket.fileno(), self._number, messages.cutting(self._number))
        self._inbox.send_through(outbox)
        self._send = outbox.send
        self._fixed = True
        return outbox.headers, frozenset(self.descriptors)

    def cut_joined(self) -> None:
        """From now on the kernel cuts offloaded packets that are not TCP: they are queued again, one datagram each."""
        self._inbox.cut_joined(Cutter(self._socket.fileno(), messages.cutting(self._number)))

    @property
    def cut(self) -> int:
        """How many packets were cut."""
        return 0 if self._inbox.cutter is None else self._inbox.cutter.count

    # Ending.

    def unbind(self) -> None:
        """Remove the queue from the kernel. Packets that still wait are lost."""
        self._discard()
        if self._queue is None:
            self._refusal(messages.bind_command(2, socket.AF_UNSPEC))
        else:
            self._queue.unbind()

    def _discard(self) -> None:
        # NetfilterQueue takes the first error that it finds in the socket for the answer to its own request.
        self._inbox.skim(1 << 30, self._pending)

    def close(self) -> None:
        """Close the descriptors; the queue goes with the last of them."""
        self._socket.close()
        del self._queue

    def keep(self) -> None:
        """In a child process: let nothing that happens to this object unbind the queue, which is the parent's."""
        # NetfilterQueue unbinds when it is collected; an object with one reference too many never is.
        with contextlib.suppress(AttributeError):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._queue))


# NFQA_SKB_INFO (linux/netfilter/nfnetlink_queue.h)
_SKB_CSUMNOTREADY: Final = 1
_SKB_GSO: Final = 2


def make_packet(
    identity: int, hook: int, ethertype: int, mark: int, length: int, info: int, payload: bytes, head: bytes
) -> Packet:
    """Make a packet. Rarely used fields are filled on first access."""
    packet = Packet.__new__(Packet)
    packet.id = identity
    packet.hook = hook
    packet.hw_protocol = ethertype
    packet.mark = mark
    packet.length = length
    packet.gso = bool(info & _SKB_GSO)
    packet.checksum_ready = not info & _SKB_CSUMNOTREADY
    packet.payload = payload
    packet._headers = None
    packet._queue = None
    packet._raw = head
    packet._fill = _fill
    return packet


def _fill(packet: Packet) -> None:
    (
        packet.indev, packet.outdev, packet.physindev, packet.physoutdev, packet.uid, packet.gid, packet.hw_address, stamp,
    ) = rare_fields(packet._raw)  # fmt: skip
    # Most packets that this host sends are not stamped.
    packet.time = time.time() if stamp is None else stamp


def open_socket() -> socket.socket:
    """A netlink socket as a queue needs it; made in one network namespace it serves the queues there from any other."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
