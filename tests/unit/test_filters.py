"""Programs as filters of a clsact qdisc: which messages are sent, what is found again, and what is reported as missing."""

from __future__ import annotations

import contextlib
import os
import struct

import pytest

from nfq_agent.host import bpf, filters, pairs
from nfq_agent.host.attributes import attribute
from nfq_agent.host.filters import Filter, Filters
from nfq_agent.host.links import Link
from nfq_agent.host.rtnetlink import nested

TCMSG = struct.Struct("=BxxxiIII")
INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3
TAG = "nfq-agent:default:pods"


class Kernel:
    """The qdiscs and filters of interfaces, by the messages of rtnetlink."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.qdiscs: dict[int, bytes] = {}
        self.filters: list[Filter] = []
        monkeypatch.setattr(filters, "Rtnetlink", lambda: contextlib.nullcontext(self))
        monkeypatch.setattr(filters, "dump", self.dump)
        monkeypatch.setattr(filters, "links", lambda: [type("Link", (), {"index": 5})()])

    def ask(self, kind: int, flags: int, body: bytes) -> None:
        _, interface, handle, parent, info = TCMSG.unpack_from(body)
        if kind == 36:
            if interface in self.qdiscs:
                raise FileExistsError
            self.qdiscs[interface] = b"clsact\0"
            return
        found = (interface, parent, info >> 16, info & 0xFFFF, handle)
        if kind == 44:
            assert flags == 0x600
            at = body.index(TAG.encode())
            self.filters.append(Filter(*found, body[at : body.index(b"\0", at)].decode()))
            return
        assert kind == 45
        held = [
            each for each in self.filters if (each.interface, each.parent, each.preference, each.protocol, each.handle) == found
        ]
        if not held:
            raise FileNotFoundError
        self.filters.remove(held[0])

    def dump(self, kind: int, request: bytes) -> list[bytes]:
        _, interface, _, parent, _ = TCMSG.unpack(request)
        if kind == 38:
            return [TCMSG.pack(0, index, 0xFFFF0000, 0xFFFFFFF1, 0) + attribute(1, name) for index, name in self.qdiscs.items()]
        return [
            TCMSG.pack(0, each.interface, each.handle, each.parent, each.preference << 16 | each.protocol)
            + attribute(1, b"bpf\0" if each.name else b"u32\0")
            + nested(2, attribute(7, each.name.encode() + b"\0"))
            for each in self.filters
            if (each.interface, each.parent) == (interface, parent)
        ]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


def foreign(preference: int, parent: int = INGRESS) -> Filter:
    return Filter(5, parent, preference, 0x0008, 0x80000800, "")


def test_ours_has_a_preference_of_its_own_and_is_removed_by_handle(kernel: Kernel) -> None:
    kernel.filters = [foreign(1), foreign(3)]
    ours = Filters(TAG)
    program = os.eventfd(0)
    try:
        for side in (bpf.TCX_INGRESS, bpf.TCX_EGRESS, bpf.TCX_INGRESS):
            os.close(ours.attach(program, 5, side))
    finally:
        os.close(program)
    assert [(each.parent, each.preference) for each in kernel.filters[2:]] == [(INGRESS, 2), (EGRESS, 1)]
    before = ours.before_ours(5, bpf.TCX_INGRESS)
    assert before is not None
    assert before.preference == 1
    assert ours.before_ours(5, bpf.TCX_EGRESS) is None
    assert ours.before_ours(6, bpf.TCX_EGRESS) is None
    ours.detach(6)
    assert len(kernel.filters) == 4
    ours.detach(5)
    assert kernel.filters == [foreign(1), foreign(3)]
    assert kernel.qdiscs == {5: b"clsact\0"}
    ours.close()


def test_an_ingress_qdisc_has_no_place_for_it(kernel: Kernel) -> None:
    kernel.qdiscs[5] = b"ingress\0"
    with pytest.raises(OSError, match="its ingress qdisc has no egress side"):
        Filters(TAG).attach(0, 5, bpf.TCX_EGRESS)
    assert kernel.filters == []


def test_the_filters_of_an_owner_are_found_by_their_names(kernel: Kernel) -> None:
    ours = Filters(TAG)
    os.close(ours.attach(0, 5, bpf.TCX_INGRESS))
    kernel.filters.append(foreign(9))
    assert [filters.sweep(owner) for owner in ("nfq-agent:default:pod", "nfq-agent:other:", "nfq-agent:default:")] == [0, 0, 1]
    assert kernel.filters == [foreign(9)]
    # It has gone meanwhile.
    ours.close()


@pytest.mark.parametrize(
    ("attach", "tcx", "found"),
    [
        ("auto", None, "programs"),
        ("auto", bpf.NO_TCX, f"{bpf.NO_TCX}, and cls"),
        ("auto", "bpf(2)", "bpf(2)"),
        ("tcx", bpf.NO_TCX, bpf.NO_TCX),
        ("clsact", None, "cls"),
    ],
)
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, attach: filters.Attach, tcx: str | None, found: str) -> None:
    monkeypatch.setattr(bpf, "tcx_missing", lambda: tcx)
    monkeypatch.setattr(bpf, "programs_missing", lambda: "programs")
    monkeypatch.setattr(filters, "_filters_missing", lambda: "cls")
    assert filters.missing(attach) == found
    assert filters.wanted(attach) is (attach == "clsact" or (attach == "auto" and tcx == bpf.NO_TCX))
    monkeypatch.setattr(filters, "_filters_missing", lambda: None)
    if found.endswith("cls"):
        assert filters.missing(attach) == "programs"


def test_names_of_owners() -> None:
    assert pairs.belongs("nfq-agent:a:pods", "nfq-agent:a:")
    assert pairs.belongs("nfq-agent:a:pods", "nfq-agent:a:pods")
    assert not pairs.belongs("nfq-agent:a:pods", "nfq-agent:a:pod")


def test_a_pair_is_known_before_it_has_its_alias() -> None:
    def link(name: str, alias: str = "", kind: str = "veth") -> Link:
        return Link(1, name, kind, 1500, True, alias, 2, None, 0, False)

    ends = pairs.names("nfq-agent:a:pods")
    assert all(len(name) <= 15 and pairs.is_end(link(name)) for name in ends)
    assert len({*ends, *pairs.names("nfq-agent:a:pod"), *pairs.names("nfq-agent:b:pods")}) == 6
    assert pairs.is_end(link("any", "nfq-agent:a:pods"))
    assert not any(map(pairs.is_end, (link("veth0"), link(ends[0], "other"), link(ends[0], kind="dummy"))))
