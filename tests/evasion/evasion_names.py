"""Evasions of names that DNS proves: `verify = "dns"` and `dst_name`, against the resolver of the bed."""

from __future__ import annotations

from functools import partial

from evasion_attempt import Attempt
from evasion_config import DNS, GIVEN, TAKEN, UNNAMED
from evasion_line import Line
from evasion_servers import PROVEN_PLAIN, PROVEN_TLS
from openings import client_hello, dns_query


def _asks(attempt: Attempt, name: str) -> None:
    """Ask the resolver; its answer is known to the agent when it is here."""
    with attempt.udp(DNS) as client:
        client.settimeout(8)
        client.send(dns_query(name, 1 if attempt.family == 4 else 28))
        client.recv(1000)


def _says(attempt: Attempt, port: int, address: str, data: bytes) -> None:
    with attempt.tcp(port, address) as client:
        client.sendall(data)
        attempt.drain(client)


def _destination(attempt: Attempt, name: str) -> None:
    """A protocol that shows no name, to the address that DNS gives for a denied one."""
    denied = name == attempt.denied
    _asks(attempt, f"{attempt.name}.taken.test" if denied else name)
    _says(attempt, PROVEN_PLAIN, (TAKEN if denied else GIVEN)[attempt.family], f"hello {name}\n".encode())


def _claim(asked: bool, attempt: Attempt, name: str) -> None:
    """A name of the list is claimed at another address: one that DNS gave for other names, or for none."""
    if name == attempt.denied:
        if asked:
            _asks(attempt, f"{attempt.name}.taken.test")
        address = (TAKEN if asked else UNNAMED)[attempt.family]
    else:
        _asks(attempt, name)
        address = GIVEN[attempt.family]
    _says(attempt, PROVEN_TLS, address, client_hello(name))


LINES = (
    Line(
        "dst-name", "`dst_name`: a protocol without a name, to the address of a denied name", _destination,
        twin=True, good="given.test", bad="said.test",
    ),
    Line(
        "claim", "TLS: an allowed name is claimed at the address of a denied one, with `verify` or `dst_name`",
        partial(_claim, True), twin=True, good="given.test", bad="claimed.given.test",
    ),
    Line(
        "claim-unasked", "TLS: an allowed name is claimed at an address that DNS gave for no name", partial(_claim, False),
        twin=True, good="given.test", bad="claimed.given.test", holds=("allow-list",),
        limit="a block-list names what is denied, and this address belongs to no name that the agent has seen",
    ),
)  # fmt: skip
