"""Who a flow belongs to: names in paths of control groups, rules on them, and what the kernel says of this very process."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from nfq_agent.context import Context
from nfq_agent.host.cgroups import CgroupPaths, mounted
from nfq_agent.host.owners import HostOwners
from nfq_agent.log import LogEvent, as_json
from nfq_agent.owner import Owner, Owners
from nfq_agent.packet import Hook, Packet
from nfq_agent.testing import Bench, tcp, udp

ID = "0123456789ab" + "cdef" * 13
PATHS = [
    (None, None, None),
    ("/", None, None),
    ("/system.slice/payments.service", "payments.service", None),
    ("/system.slice/system-nfq\\x2dagent.slice/nfq-agent@web.service", "nfq-agent@web.service", None),
    ("/system.slice/dev-disk-by\\x2dlabel.swap", "dev-disk-by-label.swap", None),
    ("/user.slice/user-1000.slice/user@1000.service/app.slice/firefox.service", "user@1000.service", None),
    ("/user.slice/user-1000.slice/session-2.scope", "session-2.scope", None),
    (f"/system.slice/docker-{ID}.scope", f"docker-{ID}.scope", "0123456789ab"),
    (f"/docker/{ID}", None, "0123456789ab"),
    (f"/machine.slice/libpod-{ID}.scope/container", f"libpod-{ID}.scope", "0123456789ab"),
    (f"/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope", f"cri-containerd-{ID}.scope", "0123456789ab"),
    (f"/kubepods/besteffort/pod2b7/{ID}", None, "0123456789ab"),
    ("/machine.slice/systemd-nspawn@web-1.service/payload", "systemd-nspawn@web-1.service", "web-1"),
    ("/machine.slice/machine-web\\x2d1.scope", "machine-web-1.scope", "web-1"),
    ("/lxc.payload.web-1/system.slice/nginx.service", None, "web-1"),
    ("/_special.service", "special.service", None),
    (f"/user.slice/user-1000.slice/user@1000.service/libpod-{ID}.scope/container", "user@1000.service", "0123456789ab"),
    (f"/kubepods/burstable/pod2b7/crio-{ID}", None, "0123456789ab"),
    (f"/system.slice/docker-{ID}.scope/system.slice/nginx.service", f"docker-{ID}.scope", "0123456789ab"),
    (f"/machine.slice/libpod-conmon-{ID}.scope", f"libpod-conmon-{ID}.scope", None),
    ("/init.scope", "init.scope", None),
    # As any user names a group of its own: systemd-run --user --scope --unit=machine-web.
    ("/user.slice/user-1000.slice/user@1000.service/app.slice/machine-web.scope", "user@1000.service", None),
    ("/user.slice/user-1000.slice/user@1000.service/app.slice/systemd-nspawn@web.service", "user@1000.service", None),
    ("/user.slice/user-1000.slice/user@1000.service/lxc.payload.web", "user@1000.service", None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "unit", "container"), PATHS)
def test_the_names_in_a_path(path: str | None, unit: str | None, container: str | None) -> None:
    owner = Owner(0, 0, path)
    assert (owner.unit, owner.container) == (unit, container)
    named = {key: value for key, value in (("unit", unit), ("container", container), ("cgroup", path)) if value}
    assert owner.facts == {**named, "uid": 0}


def test_a_name_of_other_bytes_than_utf_8_has_a_form_in_json() -> None:
    facts = Owner(0, 0, os.fsdecode(b"/user.slice/a\xff.service"), os.fsdecode(b"/tmp/\xc3")).facts
    assert facts == {"unit": "a\\xff.service", "cgroup": "/user.slice/a\\xff.service", "exe": "/tmp/\\xc3", "uid": 0}
    assert json.loads(as_json(LogEvent("info", "", 0.0, facts)))["exe"] == "/tmp/\\xc3"


class Given(Owners):
    """An owner by source port."""

    def __init__(self, known: Mapping[int, Owner]) -> None:
        self._known = dict(known)
        self.asked = 0

    def belongs(self, port: int, path: str) -> None:
        """Another program has the port now."""
        self._known[port] = Owner(0, 0, path)

    def names(self, packet: Packet) -> Mapping[str, str]:
        self.asked += 1
        owner = self._known.get(packet.headers.five_tuple.sport or 0)
        return {} if owner is None else owner.facts


RULES = [
    {"action": "accept", "unit": "pay*.service", "dport": 443},
    {"action": "accept", "container": "web-*"},
    {"action": "drop", "unit": "*", "dport": 25},
    {"action": "accept", "dport": 25},
]


def bench(**known: str) -> tuple[Bench, Given]:
    chain = Bench("policy", default="drop", rule=RULES)
    owners = Given({int(port.removeprefix("port")): Owner(0, 0, path) for port, path in known.items()})
    chain.element.context = Context(owners=owners)
    return chain, owners


def test_rules_for_units_and_containers() -> None:
    chain, _ = bench(port1="/system.slice/payments.service", port2="/machine.slice/machine-web\\x2d7.scope", port3="/")
    to = "198.51.100.1"
    chain.assert_accepted(tcp("192.0.2.1:1", f"{to}:443", flags="S"))
    chain.assert_dropped(tcp("192.0.2.1:1", f"{to}:80", flags="S"))
    chain.assert_accepted(tcp("192.0.2.1:2", f"{to}:80", flags="S"))
    chain.assert_dropped(tcp("192.0.2.1:3", f"{to}:443", flags="S"))
    chain.assert_dropped(tcp("192.0.2.1:4", f"{to}:443", flags="S"))


def test_what_is_not_known_matches_no_pattern() -> None:
    chain, _ = bench(port1="/system.slice/mail.service")
    chain.assert_dropped(tcp("192.0.2.1:1", "198.51.100.1:25", flags="S"))
    # Its owner is not known: the rule for units does not hold, the one behind it does.
    chain.assert_accepted(tcp("192.0.2.1:9", "198.51.100.1:25", flags="S"))


def test_the_owner_is_asked_once_for_a_flow() -> None:
    chain, owners = bench(port1="/system.slice/payments.service")
    for flags in ("S", "A", "PA", "FA"):
        chain.assert_accepted(tcp("192.0.2.1:1", "198.51.100.1:443", flags=flags))
    assert owners.asked == 1
    chain.assert_accepted(udp("192.0.2.1:1", "198.51.100.1:443"))
    assert owners.asked == 2


def test_a_new_connection_from_the_same_port_has_its_own_owner() -> None:
    chain, owners = bench(port1="/system.slice/payments.service")
    chain.assert_accepted(tcp("192.0.2.1:1", "198.51.100.1:443", flags="S", hook=Hook.OUTPUT))
    chain.assert_accepted(tcp("192.0.2.1:1", "198.51.100.1:443", flags="FA", hook=Hook.OUTPUT))
    owners.belongs(1, "/system.slice/other.service")
    # The same connection, as long as none begins.
    chain.assert_accepted(tcp("192.0.2.1:1", "198.51.100.1:443", flags="A", hook=Hook.OUTPUT))
    # Another hook sees the packet that was judged already.
    chain.assert_accepted(tcp("192.0.2.1:1", "198.51.100.1:443", flags="S", hook=Hook.INPUT))
    chain.assert_dropped(tcp("192.0.2.1:1", "198.51.100.1:443", flags="S", hook=Hook.OUTPUT))


@pytest.mark.parametrize("kind", [tcp, udp])
def test_what_is_denied_is_asked_about_again(kind: Callable[..., Packet]) -> None:
    """No packet has passed: there is no flow, and the next may be of another program, or of the other side."""
    chain, owners = bench(port1="/system.slice/other.service", port443="/system.slice/other.service")
    chain.assert_dropped(kind("192.0.2.1:1", "198.51.100.1:443", hook=Hook.OUTPUT))
    owners.belongs(1, "/system.slice/payments.service")
    chain.assert_accepted(kind("192.0.2.1:1", "198.51.100.1:443", hook=Hook.OUTPUT))
    chain.assert_accepted(kind("198.51.100.1:443", "192.0.2.1:1", hook=Hook.INPUT))
    # The other side's packet came first here.
    chain.assert_dropped(kind("198.51.100.2:443", "192.0.2.1:1", hook=Hook.INPUT))
    chain.assert_accepted(kind("192.0.2.1:1", "198.51.100.2:443", hook=Hook.OUTPUT))


def test_what_monitor_mode_lets_pass_stays_denied() -> None:
    chain, owners = bench(port1="/system.slice/other.service")
    chain.element.context = Context(owners=owners, monitor=True)
    chain.assert_dropped(udp("192.0.2.1:1", "198.51.100.1:443", hook=Hook.OUTPUT))
    owners.belongs(1, "/system.slice/payments.service")
    chain.assert_dropped(udp("192.0.2.1:1", "198.51.100.1:443", hook=Hook.OUTPUT))
    assert owners.asked == 1


def test_a_socket_that_is_bound_to_an_interface_has_an_owner() -> None:
    with closing(HostOwners()) as owners, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
        sender.bind(("127.0.0.1", 0))
        packet = udp(f"127.0.0.1:{sender.getsockname()[1]}", "127.0.0.1:9", hook=Hook.OUTPUT, outdev=socket.if_nametoindex("lo"))
        found = owners.of(packet)
        assert found is not None
        assert found.inode == os.fstat(sender.fileno()).st_ino


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_the_kernel_is_asked_both_ways(family: socket.AddressFamily, kind: socket.SocketKind) -> None:
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with closing(HostOwners()) as owners, socket.socket(family, kind) as server, socket.socket(family, kind) as client:
        server.bind((host, 0))
        if kind == socket.SOCK_STREAM:
            server.listen()
        client.connect(server.getsockname())
        here, there = client.getsockname(), server.getsockname()
        shown = [f"[{end[0]}]:{end[1]}" if family == socket.AF_INET6 else f"{end[0]}:{end[1]}" for end in (here, there)]
        make = tcp if kind == socket.SOCK_STREAM else udp
        sent = owners.of(make(shown[0], shown[1], hook=Hook.OUTPUT))
        answer = owners.of(make(shown[1], shown[0], hook=Hook.INPUT))
        assert sent is not None
        assert (sent.uid, sent.inode) == (os.geteuid(), os.fstat(client.fileno()).st_ino)
        assert answer == sent
        assert owners.of(make(shown[0], shown[1], hook=Hook.FORWARD)) is None


def test_groups_are_found_by_number_also_two_that_are_new_at_once(tmp_path: Path) -> None:
    now = [100.0]
    (tmp_path / "system.slice" / "a.service").mkdir(parents=True)
    groups = CgroupPaths(tmp_path, lambda: now[0])
    assert groups.path(tmp_path.stat().st_ino) == "/"
    assert groups.path((tmp_path / "system.slice" / "a.service").stat().st_ino) == "/system.slice/a.service"
    for name in ("b.service", "c.service"):
        later = tmp_path / name
        later.mkdir()
        assert groups.path(later.stat().st_ino) == f"/{name}"
    assert groups.path(1) is None
    assert CgroupPaths(tmp_path / "none").path(1) is None


def test_walks_through_all_groups_take_a_share_of_the_time(tmp_path: Path) -> None:
    now = [100.0]

    def clock() -> float:
        now[0] += 0.3
        return now[0]

    groups = CgroupPaths(tmp_path, clock)
    for _ in range(20):
        # A walk takes 0.3 s by this clock, of 0.6 s in all.
        groups.path(1)
    (tmp_path / "a.service").mkdir()
    assert groups.path((tmp_path / "a.service").stat().st_ino) is None
    now[0] += 10
    assert groups.path((tmp_path / "a.service").stat().st_ino) == "/a.service"


def test_where_the_hierarchy_is_mounted() -> None:
    found = mounted()
    assert found is None or (found / "cgroup.procs").exists()
