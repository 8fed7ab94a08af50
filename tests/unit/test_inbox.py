"""The compiled reader, message by message: what it finds is what the whole parse finds, whatever the bytes are."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from struct import Struct

import pytest
from hostile import SEEDS, mutated
from hypothesis import given
from hypothesis import strategies as st

from nfq_agent.host.nfqueue import inbox as compiled
from nfq_agent.host.nfqueue.channel import make_packet
from nfq_agent.host.nfqueue.inbox import five_tuple_of
from nfq_agent.host.nfqueue.messages import MSG_PACKET, SLICE, attribute, slices
from nfq_agent.packet import Packet
from nfq_agent.verdict import ACCEPT, DROP, Verdict

# A verdict message; its number is the last thing in it.
_ACCEPT = bytes(range(28)) + bytes(4)


def verdict(number: int, batch: bool = False) -> bytes:
    """The same for this packet, or for all up to it."""
    return _ACCEPT[:4] + (b"\3\3" if batch else b"\1\3") + _ACCEPT[6:28] + number.to_bytes(4, "big")


def message(
    payload: bytes | None,
    identity: int = 1,
    hook: int = 3,
    indev: int = 0,
    outdev: int = 0,
    kind: int = MSG_PACKET,
    more: bytes = b"",
) -> bytes:
    """A packet as the kernel writes it (nfqnl_build_packet_message())."""
    body = attribute(1, identity.to_bytes(4, "big") + b"\x08\0" + bytes((hook,)))
    for number, device in ((5, indev), (6, outdev)):
        if device:
            body += attribute(number, device.to_bytes(4, "big"))
    body += more
    if payload is not None:
        body += attribute(10, payload)
    return Struct("=IHHIIBBH").pack(20 + len(body), kind, 0, 0, 0, 2, 0, 0) + body


def Inbox(descriptor: int, room: int) -> compiled.Inbox:
    return compiled.Inbox(descriptor, room, make_packet)


def parsed(data: bytes) -> dict[int, bytes] | None:
    """The attributes of a packet's message by kind, parsed independently; None if the message is no packet."""
    if len(data) < 32 or data[4:6] != b"\0\3":
        return None
    found: dict[int, bytes] = {}
    offset = 20
    while offset + 4 <= len(data):
        length, kind = Struct("=HH").unpack_from(data, offset)
        if length < 4 or offset + length > len(data):
            break
        found[kind & 0x3FFF] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found if 1 in found else None


def _from_port(port: int) -> bytes:
    """A plain packet whose verdict may be known; without ports where it is 0."""
    protocol = b"\x11" if port else b"\x01"
    return b"\x45\0\0\x40\0\0\x40\0\x40" + protocol + b"\0\0" + bytes(10) + port.to_bytes(2, "big") + bytes(8)


def sorted_out(*messages: bytes) -> tuple[int, list[tuple[Packet, bytes | None]]]:
    """How many packets were found, and what was asked for each."""
    asked: list[tuple[Packet, bytes | None]] = []

    def decide(packet: Packet, key: bytes | None) -> Verdict:
        asked.append((packet, key))
        return ACCEPT

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as empty:
        empty.setblocking(False)
        empty.bind("")
        count, _, _ = Inbox(empty.fileno(), 4096).sort(1000, deque(messages), {}, decide)
    return count, asked


flips = st.lists(st.tuples(st.integers(0, 79), st.integers(0, 255)), max_size=5)
payloads = st.builds(mutated, st.sampled_from(SEEDS), st.integers(0, 100), flips, st.binary(max_size=20))
# Every attribute of a packet, as the kernel writes it, in its order.
_MORE = [
    attribute(3, b"\1\2\3\4"), attribute(4, bytes(16)), attribute(7, b"\0\0\0\7"), attribute(8, b"\0\0\1\0"),
    attribute(9, b"\0\6\0\0\2\1\2\3\4\5\0\0"), attribute(4, (1_700_000_000).to_bytes(8, "big") + (250_000).to_bytes(8, "big")),
    attribute(16, b"\0\0\4\xd2"), attribute(17, b"\0\0\x10\xe1"), attribute(13, b"\0\1\0\0"), attribute(14, b"\0\0\0\2"),
    attribute(14, b"\0\0\0\1"), attribute(99, b"unknown"),
]  # fmt: skip
messages = st.builds(
    message, st.none() | payloads, st.integers(0, 0xFFFFFFFF), st.integers(0, 4), st.integers(0, 99), st.integers(0, 99),
    more=st.lists(st.sampled_from(_MORE), max_size=6).map(b"".join),
)  # fmt: skip
broken_messages = st.builds(
    lambda whole, cut, flips: bytes(
        byte ^ dict(flips).get(place, 0) for place, byte in enumerate(whole[: max(0, len(whole) - cut)])
    ),
    messages,
    st.integers(0, 300),
    st.lists(st.tuples(st.integers(0, 119), st.integers(0, 255)), max_size=3),
)


@given(messages | broken_messages)
def test_it_finds_what_the_whole_parse_finds(data: bytes) -> None:
    expected = parsed(data)
    count, asked = sorted_out(data)
    # It requires that the packet header comes first, as the kernel has it.
    if count == 0:
        assert expected is None or data[22:24] != b"\1\0"
        return
    assert expected is not None
    ((packet, key),) = asked
    assert packet.id == int.from_bytes(data[24:28], "big")

    def number(kind: int) -> int | None:
        return int.from_bytes(expected[kind][:4], "big") if len(expected.get(kind, b"")) >= 4 else None

    header = expected[1]
    if len(header) >= 7:
        assert (packet.hw_protocol, packet.hook) == (int.from_bytes(header[4:6], "big"), header[6])
    assert packet.payload == expected.get(10, b"")
    length = number(13)
    assert packet.length == (len(packet.payload) if length is None else length)
    assert packet.gso is bool((number(14) or 0) & 2)
    assert packet.mark == (number(3) or 0)
    assert [packet.indev, packet.outdev, packet.physindev, packet.physoutdev] == [number(kind) or 0 for kind in (5, 6, 7, 8)]
    assert (packet.uid, packet.gid) == (number(16), number(17))
    if len(hardware := expected.get(9, b"")) >= 12:
        assert packet.hw_address == hardware[4 : 4 + min(8, int.from_bytes(hardware[:2], "big"))]
    else:
        assert packet.hw_address is None
    if len(stamp := expected.get(4, b"")) >= 16:
        assert packet.time == int.from_bytes(stamp[:8], "big") + int.from_bytes(stamp[8:16], "big") / 1e6
    else:
        assert abs(packet.time - time.time()) < 60
    plain = five_tuple_of(packet.payload)
    if plain is None:
        assert key is None
    else:
        assert key == bytes((packet.hook,)) + packet.indev.to_bytes(4, "big") + packet.outdev.to_bytes(4, "big") + plain


def test_whatever_differs_in_place_or_flow_has_a_key_of_its_own() -> None:
    def ipv4(protocol: int = 17, ends: bytes = bytes(range(12))) -> bytes:
        return b"\x45\0\0\x40\0\0\x40\0\x40" + bytes((protocol,)) + b"\0\0" + ends + bytes(8)

    def ipv6(protocol: int = 17, ends: bytes = bytes(range(36))) -> bytes:
        return b"\x60\0\0\0\0\x10" + bytes((protocol,)) + b"\x40" + ends + bytes(12)

    several = [message(ipv4()), message(ipv4(6)), message(ipv6()), message(ipv6(6))]
    several += [message(ipv4(), hook=1), message(ipv4(), indev=1), message(ipv4(), outdev=1), message(ipv4(), indev=1, outdev=1)]
    several += [message(ipv4(ends=bytes(range(at)) + b"\xff" + bytes(range(at + 1, 12)))) for at in range(12)]
    several += [message(ipv6(ends=bytes(range(at)) + b"\xff" + bytes(range(at + 1, 36)))) for at in range(36)]
    count, asked = sorted_out(*several)
    assert count == len(several)
    assert len({key for _, key in asked}) == len(several)
    # What a flow's packets differ in is not in it: identification, time to live, length, and who sent them.
    same = [message(ipv4(), identity=7), message(ipv4()[:4] + b"\1\2" + ipv4()[6:]), message(ipv4() + b"more")]
    same.append(message(ipv4(), more=attribute(16, bytes(4))))
    _, again = sorted_out(message(ipv4()), *same)
    assert len({key for _, key in again}) == 1


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x45" * 23,
        b"\x46\0\0\x40\0\0\0\0\x40\x11" + bytes(30),
        b"\x45\0\0\x40\0\0\x20\0\x40\x11" + bytes(30),
        b"\x45\0\0\x40\0\0\0\1\x40\x11" + bytes(30),
        b"\x45\0\0\x40\0\0\0\0\x40\x01" + bytes(30),
        b"\x60\0\0\0\0\x10\x2c\x40" + bytes(50),
        b"\x60\0\0\0\0\x10\x11\x40" + bytes(35),
    ],
    ids=["empty", "short", "options", "first fragment", "later fragment", "icmp", "v6 fragment", "v6 without ports"],
)
def test_what_is_not_plain_has_no_key(payload: bytes) -> None:
    _, asked = sorted_out(message(payload))
    assert [key for _, key in asked] == [None]


def test_what_is_no_packet_is_passed_over() -> None:
    count, asked = sorted_out(b"", b"x", message(b"", kind=2), message(b"")[:31], message(b"", identity=5), bytes(64))
    assert count == 1
    assert [packet.id for packet, _ in asked] == [5]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """What stands for the queue's socket, and what stands for the kernel."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        theirs.settimeout(5)
        yield ours, theirs


def drained(theirs: socket.socket) -> list[bytes]:
    """What was answered so far."""
    theirs.setblocking(False)
    got: list[bytes] = []
    with contextlib.suppress(BlockingIOError):
        while True:
            got.append(theirs.recv(64))
    return got


def _patience(ours: socket.socket, seconds: float) -> None:
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, Struct("ll").pack(0, int(seconds * 1e6)))


def test_runs_and_the_budget(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    inbox = Inbox(ours.fileno(), 4096)
    known: dict[bytes, Verdict] = {}

    def decide(packet: Packet, key: bytes | None) -> Verdict:
        return DROP if b"drop" in packet.payload else ACCEPT

    for identity, text in enumerate([b"a", b"drop", b"drop", b"b", b"c"], 0xFFFFFFFD):
        theirs.send(message(text, identity & 0xFFFFFFFF))
    # Numbers go on from the end to the beginning.
    assert inbox.sort(4, deque(), known, decide) == (
        4,
        0xFFFFFFFD,
        [(0xFFFFFFFD, 1, ACCEPT), (0xFFFFFFFF, 2, DROP), (0, 1, ACCEPT)],
    )
    assert inbox.sort(4, deque(), known, decide) == (1, 1, [(1, 1, ACCEPT)])
    assert inbox.sort(4, deque(), known, decide) == (0, 0, [])
    for identity in (3, 4, 5):
        theirs.send(message(b"", identity))
    # What was read before comes first.
    pending = deque([message(b"", 1), message(b"", 2)])
    assert inbox.skim(4, pending) == (4, 1, 4)
    assert not pending
    assert inbox.skim(4, pending) == (1, 5, 5)
    assert inbox.skim(4, pending) == (0, 0, 0)


def test_reading_takes_what_waits_up_to_the_budget(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    inbox = Inbox(ours.fileno(), 4096)
    for number in range(3, 6):
        theirs.send(message(b"%d" % number, number))
    theirs.send(message(b"", kind=2))
    pending = deque([message(b"1", 1), message(b"2", 2)])
    assert [(packet.id, packet.payload) for packet in inbox.read(4, pending)] == [
        (number, b"%d" % number) for number in range(1, 5)
    ]
    assert not pending
    assert [packet.id for packet in inbox.read(4, pending)] == [5]
    assert (inbox.count, inbox.latest) == (1, 5)
    assert inbox.read(4, pending) == []
    assert inbox.count == 0


def test_a_turn_that_an_exception_ends_says_what_it_took(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends

    def make(identity: int, *_: object) -> Packet:
        if identity == 8:
            raise KeyboardInterrupt
        return Packet(b"", id=identity)

    inbox = compiled.Inbox(ours.fileno(), 4096, make)
    for number in (7, 8, 9):
        theirs.send(message(b"", number))
    with pytest.raises(KeyboardInterrupt):
        inbox.read(10, deque())
    assert (inbox.count, inbox.latest) == (2, 8)
    assert [packet.id for packet in inbox.read(10, deque())] == [9]


@pytest.mark.parametrize("waits", [False, True])
def test_five_tuples_in_the_same_place_have_their_own_verdicts(ends: tuple[socket.socket, socket.socket], waits: bool) -> None:
    """There are 64 places, chosen by a hash: with 200 five-tuples most places are shared by several."""
    ours, theirs = ends
    _patience(ours, 0.001)
    inbox = Inbox(ours.fileno(), 4096)
    accepted = [message(_from_port(port)) for port in range(1, 201, 2)]
    known = {key: ACCEPT for _, key in sorted_out(*accepted)[1] if key is not None}
    dropped: list[int] = []

    def decide(packet: Packet, key: bytes | None) -> Verdict:
        dropped.append(packet.id)
        return DROP

    for port in range(2, 201, 2):
        # Every place holds an accepted five-tuple when the one that is not known comes.
        theirs.send(message(_from_port(port), port))
        if waits:
            pending = deque(accepted)
            for _ in range(50):
                # A turn ends in time, also on a machine that is busy with others: the packet then comes with the next.
                inbox.sort_each(101, pending, known, decide, _ACCEPT, ACCEPT, lambda number, verdict: None, 64, 0.0)
                if dropped and dropped[-1] == port:
                    break
        else:
            inbox.sort(101, deque(accepted), known, decide)
        if port not in dropped:
            # The turn was over by its time before it came to the last packet.
            inbox.sort(1, deque(), known, decide)
        drained(theirs)
    assert dropped == list(range(2, 201, 2))


@pytest.mark.parametrize("spin", [0.0, 0.02])
def test_each_is_answered_with_its_own_number(ends: tuple[socket.socket, socket.socket], spin: float) -> None:
    ours, theirs = ends
    _patience(ours, 0.02)
    inbox = Inbox(ours.fileno(), 4096)
    others: list[tuple[int, Verdict]] = []

    def decide(packet: Packet, key: bytes | None) -> Verdict:
        return DROP if b"drop" in packet.payload else ACCEPT

    for identity in (7, 0x01020304, 9):
        theirs.send(message(b"x", identity))
    theirs.send(message(b"x", kind=2))
    assert inbox.skim_each(10, deque([message(b"", 6)]), _ACCEPT, 1, spin) == (4, 6, 9)
    numbers = [6, 7, 0x01020304, 9]
    assert [theirs.recv(64) for _ in numbers] == [verdict(number) for number in numbers]
    for identity, text in ((10, b"x"), (11, b"drop"), (12, b"x")):
        theirs.send(message(text, identity))
    count, first, runs = inbox.sort_each(
        10, deque(), {}, decide, _ACCEPT, ACCEPT, lambda number, verdict: others.append((number, verdict)), 1, spin
    )
    assert (count, first) == (3, 10)
    assert runs == [(10, 1, ACCEPT), (11, 1, DROP), (12, 1, ACCEPT)]
    assert [theirs.recv(64)[28:] for _ in range(2)] == [b"\0\0\0\x0a", b"\0\0\0\x0c"]
    assert others == [(11, DROP)]


@pytest.mark.parametrize("spin", [0.0, 0.02])
def test_what_is_there_at_once_is_answered_at_once(ends: tuple[socket.socket, socket.socket], spin: float) -> None:
    ours, theirs = ends
    _patience(ours, 0.02)
    inbox = Inbox(ours.fileno(), 4096)

    def answers(numbers: range) -> list[bytes]:
        for number in numbers:
            theirs.send(message(b"x", number))
        assert inbox.skim_each(100, deque(), _ACCEPT, 3, spin) == (len(numbers), numbers[0], numbers[-1])
        return drained(theirs)

    assert answers(range(5)) == [verdict(2, batch=True), verdict(4, batch=True)]
    assert answers(range(5, 6)) == [verdict(5)]
    # After one that was alone, 16 are answered without a look at whether there are more.
    assert answers(range(6, 6 + 20)) == [*(verdict(number) for number in range(6, 22)), verdict(24, batch=True), verdict(25)]


def test_what_is_known_is_answered_at_once_and_in_order(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    _patience(ours, 0.02)
    inbox = Inbox(ours.fileno(), 4096)
    said: list[bytes | int] = []

    def answer(number: int, other: Verdict) -> None:
        # The kernel's side has what was answered before.
        said.extend(drained(theirs))
        if other is DROP:
            said.append(number)

    _, asked = sorted_out(message(_from_port(1)), message(_from_port(2)))
    known = {key: verdict for (_, key), verdict in zip(asked, (ACCEPT, DROP), strict=True) if key is not None}
    for number, port in enumerate((1, 1, 1, 2, 1, 1, 3, 1, 1, 1)):
        theirs.send(message(_from_port(port), number))

    def decide(packet: Packet, key: bytes | None) -> Verdict:
        assert key is not None
        # A place that is remembered must not outlive what it points to.
        known[key] = ACCEPT
        return ACCEPT

    count, first, runs = inbox.sort_each(100, deque(), known, decide, _ACCEPT, ACCEPT, answer, 64, 0.0)
    answer(-1, ACCEPT)
    assert (count, first) == (10, 0)
    assert runs == [(2, 3, ACCEPT), (3, 1, DROP), (9, 6, ACCEPT)]
    assert said == [
        verdict(0), verdict(2, batch=True), 3, verdict(4), verdict(5), verdict(6), verdict(7), verdict(9, batch=True)
    ]  # fmt: skip
    # The same without waiting.
    for number, port in enumerate((1, 1, 2, 2, 1, 3, 1)):
        theirs.send(message(_from_port(port), number))
    assert inbox.sort(100, deque(), known, decide) == (7, 0, [(1, 2, ACCEPT), (3, 2, DROP), (6, 3, ACCEPT)])


@given(
    st.lists(st.sampled_from([0, 1, 1, 1, 2, 2, 3, 4, 5]), min_size=1, max_size=40),
    st.integers(0, 3),
    st.integers(1, 5),
    st.integers(1, 50),
    st.booleans(),
)
def test_each_gets_its_verdict_once(ports: list[int], before: int, together: int, budget: int, waits: bool) -> None:
    """Whatever is known, and whatever is answered together: judged by what the kernel does with each message."""
    wanted = {0: ACCEPT, 1: ACCEPT, 2: DROP, 3: ACCEPT, 4: DROP, 5: ACCEPT}
    _, asked = sorted_out(message(_from_port(1)), message(_from_port(2)), message(_from_port(3)))
    known = {key: wanted[port] for port, (_, key) in enumerate(asked, 1) if key is not None}
    # Numbers go on from the end to the beginning.
    numbers = [(0xFFFFFFF0 + place) & 0xFFFFFFFF for place in range(len(ports))]
    waiting = dict(enumerate(ports))
    got: dict[int, Verdict] = {}

    def give(number: int, verdict: Verdict, batch: bool = False) -> None:
        place = numbers.index(number)
        assert place in waiting, "answered twice"
        for other in [other for other in waiting if other == place or (batch and other < place)]:
            del waiting[other]
            got[other] = verdict

    def read() -> None:
        for data in drained(theirs):
            give(int.from_bytes(data[28:], "big"), ACCEPT, batch=data[4:6] == b"\3\3")

    def answer(number: int, verdict: Verdict) -> None:
        read()
        give(number, verdict)

    def decide(packet: Packet, key: bytes | None) -> Verdict:
        verdict = wanted[ports[numbers.index(packet.id)]]
        if key is not None and verdict is ACCEPT:
            known[key] = verdict
        return verdict

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        theirs.setblocking(False)
        _patience(ours, 0.0005)
        inbox = Inbox(ours.fileno(), 4096)
        messages = [message(_from_port(port), number) for port, number in zip(ports, numbers, strict=True)]
        pending = deque(messages[:before])
        for data in messages[before:]:
            theirs.send(data)
        total = 0
        while True:
            if waits:
                count, _, runs = inbox.sort_each(budget, pending, known, decide, _ACCEPT, ACCEPT, answer, together, 0.0)
                read()
            else:
                count, _, runs = inbox.sort(budget, pending, known, decide)
                for last, number, verdict in runs:
                    give(last, verdict, batch=number > 1)
            assert count <= budget
            verdicts = [verdict for _, number, verdict in runs for _ in range(number)]
            assert verdicts == [wanted[port] for port in ports[total : total + count]]
            if count == 0:
                break
            total += count
    assert total == len(ports)
    assert got == {place: wanted[port] for place, port in enumerate(ports)}


@pytest.mark.parametrize("spin", [0.0, 1.0])
@pytest.mark.parametrize("together", [1, 64])
def test_a_turn_ends_though_packets_keep_coming(ends: tuple[socket.socket, socket.socket], spin: float, together: int) -> None:
    ours, theirs = ends
    theirs.setblocking(False)
    _patience(ours, 0.9)
    inbox = Inbox(ours.fileno(), 4096)
    over = threading.Event()

    def keep_coming() -> None:
        stop = time.monotonic() + 4
        while not over.is_set() and time.monotonic() < stop:
            # Several at once, always as many.
            for _ in range(4):
                theirs.send(message(b"x"))
            time.sleep(0.002)
            drained(theirs)

    allowed = os.sched_getaffinity(0)
    # On one processor, so that they are there when the reader wakes.
    os.sched_setaffinity(0, {min(allowed)})
    thread = threading.Thread(target=keep_coming)
    begin = time.monotonic()
    thread.start()
    try:
        count, _, _ = inbox.skim_each(1 << 30, deque(), _ACCEPT, together, spin)
        took = time.monotonic() - begin
    finally:
        over.set()
        thread.join()
        os.sched_setaffinity(0, allowed)
    assert count > 0
    # 50 ms, and a wait.
    assert took < 2


def test_a_turn_ends_when_much_was_asked(ends: tuple[socket.socket, socket.socket]) -> None:
    """What is asked may be slow, and nothing is answered before the end of the turn."""
    ours, theirs = ends
    inbox = Inbox(ours.fileno(), 4096)
    for number in range(60):
        theirs.send(message(b"x", 240 + number))
    pending = deque(message(b"x", number) for number in range(240))
    counts = [inbox.sort(1000, pending, {}, lambda packet, key: ACCEPT)[0] for _ in range(3)]
    assert counts == [256, 44, 0]


def test_a_signal_ends_the_wait(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = ends
    _patience(ours, 0.9)
    came: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: came.append(number))
    timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        begin = time.monotonic()
        assert Inbox(ours.fileno(), 4096).skim_each(10, deque(), _ACCEPT, 1, 0.0) == (0, 0, 0)
        assert came == [signal.SIGUSR1]
        assert time.monotonic() - begin < 0.9
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_the_kernels_errors_come_out(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    _patience(ours, 0.02)
    inbox = Inbox(ours.fileno(), 4096)
    theirs.send(message(b"x", 1))
    theirs.shutdown(socket.SHUT_RD)
    with pytest.raises(BrokenPipeError):
        inbox.skim_each(10, deque(), _ACCEPT, 1, 0.0)
    ours.close()
    for look in (
        lambda: inbox.skim(1, deque()),
        lambda: inbox.read(1, deque()),
        lambda: inbox.sort(1, deque(), {}, lambda packet, key: ACCEPT),
        lambda: inbox.skim_each(1, deque(), _ACCEPT, 1, 0.0),
        lambda: inbox.skim_each(1, deque(), _ACCEPT, 64, 0.1),
    ):
        with pytest.raises(OSError, match="Bad file descriptor"):
            look()


def test_a_verdict_message_has_its_size(ends: tuple[socket.socket, socket.socket]) -> None:
    inbox = Inbox(ends[0].fileno(), 4096)
    for wrong in (b"", bytes(31), bytes(65)):
        with pytest.raises(ValueError, match="not a verdict message"):
            inbox.skim_each(1, deque(), wrong, 1, 0.0)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3 * SLICE + 2))
def test_a_long_run_is_answered_inslices(last: int, count: int) -> None:
    ends = [*slices(last, count), last]
    begin = last - count
    for end in ends:
        # Numbers begin again after 2**32 - 1.
        assert 0 < (end - begin) & 0xFFFFFFFF <= SLICE
        begin = end
    assert len(ends) == -(-count // SLICE)
