"""The supervisor's side of an inline link: what is attached, told and counted, and that nothing is left. No kernel, no root."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from descriptors import open_descriptors

from nfq_agent.capture import link_maps
from nfq_agent.config.models import Config
from nfq_agent.counters import INLINE_COUNTERS
from nfq_agent.host import bpf, packet_socket, pairs
from nfq_agent.host.child import Child
from nfq_agent.host.links import Link
from nfq_agent.host.users import User
from nfq_agent.log import Log
from nfq_agent.service import inlines, interface_worker
from nfq_agent.service.inlines import InlineWorker
from nfq_agent.service.worker import WorkerError

NEAR, FAR = 71, 72
FOREIGN = 9001


class FakeMap:
    """A map of the kernel: bytes by bytes."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.values: dict[bytes, bytes] = {}

    def get(self, key: bytes) -> bytes | None:
        return self.values.get(key)

    def put(self, key: bytes, value: bytes) -> None:
        self.values[key] = value

    def remove(self, key: bytes) -> None:
        self.values.pop(key, None)


class FakeKernel:
    """Programs, links and pairs. A link lasts as long as one of its descriptors is open, as in the kernel (BPF_LINK_CREATE)."""

    def __init__(self) -> None:
        self.pairs: set[int] = set()
        self.links: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self.foreign: set[tuple[int, int]] = set()
        self.refuse: set[tuple[int, int]] = set()
        self.no_pair = False
        self.interfaces: list[Link] = []
        self.changes: list[tuple[Link, bool]] = []

    def load(self, _: bytes) -> bpf.Loaded:
        names = ("from", "to", "back", "end")
        maps = {name: FakeMap(os.eventfd(0)) for name in ("settings", "ports", "live", "flows", "interfaces")}
        return bpf.Loaded({name: os.eventfd(0) for name in names}, cast("dict[str, bpf.Map]", maps))

    def attach(self, program: int, interface: int, side: int) -> int:
        if (interface, side) in self.refuse:
            raise OSError(errno.ENODEV, "no such interface")
        reader, writer = os.pipe()
        self.links.setdefault((interface, side), []).insert(0, (program, reader))
        return writer

    def attached(self, interface: int, side: int) -> list[int]:
        """The programs whose link is held."""
        alive = []
        for program, reader in self.links.get((interface, side), ()):
            os.set_blocking(reader, False)
            try:
                held = os.read(reader, 1) != b""
            except BlockingIOError:
                held = True
            if held:
                alive.append(program)
        return alive

    def query(self, interface: int, side: int) -> bpf.Attached:
        if (interface, side) in self.refuse:
            raise OSError(errno.ENODEV, "no such interface")
        before = [FOREIGN] if (interface, side) in self.foreign else []
        return bpf.Attached((*before, *self.attached(interface, side)), 1)

    def make_pair(self, *_: str) -> tuple[int, int]:
        if self.no_pair:
            raise OSError(errno.EPERM, "not permitted")
        self.pairs.add(NEAR)
        return NEAR, FAR

    def close(self) -> None:
        for found in self.links.values():
            for _, reader in found:
                os.close(reader)


class FakeLinks:
    """The socket that reports interfaces."""

    def __init__(self, kernel: FakeKernel) -> None:
        self._kernel = kernel
        self._descriptor = os.eventfd(0)

    def fileno(self) -> int:
        return self._descriptor

    def changes(self) -> list[tuple[Link, bool]]:
        found, self._kernel.changes = self._kernel.changes, []
        return found

    def close(self) -> None:
        os.close(self._descriptor)


def link(index: int, name: str) -> Link:
    return Link(index, name, "veth", 1500, True, "", 1, 0, 0, False)


VETH = link(5, "veth5")


class World:
    """An inline worker whose process is the test: `control` is its end of the socket."""

    def __init__(self, kernel: FakeKernel, **more: Any) -> None:
        self.kernel = kernel
        self.lines: list[str] = []
        log = cast("Log", lambda message, level="info", **_: self.lines.append(f"{level}: {message}"))
        table = {"interfaces": ["veth*"], "tcp_ports": [80], "patience": "50ms", "max_waiting": 64, **more}
        self.worker = InlineWorker("edge", Config.model_validate({"inline": {"edge": table}}), User(0, 0), log, lambda: ())
        self.control, self._theirs = socket.socketpair()
        self.control.setblocking(False)

    def serve(self) -> None:
        """Have it opened, with a process."""
        self.worker.open()
        self.worker.child = cast("Child", SimpleNamespace(control=self._theirs))

    def change(self, link: Link, gone: bool = False) -> None:
        """The kernel reports an interface."""
        self.kernel.interfaces = [] if gone else [link]
        self.kernel.changes.append((link, gone))
        ((_, changed),) = self.worker.follows.items()
        changed()

    def told(self) -> tuple[str, list[int]]:
        """What the process was told, and the descriptors that it got."""
        data, ancillary, _, _ = self.control.recvmsg(4096, socket.CMSG_SPACE(64))
        found = [number for _, _, value in ancillary for number in array("i", value)]
        return data.decode(), found

    @property
    def maps(self) -> dict[str, FakeMap]:
        return self.loaded

    loaded: dict[str, FakeMap]

    def close(self) -> None:
        self.worker.child = None
        self.worker.close()
        self.control.close()
        self._theirs.close()


@pytest.fixture
def world(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    assert run_folder.is_dir()
    kernel = FakeKernel()
    made = World(kernel)

    def load(packed: bytes) -> bpf.Loaded:
        found = kernel.load(packed)
        made.loaded = cast("dict[str, FakeMap]", found.maps)
        return found

    rtnetlink = SimpleNamespace(make_pair=kernel.make_pair, remove=kernel.pairs.discard)
    monkeypatch.setattr(bpf, "load", load)
    monkeypatch.setattr(bpf, "OBJECT", SimpleNamespace(read_bytes=lambda: b"", exists=lambda: True))
    monkeypatch.setattr(bpf, "missing", lambda: None)
    monkeypatch.setattr(bpf, "attach", kernel.attach)
    monkeypatch.setattr(bpf, "query", kernel.query)
    monkeypatch.setattr(bpf, "program_id", lambda descriptor: descriptor)
    monkeypatch.setattr(packet_socket, "missing", lambda: None)
    monkeypatch.setattr(packet_socket, "open_judged", lambda *_: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    monkeypatch.setattr(pairs, "sweep", lambda _: 0)
    monkeypatch.setattr(pairs, "PairSocket", lambda: contextlib.nullcontext(rtnetlink))
    monkeypatch.setattr(interface_worker, "Links", lambda: FakeLinks(kernel))
    monkeypatch.setattr(interface_worker, "links", lambda: kernel.interfaces)
    yield made
    made.close()
    kernel.close()


def sides(world: World, index: int = VETH.index) -> int:
    """On how many sides of an interface a program of ours judges."""
    return sum(bool(world.kernel.attached(index, side)) for side in (bpf.TCX_INGRESS, bpf.TCX_EGRESS))


def test_what_is_missing_is_named_and_nothing_is_made(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpf, "missing", lambda: "CAP_BPF")
    with pytest.raises(WorkerError, match="inline edge: it needs CAP_BPF"):
        world.worker.open()
    assert world.worker.keeps == set()
    assert world.kernel.pairs == set()


def test_open_makes_the_pair_with_its_programs_and_settings_and_close_removes_all(world: World) -> None:
    before = open_descriptors()
    world.worker.open()
    assert world.kernel.pairs == {NEAR}
    assert world.kernel.attached(NEAR, bpf.TCX_INGRESS)
    assert world.kernel.attached(FAR, bpf.TCX_INGRESS)
    patience, _, most, pair, secret, everything, sides, _ = struct.unpack(
        "=QQIIIIII", world.maps["settings"].values[link_maps.ZERO]
    )
    assert (patience, most, pair, everything, sides) == (50_000_000, 64, NEAR, 0, 0b1111)
    assert secret
    bits = int.from_bytes(world.maps["ports"].values[link_maps.ZERO][:8192], "little")
    assert bits == 1 << 80
    assert len(world.worker.keeps) == 1 + 4 + 5 + 2
    world.worker.close()
    assert world.kernel.pairs == set()
    assert not world.kernel.attached(NEAR, bpf.TCX_INGRESS)
    world.worker.close()
    # The fake's own ends of the links are still open.
    assert len(open_descriptors() - before) == 2


def test_a_pair_that_cannot_be_made_leaves_no_program(world: World) -> None:
    before = open_descriptors()
    world.kernel.no_pair = True
    with pytest.raises(OSError, match="not permitted"):
        world.worker.open()
    assert open_descriptors() == before


def test_a_chosen_interface_is_attached_on_both_sides_and_only_the_process_holds_it(world: World) -> None:
    world.serve()
    world.change(VETH)
    line, descriptors = world.told()
    assert line == "link 5 0\n"
    assert len(descriptors) == 2
    assert sides(world) == 2
    assert world.maps["interfaces"].values[struct.pack("=I", 5)] == link_maps.no_counts()
    # The kernel detaches the programs when the process dies: no other process has the links.
    for each in descriptors:
        os.close(each)
    assert sides(world) == 0


def test_an_interface_that_is_not_chosen_is_left_alone(world: World) -> None:
    world.serve()
    world.change(link(6, "eth0"))
    assert sides(world, 6) == 0
    with pytest.raises(BlockingIOError):
        world.control.recv(1)


def test_an_interface_without_ethernet_headers_is_not_taken_and_that_is_logged_once(world: World) -> None:
    world.serve()
    tunnel = replace(link(7, "veth7"), hardware=65534)
    for _ in range(2):
        world.change(tunnel)
        world.change(tunnel)
        world.change(tunnel, gone=True)
    assert world.worker.interfaces() == []
    assert sides(world, 7) == 0
    assert world.lines == ["warning: inline edge: veth7 is not taken: its packets have no Ethernet header"] * 2


def test_one_side_that_cannot_be_attached_leaves_neither(world: World) -> None:
    world.serve()
    world.kernel.refuse.add((5, bpf.TCX_EGRESS))
    world.change(VETH)
    assert sides(world) == 0
    assert world.worker.interfaces() == []
    (line,) = world.lines
    assert line.startswith("error: inline edge: veth5 cannot be taken:")


def test_a_process_that_is_gone_holds_nothing_and_that_is_logged(world: World) -> None:
    world.serve()
    world.control.close()
    world.change(VETH)
    assert sides(world) == 0
    assert world.lines[0].startswith("warning: inline edge: the worker was not told `link 5 0`")


def test_counts_of_the_worker_and_of_the_kernel(world: World) -> None:
    world.serve()
    world.change(VETH)
    world.worker.table.add(0, "judged", 3)
    # Both ways: up, accepted, dropped, stale, full, tagged, fragments, unread.
    world.maps["interfaces"].values[struct.pack("=I", 5)] = struct.pack("=16Q", *range(1, 9), *[10] * 8)
    ((_, _, counts),) = world.worker.interfaces()
    assert counts["judged"] == 3
    assert (counts["up"], counts["decided_accepted"], counts["decided_dropped"], counts["past_stale"]) == (11, 12, 13, 14)
    assert counts["past_unread"] == 18
    assert set(counts) >= set(INLINE_COUNTERS)
    for each in world.told()[1]:
        os.close(each)


def test_what_a_gone_interface_counted_stays_in_the_total(world: World) -> None:
    world.serve()
    world.change(VETH)
    for each in world.told()[1]:
        os.close(each)
    world.worker.table.add(0, "judged", 3)
    world.change(VETH, gone=True)
    assert world.told() == ("gone 5\n", [])
    assert world.worker.interfaces() == []
    assert world.worker.total()["judged"] == 3
    assert struct.pack("=I", 5) not in world.maps["interfaces"].values


def test_a_program_of_others_before_ours_is_named_once_and_counted(world: World) -> None:
    world.serve()
    world.change(VETH)
    descriptors = world.told()[1]
    world.worker.look()
    assert (world.worker.hidden, world.lines) == (0, [])
    world.kernel.foreign.add((5, bpf.TCX_EGRESS))
    world.worker.look()
    world.worker.look()
    assert world.worker.hidden == 1
    (line,) = world.lines
    assert f"on veth5 program {FOREIGN} of another owner is attached before ours" in line
    world.change(VETH, gone=True)
    assert world.worker.hidden == 0
    for each in descriptors:
        os.close(each)


def test_an_interface_that_disappears_meanwhile_does_not_disturb_the_look(world: World) -> None:
    world.serve()
    world.change(VETH)
    for each in world.told()[1]:
        os.close(each)
    world.kernel.refuse |= {(5, bpf.TCX_INGRESS), (5, bpf.TCX_EGRESS)}
    world.worker.look()
    assert world.lines == []


@pytest.mark.parametrize(
    ("more", "differs"),
    [
        ({}, False),
        ({"tcp_ports": [81]}, True),
        ({"mode": "monitor"}, True),
        ({"elements": ["dpi"]}, True),
        ({"patience": "1s"}, True),
    ],
)
def test_it_differs_by_what_it_does(world: World, more: dict[str, Any], differs: bool) -> None:
    other = World(world.kernel, **more)
    assert world.worker.differs(other.worker) == differs
    other.close()


def test_names_of_its_counts_are_all_counters() -> None:
    assert set(inlines._NAMES.values()) <= set(INLINE_COUNTERS)  # noqa: SLF001  # the table is not told anywhere else


@pytest.mark.parametrize(("role", "sides"), [("server", 0b1001), ("client", 0b0110), ("both", 0b1111)])
def test_the_program_is_told_which_port_counts_on_which_way(role: link_maps.Role, sides: int) -> None:
    assert struct.unpack_from("=II", link_maps.settings(0.5, 1, 2, 3, 4, False, role), 32) == (sides, 0)
