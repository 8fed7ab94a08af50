"""A table's image beside what iptables says of the same table."""

from __future__ import annotations

import socket

import pytest
from namespace import Namespace

from nfq_agent.host.xtables.image import Image, version

pytestmark = pytest.mark.kernel

TABLE = """*mangle
:ONE - [0:0]
:EMPTY - [0:0]
:LAST - [0:0]
-A INPUT -p tcp -m comment --comment mine:0 -j ACCEPT
-A INPUT -p udp -j DROP
-A INPUT -m comment --comment mine:1 -j ONE
-A INPUT -j LAST
-A INPUT -m comment --comment mine:2 -g LAST
-A ONE -p tcp -j RETURN
-A ONE -m comment --comment mine:3
-A LAST -j MARK --set-xmark 0x1/0x1
COMMIT
"""
FAMILIES = [(socket.AF_INET, "iptables"), (socket.AF_INET6, "ip6tables")]


def fill(netns: Namespace, tool: str) -> None:
    """Put TABLE in."""
    netns.run(f"{tool}-legacy-restore", input=TABLE)


@pytest.mark.parametrize(("family", "tool"), FAMILIES)
def test_chains_places_and_jumps(netns: Namespace, family: socket.AddressFamily, tool: str) -> None:
    fill(netns, tool)
    image = netns.call(Image, family, "mangle")
    assert sorted(image.chains) == sorted(
        [b"PREROUTING", b"INPUT", b"FORWARD", b"OUTPUT", b"POSTROUTING", b"ONE", b"EMPTY", b"LAST"]
    )
    tagged = [(entry.chain, entry.number, entry.jump) for entry in image.entries(frozenset(), b"mine:")]
    assert tagged == [(b"INPUT", 1, b"ACCEPT"), (b"INPUT", 3, b"ONE"), (b"INPUT", 5, b"LAST"), (b"ONE", 2, b"")]
    own = {(entry.chain, entry.number): entry.jump for entry in image.entries(frozenset((b"ONE", b"EMPTY", b"LAST")), b"other")}
    assert own == {(b"ONE", 1): b"RETURN", (b"ONE", 2): b"", (b"LAST", 1): None}
    assert [image.references(chain) for chain in (b"ONE", b"EMPTY", b"LAST")] == [1, 0, 2]


@pytest.mark.parametrize(("family", "tool"), FAMILIES)
def test_the_version_tells_a_rule_more(netns: Namespace, family: socket.AddressFamily, tool: str) -> None:
    fill(netns, tool)
    before = netns.call(Image, family, "mangle").version
    assert netns.call(version, family, "mangle") == before
    netns.run(f"{tool}-legacy", "-t", "mangle", "-I", "INPUT", "-j", "ACCEPT")
    assert netns.call(version, family, "mangle") != before


def test_a_table_that_is_not_there(netns: Namespace) -> None:
    with pytest.raises(FileNotFoundError):
        netns.call(Image, socket.AF_INET, "nonsense")
