"""Questions to the kernel that need no right: whose socket it is, and whether an address is this host's."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from nfq_agent.host.sock_diag import KernelQuestions


@pytest.fixture
def kernel() -> Iterator[KernelQuestions]:
    it = KernelQuestions()
    yield it
    it.close()


def test_whose_socket_a_connection_comes_from(kernel: KernelQuestions) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        owner = kernel.socket_of(client.getsockname(), client.getpeername())
        assert owner is not None
        assert (owner.uid, owner.inode) == (os.geteuid(), os.fstat(client.fileno()).st_ino)
    assert kernel.socket_of(("127.0.0.1", 1), ("127.0.0.1", 2)) is None
    assert kernel.socket_of(("127.0.0.1", 1), ("::1", 2)) is None


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("0.0.0.0", True), ("::1", True), ("::", True), ("203.0.113.7", False),
     ("2001:db8::7", False)],
)  # fmt: skip
def test_whether_an_address_is_this_hosts(kernel: KernelQuestions, host: str, local: bool) -> None:
    assert kernel.is_local(host) is local
