"""The container of a packet that comes over a bridge without a port of its own, by its address on that bridge."""

from __future__ import annotations

import errno
from ipaddress import ip_address
from typing import Any

import pytest

from nfq_agent.host.links import Link
from nfq_agent.host.peer_addresses import peer_addresses
from nfq_agent.owner import Owners
from nfq_agent.packet import Hook, Packet
from nfq_agent.service.bridge_addresses import BridgeAddresses
from nfq_agent.service.container_names import Behind, ContainerNames
from nfq_agent.service.forwarded_owners import ForwardedOwners
from nfq_agent.testing import tcp

WEB, DB = b"\xac\x11\0\2", b"\xac\x11\0\3"
DOCKER0, OTHER = 40, 41


def port(index: int, bridge: int = DOCKER0, netns: int | None = 7) -> Link:
    return Link(index, f"veth{index}", "veth", 1500, True, "", 2, netns, bridge, False)


class Kernel:
    """Answers for ports, by their index."""

    def __init__(self, **addresses: frozenset[bytes]) -> None:
        self.addresses = {int(name.removeprefix("port")): each for name, each in addresses.items()}
        self.asked: list[int] = []

    def of(self, link: Link) -> frozenset[bytes]:
        self.asked.append(link.index)
        if link.index not in self.addresses:
            raise OSError(errno.ENODEV, "no such device")
        return self.addresses[link.index]


def test_the_address_of_a_port_leads_to_the_container_behind_it() -> None:
    kernel = Kernel(port3=frozenset((WEB, b"\xfd" + bytes(15))), port4=frozenset((DB,)), port5=frozenset((WEB,)))
    addresses = BridgeAddresses(kernel.of)
    for link in (port(3), port(4), port(5, OTHER), port(6), port(8, bridge=0), port(9, netns=None)):
        addresses.seen(link)
    named = {3: "web", 4: "db", 5: "other"}
    expected = {DOCKER0: {WEB: "web", b"\xfd" + bytes(15): "web", DB: "db"}, OTHER: {WEB: "other"}}
    assert addresses.on_bridges(named) == expected
    # What is no port of a bridge, or leads to no namespace, is not asked about.
    assert sorted(kernel.asked) == [3, 4, 5, 6]
    # It leaves the bridge, or goes.
    addresses.seen(port(4, bridge=0))
    addresses.gone(3)
    assert addresses.on_bridges(named) == {OTHER: {WEB: "other"}}
    assert addresses.indices == {5, 6}


def test_an_address_that_two_have_leads_to_neither() -> None:
    addresses = BridgeAddresses(Kernel(port3=frozenset((WEB,)), port4=frozenset((WEB, DB)), port5=frozenset((DB,))).of)
    for index in (3, 4, 5):
        addresses.seen(port(index))
    assert addresses.on_bridges({3: "web", 4: "db", 5: "db"}) == {DOCKER0: {DB: "db"}}
    # One of them is not a container, or not one that is known.
    assert addresses.on_bridges({4: "db"}) == {}


def test_a_port_is_asked_each_second_while_it_is_new_and_then_every_ten() -> None:
    kernel = Kernel(port3=frozenset((WEB,)))
    addresses = BridgeAddresses(kernel.of)
    addresses.seen(port(3))
    for _ in range(5):
        addresses.on_bridges({3: "web"})
    assert len(kernel.asked) == 1
    counts = []
    for _ in range(100):
        addresses.later()
        addresses.on_bridges({3: "web"})
        counts.append(len(kernel.asked))
    assert (counts[59], counts[99]) == (61, 65)
    kernel.addresses[3] = frozenset((DB,))
    # It has changed: it is asked at once.
    addresses.seen(port(3))
    assert addresses.on_bridges({3: "web"}) == {DOCKER0: {DB: "web"}}


def test_a_thousand_ports_are_asked_by_turns() -> None:
    kernel = Kernel(**{f"port{index}": frozenset((index.to_bytes(4, "big"),)) for index in range(1, 1001)})
    addresses = BridgeAddresses(kernel.of)
    for index in range(1, 1001):
        addresses.seen(port(index))
    named = {index: str(index) for index in range(1, 1001)}
    for second in range(1, 11):
        found = addresses.on_bridges(named)
        assert len(found[DOCKER0]) == len(set(kernel.asked)) == 100 * second
        addresses.later()
    assert found[DOCKER0][(1000).to_bytes(4, "big")] == "1000"


def test_a_forwarded_flow_has_the_container_of_its_address_on_the_bridge() -> None:
    names = ContainerNames()
    owners = ForwardedOwners(names, Owners())
    names.write(Behind({3: "port"}, {DOCKER0: {WEB: "web", DB: "db"}, OTHER: {WEB: "twin"}}))

    def packet(src: bytes, dst: bytes, **interfaces: int) -> Packet:
        fields: dict[str, Any] = {"hook": Hook.FORWARD, **interfaces}
        return tcp(f"{ip_address(src)}:40000", f"{ip_address(dst)}:80", **fields)

    outside = b"\x0a\x09\0\2"
    out = packet(WEB, outside, indev=DOCKER0, outdev=2)
    assert owners.names(out) == owners.known(out) == {"container": "web"}
    assert owners.names(packet(outside, WEB, indev=2, outdev=DOCKER0)) == {"container": "web"}
    assert owners.names(packet(WEB, DB, indev=DOCKER0, outdev=DOCKER0)) == {"container": "web", "container_to": "db"}
    assert owners.names(packet(WEB, outside, indev=OTHER)) == {"container": "twin"}
    assert owners.names(packet(WEB, outside, indev=DOCKER0, hook=Hook.PREROUTING)) == {"container": "web"}
    # The port, where the kernel tells it, counts more than what a packet says of itself.
    assert owners.names(packet(WEB, outside, indev=DOCKER0, physindev=3)) == {"container": "port"}
    # An address of no container on this bridge, or one that comes over another interface.
    assert owners.names(packet(outside, b"\x0a\x09\0\3", indev=DOCKER0)) == {}
    assert owners.names(packet(WEB, outside, indev=2)) == {}
    # Bytes without an address.
    assert owners.names(Packet(b"\x45", hook=Hook.FORWARD, indev=DOCKER0)) == {}


def test_an_interface_without_a_peer_in_another_namespace_has_no_addresses_to_ask_for() -> None:
    assert peer_addresses(port(3, netns=None)) == frozenset()


def test_a_namespace_that_has_no_number_is_an_error() -> None:
    with pytest.raises(OSError, match=r"Invalid argument|not permitted"):
        peer_addresses(port(3, netns=0x7FFFFFFF))
