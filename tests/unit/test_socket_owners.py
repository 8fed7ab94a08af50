"""Who has a socket of this very process, as the kernel says: each kind of socket, and what stays unknown."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from nfq_agent.host.owners import HostOwners
from nfq_agent.owner import Owner
from nfq_agent.packet import Hook, Packet
from nfq_agent.testing import tcp, udp

STREAM, DATAGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
OTHER = "127.0.0.1:9"


@pytest.fixture
def owners() -> Iterator[HostOwners]:
    with closing(HostOwners()) as found:
        yield found


def bound(kind: socket.SocketKind, host: str = "127.0.0.1", port: int = 0, *options: int) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
    for option in options:
        made.setsockopt(socket.SOL_SOCKET, option, 1)
    made.bind((host, port))
    return made


def port_of(one: socket.socket) -> int:
    return int(one.getsockname()[1])


def sent(one: socket.socket, to: str = OTHER, uid: int | None = None, kind: socket.SocketKind = DATAGRAM) -> Packet:
    make = tcp if kind == STREAM else udp
    return make(f"127.0.0.1:{port_of(one)}", to, hook=Hook.OUTPUT, uid=uid)


def received(port: int, source: str = OTHER, kind: socket.SocketKind = DATAGRAM, at: str = "127.0.0.1") -> Packet:
    make = tcp if kind == STREAM else udp
    return make(source, f"{at}:{port}", hook=Hook.INPUT)


def is_of(found: Owner | None, one: socket.socket) -> bool:
    return found is not None and (found.uid, found.inode) == (os.geteuid(), os.fstat(one.fileno()).st_ino)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("kind", [STREAM, DATAGRAM])
def test_a_socket_that_waits_for_anyone(owners: HostOwners, host: str, kind: socket.SocketKind) -> None:
    with bound(kind, host) as one:
        if kind == STREAM:
            one.listen()
        else:
            assert is_of(owners.of(sent(one)), one)
        assert is_of(owners.of(received(port_of(one), kind=kind)), one)
        packet = received(port_of(one), kind=kind)
    assert owners.of(packet) is None


def test_a_connection_from_a_socket_of_both_families(owners: HostOwners) -> None:
    with bound(STREAM, "::") as listener:
        listener.listen()
        with socket.create_connection(("127.0.0.1", port_of(listener))) as client, listener.accept()[0] as server:
            ends = f"127.0.0.1:{port_of(client)}", f"127.0.0.1:{port_of(listener)}"
            assert is_of(owners.of(tcp(ends[0], ends[1], hook=Hook.OUTPUT)), client)
            assert is_of(owners.of(tcp(ends[1], ends[0], hook=Hook.OUTPUT)), server)
            assert is_of(owners.of(tcp(ends[0], ends[1], hook=Hook.INPUT)), server)


def test_a_connection_that_is_not_accepted_yet_has_no_user(owners: HostOwners) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        found = owners.of(received(port_of(listener), f"127.0.0.1:{port_of(client)}", STREAM))
        assert found is not None
        assert "uid" not in found.facts
        assert found.cgroup == getattr(owners.of(received(port_of(listener), kind=STREAM)), "cgroup", None)


def test_a_connection_that_has_ended_has_none(owners: HostOwners) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        ends = f"127.0.0.1:{port_of(client)}", f"127.0.0.1:{port_of(listener)}"
        with client, server:
            pass
        # The first to close waits for late packets (TIME_WAIT); the kernel names root as its user.
        found = owners.of(tcp(ends[0], ends[1], hook=Hook.OUTPUT))
        assert found is None or found.facts == {}
    with bound(DATAGRAM) as one:
        packet = sent(one)
    assert owners.of(packet) is None


def test_a_socket_that_is_handed_on_is_that_of_its_maker(owners: HostOwners) -> None:
    here, there = socket.socketpair()
    with here, there, bound(DATAGRAM) as one:
        here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [one.fileno()]))])
        _, [(_, _, data)], _, _ = there.recvmsg(1, socket.CMSG_SPACE(4))
        with socket.socket(fileno=array.array("i", data)[0]) as handed:
            assert is_of(owners.of(sent(handed)), one)
        child = os.fork()
        if child == 0:
            os._exit(not is_of(owners.of(sent(one)), one))
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("connected", [False, True])
def test_a_packet_of_another_user_is_not_of_this_socket(owners: HostOwners, connected: bool) -> None:
    with bound(DATAGRAM) as one:
        if connected:
            one.connect(("127.0.0.1", 9))
        assert owners.of(sent(one, uid=os.geteuid() + 1)) is None
        assert is_of(owners.of(sent(one, uid=os.geteuid())), one)


@pytest.mark.parametrize("option", [socket.SO_REUSEADDR, socket.SO_REUSEPORT])
def test_sockets_that_share_a_port_are_of_their_group(owners: HostOwners, option: int) -> None:
    with bound(DATAGRAM, "127.0.0.1", 0, option) as one, bound(DATAGRAM, "0.0.0.0", port_of(one), option) as other:
        found = owners.of(sent(one))
        assert is_of(found, one) or is_of(found, other)
        # One that is bound to another address may send from this one, too: it is of the same group.
        with bound(DATAGRAM, "127.0.0.2", port_of(one), option):
            assert owners.of(sent(one)) == found
        assert owners.of(received(port_of(one), at="224.0.0.251")) is not None


def test_many_sockets_that_share_a_port_delay_no_answer(owners: HostOwners) -> None:
    made = [bound(DATAGRAM, "127.0.0.1", 0, socket.SO_REUSEPORT)]
    try:
        made += [bound(DATAGRAM, "127.0.0.1", port_of(made[0]), socket.SO_REUSEPORT) for _ in range(500)]
        with bound(DATAGRAM) as one:
            for _ in range(3):
                assert owners.of(sent(made[0])) is not None
                assert is_of(owners.of(sent(one)), one)
    finally:
        for each in made:
            each.close()


def test_the_kernel_is_asked_once_for_each_packet(owners: HostOwners, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Packet] = []
    ask = owners.of

    def counted(packet: Packet) -> Owner | None:
        asked.append(packet)
        return ask(packet)

    monkeypatch.setattr(owners, "of", counted)
    with bound(DATAGRAM) as one:
        first, second = sent(one), sent(one)
        known = owners.names(first)
        assert known["uid"] == os.geteuid()
        assert owners.names(first) == known
        assert owners.names(second) == known
    gone = sent_from(second)
    # Also where no process has the socket any more.
    assert owners.names(gone) == owners.names(gone) == {}
    assert asked == [first, second, gone]


def sent_from(packet: Packet) -> Packet:
    """Another packet with the same ends."""
    five_tuple = packet.headers.five_tuple
    return udp(f"127.0.0.1:{five_tuple.sport}", f"127.0.0.1:{five_tuple.dport}", hook=packet.hook)
