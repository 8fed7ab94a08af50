"""`[inline]` beside filters and programs of others: they are left as they are, and one that hides packets is noticed."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

from agent import Agent, until
from containers import bridged, traces
from inlined import config, gone, inline_of
from namespace import Namespace

from nfq_agent.host import bpf


def test_foreign_filters_are_left_to_the_byte(netns: Namespace, tmp_path: Path) -> None:
    bridged(netns)
    netns.shell("""
        tc qdisc add dev veth1 clsact
        tc filter add dev veth1 ingress pref 7 protocol ip u32 match ip dport 99 0xffff action mirred egress redirect dev veth2
        tc filter add dev veth1 egress pref 8 protocol all u32 match u32 0 0
        tc qdisc add dev veth2 ingress
    """)
    before = traces(netns)
    agent = Agent(netns, tmp_path, config()).ready()
    assert traces(netns).replace("nfq", "") != before
    assert agent.stop() == 0
    assert traces(netns) == before
    agent.start()
    agent.ready().kill()
    until(lambda: gone(netns), "nothing is left")
    assert traces(netns) == before


def _hide(name: str, pipe: int, enough: int) -> None:
    code = struct.pack("<BBhi", 0xB7, 0, 0, 0) + struct.pack("<BBhi", 0x95, 0, 0, 0)
    link = bpf.attach(bpf._load_program("other", code), socket.if_nametoindex(name), bpf.TCX_INGRESS)  # noqa: SLF001  # a foreign one
    os.write(pipe, b"x")
    os.read(enough, 1)
    os.close(link)


def _tcx_programs(name: str) -> list[tuple[int, ...]]:
    index = socket.if_nametoindex(name)
    return [bpf.query(index, side).programs for side in (bpf.TCX_INGRESS, bpf.TCX_EGRESS)]


def test_foreign_programs_are_left_in_their_order(netns: Namespace, tmp_path: Path) -> None:
    first, second = bridged(netns)
    second.serve()
    ready, enough = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            netns.enter()
            # TCX_NEXT, twice on each side.
            code = struct.pack("<BBhi", 0xB7, 0, 0, -1) + struct.pack("<BBhi", 0x95, 0, 0, 0)
            index = socket.if_nametoindex("veth1")
            for side in (bpf.TCX_INGRESS, bpf.TCX_EGRESS):
                for name in ("one", "two"):
                    bpf.attach(bpf._load_program(name, code), index, side)  # noqa: SLF001  # a foreign one
            os.write(ready[1], b"x")
            os.read(enough[0], 1)
        finally:
            os._exit(0)
    os.read(ready[0], 1)
    try:
        before = netns.call(_tcx_programs, "veth1")
        assert [len(side) for side in before] == [2, 2]
        for how in ("stop", "kill"):
            agent = Agent(netns, tmp_path, config()).ready()
            assert [side[1:] for side in netns.call(_tcx_programs, "veth1")] == before
            assert first.get("10.5.0.2", "www.blocked.test", seconds=1.5) == "000"
            if how == "stop":
                assert agent.stop() == 0
            else:
                agent.kill()
                until(lambda: netns.call(_tcx_programs, "veth1") == before, "ours are gone")
            assert netns.call(_tcx_programs, "veth1") == before
    finally:
        os.write(enough[1], b"x")
        os.waitpid(child, 0)


def test_a_program_that_hides_packets_is_noticed(netns: Namespace, tmp_path: Path) -> None:
    bridged(netns)
    agent = Agent(netns, tmp_path, config()).ready()
    assert inline_of(agent)["hidden"] == 0
    reader, writer = os.pipe()
    enough, seen = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            netns.enter()
            _hide("veth1", writer, enough)
        finally:
            os._exit(0)
    os.read(reader, 1)
    until(lambda: inline_of(agent)["hidden"] == 1, "it is noticed")
    assert "is attached before ours" in agent.log
    os.write(seen, b"x")
    os.waitpid(child, 0)
    assert agent.stop() == 0
